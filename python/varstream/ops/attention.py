"""``varlen_attention``: the public call, its checks, and the op's kernels, fake and autograd formula."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from varstream import _load
from varstream._checks import (
    FLOATING,
    acc_dtype,
    check_bool,
    check_cu_seqlens,
    check_cu_values,
    check_float,
    check_int,
    check_same_dtype,
    check_tensor,
    values_visible,
)
from varstream.reference import attention as reference

MAX_HEAD_DIM = 256


class Call(NamedTuple):
    """The op's arguments after q, k and v, in schema order, checked and with every default resolved."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    seqused_k: Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    rng_state: Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    causal: bool
    window_left: int
    window_right: int
    softmax_scale: float
    softcap: float
    dropout_p: float
    deterministic: bool


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_k: Tensor | None = None,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    deterministic: bool = False,
    return_lse: bool = False,
    rng_state: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over packed sequences of different lengths, without padding and without a score matrix.

    Query i of a sequence with sq queries and sk keys stands at key position ``i + sk - sq`` (bottom-right alignment).
    Its scores are ``softcap(softmax_scale * q.k) - slope * |i + sk - sq - j|``.

    Args:
        q: ``(total_q, Hq, D)``, float64, float32, bfloat16 or float16; D a multiple of 8 up to 256 on CUDA, any up to
            256 on the CPU.
        k: ``(total_k, Hkv, D)``; Hq must be a multiple of Hkv.
        v: ``(total_k, Hkv, Dv)``.
        cu_seqlens_q: int32 ``(B+1,)`` cumulative lengths. With ``max_seqlen_q`` given they may end before ``total_q``:
            the rows left over are an inert tail (out 0, lse -inf, gradients 0).
        cu_seqlens_k: the same for k and v; ``None`` means ``cu_seqlens_q``.
        max_seqlen_q: upper bound of the query lengths; ``None`` reads it from ``cu_seqlens_q`` (a device
            synchronisation on CUDA).
        max_seqlen_k: the same for the keys.
        seqused_k: int32 ``(B,)``, keys in use per sequence; those after it are never read.
        causal: hide keys after the aligned position.
        window: keys visible to the left and right of the aligned position, -1 for all.
        softmax_scale: factor on q.k, default ``1 / sqrt(D)``.
        softcap: scores become ``softcap * tanh(scores / softcap)`` when positive.
        alibi_slopes: ``(Hq,)`` or ``(B, Hq)``, any floating dtype; not differentiable.
        sinks: ``(Hq,)`` logits, any floating dtype, that join the softmax denominator only; differentiable.
        dropout_p: probability of dropping a probability, in [0, 1); the LSE is of the undropped scores.
        deterministic: make the backward bitwise repeatable (always so on the CPU).
        return_lse: also return the LSE.
        rng_state: int64 ``(2,)`` dropout state; ``None`` draws one with torch's generator.

    Returns:
        out ``(total_q, Hq, Dv)`` in q's dtype, and with ``return_lse`` the natural-log LSE ``(Hq, total_q)`` in float32
        (float64 for float64 inputs), sinks included, differentiable. A row that sees no key has out 0, gradients 0 and
        LSE -inf (or its sink).

    Raises:
        TypeError, ValueError: an argument breaks its contract; the message names it.

    Source: FlashAttention-2 (Dao, 2023) for tiling and backward; Philox4x32-10 for dropout.
    """
    q, k, v = _autocast(q, k, v)
    call = check_call(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
        seqused_k=seqused_k, causal=causal, window=window, softmax_scale=softmax_scale, softcap=softcap,
        alibi_slopes=alibi_slopes, sinks=sinks, dropout_p=dropout_p, deterministic=deterministic,
        rng_state=rng_state,
    )  # fmt: skip
    check_bool("return_lse", return_lse)
    out, lse = torch.ops.varstream.varlen_attention(q, k, v, *call)
    return (out, lse) if return_lse else out


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast to the autocast dtype, as autocast does for torch's own attention."""
    kind = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t.to(dtype) if t.dtype != torch.float64 else t for t in tensors)


# --- checks -------------------------------------------------------------------------------------------


