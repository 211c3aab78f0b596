"""``varlen_attention_backward``: the backward as a primitive that adds into caller-owned
accumulators."""

from __future__ import annotations

import torch
from torch import Tensor

from varstream._checks import acc_dtype, check_tensor
from varstream.ops.attention_call import check_call


def varlen_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    dk: Tensor,
    dv: Tensor,
    dsinks: Tensor | None = None,
    dlse: Tensor | None = None,
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
    rng_state: Tensor | None = None,
) -> Tensor:
    """Gradients of ``varlen_attention``: returns dq and **adds** dk, dv (and dsinks) into the
    caller's buffers.

    ``out`` and ``lse`` may be those of a larger call that these keys are part of (a merged result,
    a ring step, a chunk against a prefix): probabilities are ``exp(score - lse)``, so partial
    gradients add up to the whole.

    Args:
        dout: ``(total_q, Hq, Dv)`` in q's dtype, the gradient of ``out``.
        q, k, v, cu_seqlens_q, cu_seqlens_k and the keywords not listed here: as in
            ``varlen_attention``.
        out: ``(total_q, Hq, Dv)`` in q's dtype, from the forward.
        lse: ``(Hq, total_q)`` in acc dtype, from the forward (sinks included).
        dk: ``(total_k, Hkv, D)`` in acc dtype (float64 for float64 inputs, else float32), added
            into.
        dv: ``(total_k, Hkv, Dv)`` in acc dtype, added into.
        dsinks: ``(Hq,)`` in acc dtype, added into; required exactly when ``sinks`` is given.
        dlse: ``(Hq, total_q)`` in acc dtype, the gradient of ``lse``.
        rng_state: int64 ``(2,)``, the forward's dropout state; required with ``dropout_p > 0``.

    Returns:
        dq ``(total_q, Hq, D)`` in q's dtype.

    Raises:
        TypeError, ValueError: an argument breaks its contract or buffers overlap; nothing has been
            written then.

    Source: FlashAttention-2 (Dao, 2023), with delta minus dlse for the LSE gradient.
    """
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
    )
    if dropout_p > 0.0 and rng_state is None:
        raise ValueError(
            "rng_state must be the forward's dropout state when dropout_p > 0, got None"
        )
    acc, device = (acc_dtype(q.dtype),), q.device
    rows, heads, value_dim = q.shape[0], q.shape[1], v.shape[2]
    for name, tensor in (("dout", dout), ("out", out)):
        shape = (rows, heads, value_dim)
        check_tensor(
            name, tensor, shape=shape, dtypes=(q.dtype,), device=device, layout="(total_q, Hq, Dv)"
        )
    for name, tensor in (("lse", lse), ("dlse", lse if dlse is None else dlse)):
        check_tensor(
            name, tensor, shape=(heads, rows), dtypes=acc, device=device, layout="(Hq, total_q)"
        )
    check_tensor("dk", dk, shape=k.shape, dtypes=acc, device=device, layout="(total_k, Hkv, D)")
    check_tensor("dv", dv, shape=v.shape, dtypes=acc, device=device, layout="(total_k, Hkv, Dv)")
    if (dsinks is None) != (sinks is None):
        raise ValueError("dsinks must be given exactly when sinks is given")
    if dsinks is not None:
        check_tensor("dsinks", dsinks, shape=(heads,), dtypes=acc, device=device, layout="(Hq,)")
    _check_disjoint(
        {"dk": dk, "dv": dv, "dsinks": dsinks},
        {
            "dout": dout,
            "q": q,
            "k": k,
            "v": v,
            "out": out,
            "lse": lse,
            "dlse": dlse,
            "sinks": sinks,
        },
    )
    return torch.ops.varstream.varlen_attention_bwd_accumulate(
        dout, q, k, v, out, lse, dlse, *call, dk, dv, dsinks
    )


def _check_disjoint(written: dict[str, Tensor | None], read: dict[str, Tensor | None]) -> None:
    """Refuse accumulators that share memory with each other or with an input."""
    if torch.compiler.is_compiling():
        return
    done: dict[str, Tensor | None] = {}
    for name, buffer in written.items():
        for other, tensor in (read | done).items():
            if buffer is not None and tensor is not None and _overlap(buffer, tensor):
                raise ValueError(f"{name} must not share memory with {other}")
        done[name] = buffer


def _overlap(a: Tensor, b: Tensor) -> bool:
    if a.numel() == 0 or b.numel() == 0 or type(a) is not Tensor or type(b) is not Tensor:
        return False
    (a0, a1), (b0, b1) = _extent(a), _extent(b)
    return a0 < b1 and b0 < a1


def _extent(t: Tensor) -> tuple[int, int]:
    """First and one-past-last byte address that the (strided) tensor touches."""
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()
