"""``varlen_attention``: the public call, and its op's kernels, fakes and autograd formula."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from varstream import _load
from varstream._checks import acc_dtype, check_bool, op_errors
from varstream.ops._autocast import cast_for_autocast
from varstream.ops.attention_call import Call, check_backward, check_call
from varstream.reference import attention as reference


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
    validate: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over packed sequences of different lengths, without padding and without a score
    matrix.

    Query i of a sequence with sq queries and sk keys stands at key position ``i + sk - sq``
    (bottom-right alignment). Its scores are ``softcap(softmax_scale * q.k) - slope * |i + sk - sq -
    j|``.

    Args:
        q: ``(total_q, Hq, D)``, float64, float32, bfloat16 or float16; D up to 256. On CUDA in
            bfloat16 and float16 D is a multiple of 8, and heads are contiguous and start at
            multiples of 16 bytes; so for k and v.
        k: ``(total_k, Hkv, D)``; Hq must be a multiple of Hkv.
        v: ``(total_k, Hkv, Dv)``.
        cu_seqlens_q: int32 ``(B+1,)`` cumulative lengths. With ``max_seqlen_q`` given they may end
            before ``total_q``: the rows left over are an inert tail (out 0, lse -inf, gradients 0).
        cu_seqlens_k: the same for k and v; ``None`` means ``cu_seqlens_q``.
        max_seqlen_q: upper bound of the query lengths; ``None`` reads it from ``cu_seqlens_q`` (a
            device synchronisation on CUDA).
        max_seqlen_k: the same for the keys.
        seqused_k: int32 ``(B,)``, keys in use per sequence; those after it are never read.
        causal: hide keys after the aligned position.
        window: keys visible to the left and right of the aligned position, -1 for all.
        softmax_scale: factor on q.k, default ``1 / sqrt(D)``.
        softcap: scores become ``softcap * tanh(scores / softcap)`` when positive.
        alibi_slopes: ``(Hq,)`` or ``(B, Hq)``, any floating dtype; not differentiable.
        sinks: ``(Hq,)`` logits, any floating dtype, that join the softmax denominator only;
            differentiable.
        dropout_p: probability of dropping a probability, in [0, 1); the LSE is of the undropped
            scores.
        deterministic: make the backward bitwise repeatable (always so on the CPU).
        return_lse: also return the LSE.
        rng_state: int64 ``(2,)`` dropout state; ``None`` draws one with torch's generator.
        validate: check the values in ``cu_seqlens`` and ``seqused_k`` on a GPU too (a device
            synchronisation); on the CPU they always are.

    Returns:
        out ``(total_q, Hq, Dv)`` in q's dtype, and with ``return_lse`` the natural-log LSE ``(Hq,
        total_q)`` in float32 (float64 for float64 inputs), sinks included, differentiable. A row
        that sees no key has out 0, gradients 0 and LSE -inf (or its sink).

    Raises:
        TypeError, ValueError: an argument breaks its contract; the message names it.

    Source: FlashAttention-2 (Dao, 2023) for tiling and backward; Philox4x32-10 for dropout.
    """
    q, k, v = cast_for_autocast(q, k, v)
    call = check_call(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        seqused_k=seqused_k,
        causal=causal,
        window=window,
        softmax_scale=softmax_scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        dropout_p=dropout_p,
        deterministic=deterministic,
        rng_state=rng_state,
        validate=validate,
    )
    check_bool("return_lse", return_lse)
    out, lse = torch.ops.varstream.varlen_attention(q, k, v, *call)
    return (out, lse) if return_lse else out


# --- kernels, fakes, autograd ---------------------------------------------------------------------


def _options(call: Call) -> reference.Options:
    return reference.Options(
        call.cu_seqlens_q,
        call.cu_seqlens_k,
        call.seqused_k,
        call.alibi_slopes,
        call.sinks,
        call.rng_state,
        call.window_left,
        0 if call.causal else call.window_right,
        call.softmax_scale,
        call.softcap,
        call.dropout_p,
    )


def _guard(q: Tensor, k: Tensor, v: Tensor, call: Call, *backward: Any) -> None:
    """The op's own checks: what the public call has checked already, a direct call has not."""
    with op_errors("varlen_attention"):
        arguments = call._asdict()
        window = arguments.pop("window_left"), arguments.pop("window_right")
        check_call(q, k, v, window=window, **arguments)
        if call.dropout_p > 0.0 and call.rng_state is None:
            raise ValueError("rng_state must be given when dropout_p > 0, got None")
        if backward:
            dout, out, lse, dlse, *buffers = backward
            check_backward(
                dout, q, k, v, out, lse, dlse, call.sinks, *buffers, alibi_slopes=call.alibi_slopes
            )


@_load.composed_kernel("varlen_attention")
@_load.composed_kernel("varlen_attention_composed")
def _forward(q: Tensor, k: Tensor, v: Tensor, *call: Any) -> tuple[Tensor, Tensor]:
    _guard(q, k, v, Call(*call))
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    return reference.attention_forward(q, k, v, _options(Call(*call)))


@_load.fake_kernel("varlen_attention")
@_load.fake_kernel("varlen_attention_composed")
def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *call: Any) -> tuple[Tensor, Tensor]:
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
    return out, q.new_empty(q.shape[1], q.shape[0], dtype=acc_dtype(q.dtype))


@_load.composed_kernel("varlen_attention_bwd_accumulate")
@_load.composed_kernel("varlen_attention_bwd_accumulate_composed")
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
    _guard(q, k, v, Call(*call), dout, out, lse, dlse, dk, dv, dsinks)
    dout, q, k, v, out = (t if t.stride(-1) == 1 else t.contiguous() for t in (dout, q, k, v, out))
    saved = reference.Saved(out, lse, dout, dlse)
    return reference.attention_backward(q, k, v, saved, _options(Call(*call)), dk, dv, dsinks).to(
        q.dtype
    )


@_load.fake_kernel("varlen_attention_bwd_accumulate")
@_load.fake_kernel("varlen_attention_bwd_accumulate_composed")
def _backward_accumulate_fake(dout: Tensor, q: Tensor, *rest: Any) -> Tensor:
    return q.new_empty(q.shape)


@_load.composed_kernel("varlen_attention_bwd")
@_load.composed_kernel("varlen_attention_bwd_composed")
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
@_load.fake_kernel("varlen_attention_bwd_composed")
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
        "varlen_attention has no second derivative; detach its gradients before differentiating"
    )


_load.autograd("varlen_attention", _setup_context)(_autograd)
_load.autograd("varlen_attention_bwd")(_no_double_backward)