def check_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    *,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    seqused_k: Tensor | None,
    causal: bool,
    window: tuple[int, int],
    softmax_scale: float | None,
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    dropout_p: float,
    deterministic: bool,
    rng_state: Tensor | None,
) -> Call:
    """Check every argument of ``varlen_attention`` against its contract and resolve the defaults."""
    _check_qkv(q, k, v)
    device, heads = q.device, q.shape[1]
    cu_q, max_q = _check_lengths("cu_seqlens_q", "max_seqlen_q", cu_seqlens_q, max_seqlen_q, q, "q")
    if cu_seqlens_k is None:
        if k.shape[0] != q.shape[0]:
            raise ValueError(
                f"cu_seqlens_k must be given when k has other rows than q, got {k.shape[0]} and {q.shape[0]}"
            )
        cu_k, max_k = (
            cu_q,
            max_q if max_seqlen_k is None else check_int("max_seqlen_k", max_seqlen_k, low=0),
        )
    else:
        cu_k, max_k = _check_lengths(
            "cu_seqlens_k", "max_seqlen_k", cu_seqlens_k, max_seqlen_k, k, "k"
        )
    batch = cu_q.shape[0] - 1
    if cu_k.shape[0] != batch + 1:
        raise ValueError(
            f"cu_seqlens_k must have {batch + 1} entries like cu_seqlens_q, got {cu_k.shape[0]}"
        )
    if seqused_k is not None:
        _check_seqused(seqused_k, cu_k, batch, device)
    if alibi_slopes is not None:
        check_tensor("alibi_slopes", alibi_slopes, dtypes=FLOATING, device=device)
        if tuple(alibi_slopes.shape) not in ((heads,), (batch, heads)):
            raise ValueError(
                f"alibi_slopes must have shape ({heads},) or ({batch}, {heads}), got {tuple(alibi_slopes.shape)}"
            )
    if sinks is not None:
        check_tensor("sinks", sinks, shape=(heads,), dtypes=FLOATING, device=device, layout="(Hq,)")
    left, right = _check_window(window)
    dropout_p = check_float("dropout_p", dropout_p, low=0.0, high=1.0)
    if dropout_p == 1.0:
        raise ValueError("dropout_p must be below 1, got 1.0")
    if rng_state is not None:
        check_tensor("rng_state", rng_state, shape=(2,), dtypes=(torch.int64,), device=device)
    elif dropout_p > 0.0:
        rng_state = torch.randint(2**62, (2,), dtype=torch.int64, device=device)
    if softmax_scale is None:
        softmax_scale = 1.0 / math.sqrt(max(q.shape[2], 1))
    return Call(
        cu_q, cu_k, seqused_k, alibi_slopes, sinks, rng_state, max_q, max_k, check_bool("causal", causal),
        left, right, check_float("softmax_scale", softmax_scale), check_float("softcap", softcap, low=0.0),
        dropout_p, check_bool("deterministic", deterministic),
    )  # fmt: skip


def _check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    check_tensor("q", q, ndim=3, dtypes=FLOATING, layout="(total_q, Hq, D)")
    check_tensor("k", k, ndim=3, device=q.device, layout="(total_k, Hkv, D)")
    check_tensor("v", v, ndim=3, device=q.device, layout="(total_k, Hkv, Dv)")
    check_same_dtype(q=q, k=k, v=v)
    if k.shape[2] != q.shape[2]:
        raise ValueError(f"k must have q's head dim {q.shape[2]}, got shape {tuple(k.shape)}")
    check_tensor("v", v, shape=(k.shape[0], k.shape[1], None), layout="(total_k, Hkv, Dv)")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] != 0:
        raise ValueError(f"q must have a multiple of k's {k.shape[1]} heads, got {q.shape[1]}")
    for name, tensor in (("q", q), ("v", v)):
        if not 1 <= tensor.shape[2] <= MAX_HEAD_DIM:
            raise ValueError(
                f"{name} must have a head dim from 1 to {MAX_HEAD_DIM}, got {tensor.shape[2]}"
            )


def _check_lengths(
    cu_name: str, max_name: str, cu: Any, max_seqlen: int | None, rows: Tensor, rows_name: str
) -> tuple[Tensor, int]:
    """Check cumulative lengths and their maximum; with the maximum given, rows past the end are a tail."""
    total = rows.shape[0]
    if max_seqlen is None:
        cu = check_cu_seqlens(cu_name, cu, total, rows.device)
        return cu, int((cu[1:] - cu[:-1]).max()) if cu.shape[0] > 1 else 0
    cu = check_cu_seqlens(cu_name, cu, None, rows.device)
    check_int(max_name, max_seqlen, low=0)
    if values_visible(cu):
        values = cu.tolist()
        if values[-1] > total:
            raise ValueError(
                f"{cu_name} must not pass {rows_name}'s {total} rows, got {values[-1]}"
            )
        longest = max((b - a for a, b in zip(values, values[1:], strict=False)), default=0)
        if longest > max_seqlen:
            raise ValueError(
                f"{max_name} must be at least the longest length {longest}, got {max_seqlen}"
            )
    return cu, max_seqlen


