"""``varlen_attention_backward``: the backward as a primitive that adds into caller-owned
accumulators."""

from __future__ import annotations

import torch
from torch import Tensor

from varstream.ops.attention_call import check_backward, check_call


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
    validate: bool = False,
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
            into. On CUDA with bfloat16 and float16 inputs its last dimension is contiguous; so for
            dv and dsinks.
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
        validate=validate,
    )
    if dropout_p > 0.0 and rng_state is None:
        raise ValueError(
            "rng_state must be the forward's dropout state when dropout_p > 0, got None"
        )
    check_backward(dout, q, k, v, out, lse, dlse, sinks, dk, dv, dsinks, alibi_slopes=alibi_slopes)
    with torch.no_grad():
        return torch.ops.varstream.varlen_attention_bwd_accumulate(
            dout, q, k, v, out, lse, dlse, *call, dk, dv, dsinks
        )
