"""FlashAttention-2's six attention functions on ``varlen_attention``.

Masks are aligned bottom-right, as in FlashAttention 2.1 and later: query i of a sequence with sq
queries and sk keys sees keys from ``i + sk - sq - left`` to ``i + sk - sq + right``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from varstream._checks import FLOATING, check_bool, check_cu_seqlens, check_tensor
from varstream.integrations._flash import attend_packed, attend_padded, check_max_seqlen

Result = Tensor | tuple[Tensor, Tensor, None]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """Attention over sequences of one length.

    Args:
        q: ``(B, Sq, H, D)``, any floating dtype.
        k: ``(B, Sk, Hkv, D)``; H must be a multiple of Hkv.
        v: ``(B, Sk, Hkv, Dv)``.
        dropout_p: probability of dropping a probability, in [0, 1).
        softmax_scale: factor on q.k, default ``1 / sqrt(D)``.
        causal: hide keys after the aligned position.
        window_size: keys visible to the left and right of the aligned position, -1 for all.
        softcap: scores become ``softcap * tanh(scores / softcap)`` when positive.
        alibi_slopes: ``(H,)`` or ``(B, H)``.
        deterministic: make the backward bitwise repeatable.
        return_attn_probs: return three values; must be False with dropout, as the third, the
            probabilities with their dropout signs, is never formed.

    Returns:
        out ``(B, Sq, H, Dv)``, or with ``return_attn_probs`` (out, softmax_lse, None), where
        softmax_lse is ``(B, H, Sq)``, natural log, float32 (float64 for float64 inputs),
        differentiable, and +inf for a row that sees no key, whose out is 0.

    Raises:
        TypeError, ValueError: an argument breaks its contract; the message names it.
    """
    out, lse = attend_padded(
        q,
        k,
        v,
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        deterministic=deterministic,
    )
    return _returns(out, lse, dropout_p, return_attn_probs)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """``flash_attn_func`` with keys and values in one tensor ``kv`` ``(B, Sk, 2, Hkv, D)``."""
    check_tensor("kv", kv, shape=(None, None, 2, None, None), layout="(B, Sk, 2, Hkv, D)")
    k, v = kv.unbind(2)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """``flash_attn_func`` with queries, keys and values in one tensor ``qkv``
    ``(B, S, 3, H, D)``."""
    check_tensor(
        "qkv", qkv, shape=(None, None, 3, None, None), dtypes=FLOATING, layout="(B, S, 3, H, D)"
    )
    q, k, v = qkv.unbind(2)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: None = None,
) -> Result:
    """Attention over packed sequences of different lengths.

    Args:
        q: ``(total_q, H, D)``, any floating dtype.
        k: ``(total_k, Hkv, D)``; H must be a multiple of Hkv.
        v: ``(total_k, Hkv, Dv)``.
        cu_seqlens_q: int32 ``(B+1,)`` cumulative lengths. Rows past the last are inert (out 0).
        cu_seqlens_k: the same for k and v.
        max_seqlen_q: upper bound of the query lengths.
        max_seqlen_k: upper bound of the key lengths.
        dropout_p: this and the keywords up to ``return_attn_probs`` as in ``flash_attn_func``.
        block_table: paged keys and values are not supported; must be None.

    Returns:
        out ``(total_q, H, Dv)``, or with ``return_attn_probs`` (out, softmax_lse, None), with
        softmax_lse ``(H, total_q)`` as in ``flash_attn_func``.

    Raises:
        TypeError, ValueError: an argument breaks its contract; the message names it.
    """
    if block_table is not None:
        raise ValueError(
            "block_table must be None (paged keys and values are not supported), "
            f"got {type(block_table).__name__}"
        )
    out, lse = attend_packed(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        deterministic=deterministic,
    )
    return _returns(out, lse, dropout_p, return_attn_probs)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """``flash_attn_varlen_func`` with keys and values in one tensor ``kv``
    ``(total_k, 2, Hkv, D)``."""
    check_tensor("kv", kv, shape=(None, 2, None, None), layout="(total_k, 2, Hkv, D)")
    k, v = kv.unbind(1)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """``flash_attn_varlen_func`` with queries, keys and values in one tensor ``qkv``
    ``(total, 3, H, D)`` and one set of lengths."""
    check_tensor(
        "qkv", qkv, shape=(None, 3, None, None), dtypes=FLOATING, layout="(total, 3, H, D)"
    )
    check_cu_seqlens("cu_seqlens", cu_seqlens, None, qkv.device)
    max_seqlen = check_max_seqlen("max_seqlen", max_seqlen)
    q, k, v = qkv.unbind(1)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def _returns(out: Tensor, lse: Tensor, dropout_p: float, return_attn_probs: Any) -> Result:
    if not check_bool("return_attn_probs", return_attn_probs):
        return out
    if dropout_p > 0.0:
        raise ValueError(
            "return_attn_probs must be False with dropout (the probabilities are never formed), "
            f"got True with dropout_p {dropout_p}"
        )
    # FlashAttention-2 marks a row that saw no key by +inf; -inf, which merges, is ours and FA3's.
    return out, lse.masked_fill(lse == -torch.inf, torch.inf), None