def _check_seqused(seqused_k: Any, cu_k: Tensor, batch: int, device: torch.device) -> None:
    check_tensor(
        "seqused_k", seqused_k, shape=(batch,), dtypes=(torch.int32,), device=device, layout="(B,)"
    )
    if values_visible(seqused_k, cu_k):
        cu = check_cu_values("cu_seqlens_k", cu_k, None)
        for b, used in enumerate(seqused_k.tolist()):
            if not 0 <= used <= cu[b + 1] - cu[b]:
                raise ValueError(
                    f"seqused_k must be between 0 and the sequence's {cu[b + 1] - cu[b]} keys, got {used} at entry {b}"
                )


def _check_window(window: Any) -> tuple[int, int]:
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"window must be a pair (left, right) of ints, got {window!r}")
    return check_int("window[0]", window[0], low=-1), check_int("window[1]", window[1], low=-1)


# --- kernels, fakes, autograd -------------------------------------------------------------------------


def _options(call: Call) -> reference.Options:
    return reference.Options(
        call.cu_seqlens_q, call.cu_seqlens_k, call.seqused_k, call.alibi_slopes, call.sinks, call.rng_state,
        call.window_left, 0 if call.causal else call.window_right, call.softmax_scale, call.softcap,
        call.dropout_p,
    )  # fmt: skip


@_load.composed_kernel("varlen_attention")
def _forward(q: Tensor, k: Tensor, v: Tensor, *call: Any) -> tuple[Tensor, Tensor]:
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    return reference.attention_forward(q, k, v, _options(Call(*call)))


@_load.fake_kernel("varlen_attention")
def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *call: Any) -> tuple[Tensor, Tensor]:
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
    return out, q.new_empty(q.shape[1], q.shape[0], dtype=acc_dtype(q.dtype))


@_load.composed_kernel("varlen_attention_bwd_accumulate")
def _backward_accumulate(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    *rest: Any,
) -> Tensor:
    *call, dk, dv, dsinks = rest
    dout, q, k, v, out = (t if t.stride(-1) == 1 else t.contiguous() for t in (dout, q, k, v, out))
    saved = reference.Saved(out, lse, dout, dlse)
    return reference.attention_backward(q, k, v, saved, _options(Call(*call)), dk, dv, dsinks).to(
        q.dtype
    )


@_load.fake_kernel("varlen_attention_bwd_accumulate")
def _backward_accumulate_fake(dout: Tensor, q: Tensor, *rest: Any) -> Tensor:
    return q.new_empty(q.shape)


@_load.composed_kernel("varlen_attention_bwd")
def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    *call: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    acc = acc_dtype(q.dtype)
    dk, dv = k.new_zeros(k.shape, dtype=acc), v.new_zeros(v.shape, dtype=acc)
    sinks = Call(*call).sinks
    dsinks = None if sinks is None else torch.zeros_like(sinks, dtype=acc)
    dq = _backward_accumulate(dout, q, k, v, out, lse, dlse, *call, dk, dv, dsinks)
    dsinks = q.new_zeros(0) if sinks is None or dsinks is None else dsinks.to(sinks.dtype)
    return dq, dk.to(k.dtype), dv.to(v.dtype), dsinks


@_load.fake_kernel("varlen_attention_bwd")
def _backward_fake(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    *call: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sinks = Call(*call).sinks
    dsinks = q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *call = inputs
    ctx.set_materialize_grads(False)
    tensors, ctx.scalars = call[:6], call[6:]
    ctx.save_for_backward(q, k, v, *output, *tensors)


def _autograd(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, *tensors = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    call = Call(*tensors, *ctx.scalars)
    dq, dk, dv, dsinks = torch.ops.varstream.varlen_attention_bwd(
        dout, q, k, v, out, lse, dlse, *call
    )
    grads = dict.fromkeys(Call._fields)
    grads["sinks"] = None if call.sinks is None else dsinks
    return dq, dk, dv, *grads.values()


def _no_double_backward(ctx: Any, *grads: Tensor | None) -> None:
    raise RuntimeError(
        "varlen_attention has no second derivative; detach its gradients before differentiating them"
    )


_load.autograd("varlen_attention", _setup_context)(_autograd)
_load.autograd("varlen_attention_bwd")(_no_double_backward)
