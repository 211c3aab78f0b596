"""FlashAttention-3's Python interface: the functions of module ``flash_attn_interface``.

Beyond the original: every floating dtype and device, and an LSE that carries its gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from varstream._checks import check_bool, check_cu_seqlens, check_int, check_tensor, values_visible
from varstream.integrations._flash import attend_packed, attend_padded

__all__ = ["flash_attn_func", "flash_attn_varlen_func"]

Result = Tensor | tuple[Tensor, Tensor]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: None = None,
    q_descale: None = None,
    k_descale: None = None,
    v_descale: None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Result:
    """Attention over sequences of one length.

    Args:
        q: ``(B, Sq, H, D)``, any floating dtype.
        k: ``(B, Sk, Hkv, D)``; H must be a multiple of Hkv.
        v: ``(B, Sk, Hkv, Dv)``.
        softmax_scale: factor on q.k, default ``1 / sqrt(D)``.
        causal: hide keys after the aligned position (bottom-right).
        qv, q_descale, k_descale, v_descale: not supported; must be None.
        window_size: keys visible to the left and right of the aligned position, -1 for all.
        attention_chunk: not supported; must be 0.
        softcap: scores become ``softcap * tanh(scores / softcap)`` when positive.
        num_splits, pack_gqa, sm_margin: hints that choose how, not what, is computed; without
            effect here.
        deterministic: make the backward bitwise repeatable.
        return_attn_probs: return the LSE too.

    Returns:
        out ``(B, Sq, H, Dv)``, or with ``return_attn_probs`` (out, softmax_lse), where softmax_lse
        is ``(B, H, Sq)``, natural log, float32 (float64 for float64 inputs), differentiable, and
        -inf for a row that sees no key, whose out is 0.

    Raises:
        TypeError, ValueError: an argument breaks its contract; the message names it.
    """
    _check_unsupported(qv, q_descale, k_descale, v_descale, attention_chunk)
    _check_hints(num_splits, pack_gqa, sm_margin)
    out, lse = attend_padded(
        q,
        k,
        v,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        deterministic=deterministic,
    )
    return (out, lse) if check_bool("return_attn_probs", return_attn_probs) else out


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: None = None,
    q_descale: None = None,
    k_descale: None = None,
    v_descale: None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
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
        seqused_q: int32 ``(B,)``, queries in use per sequence; those after it are never read, and
            their out is 0.
        seqused_k: int32 ``(B,)``, keys in use per sequence; those after it are never read.
        the rest: as in ``flash_attn_func``. Masks are aligned to the last query and key in use.

    Returns:
        out ``(total_q, H, Dv)``, or with ``return_attn_probs`` (out, softmax_lse), with
        softmax_lse ``(H, total_q)`` as in ``flash_attn_func``.

    Raises:
        TypeError, ValueError: an argument breaks its contract; the message names it.
    """
    _check_unsupported(qv, q_descale, k_descale, v_descale, attention_chunk)
    _check_hints(num_splits, pack_gqa, sm_margin)
    check_bool("return_attn_probs", return_attn_probs)
    used = None
    if seqused_q is not None:
        used, cu_seqlens_q = _rows_in_use(q, cu_seqlens_q, seqused_q)
        q = torch.ops.varstream.pack(q, used)
    out, lse = attend_packed(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        seqused_k=seqused_k,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        deterministic=deterministic,
    )
    if used is not None:
        rows = q.shape[0]
        out = torch.ops.varstream.unpack(out, used, rows, 0.0)
        lse = torch.ops.varstream.unpack(lse.t().contiguous(), used, rows, -torch.inf).t()
    return (out, lse) if return_attn_probs else out


def _rows_in_use(q: Tensor, cu_seqlens_q: Tensor, seqused_q: Tensor) -> tuple[Tensor, Tensor]:
    """Row numbers of the queries in use, -1 up to (total_q,), and their cumulative lengths.

    No device synchronisation: the rows not in use become an inert tail.
    """
    check_tensor("q", q, ndim=3, layout="(total_q, H, D)")
    cu = check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, None, q.device)
    lengths = cu[1:] - cu[:-1]
    check_tensor(
        "seqused_q",
        seqused_q,
        shape=lengths.shape,
        dtypes=(torch.int32,),
        device=q.device,
        layout="(B,)",
    )
    if values_visible(cu, seqused_q):
        for b, (n, length) in enumerate(zip(seqused_q.tolist(), lengths.tolist(), strict=True)):
            if not 0 <= n <= length:
                raise ValueError(
                    f"seqused_q must be between 0 and the sequence's {length} queries, "
                    f"got {n} at entry {b}"
                )
    new_cu = torch.nn.functional.pad(seqused_q.cumsum(0), (1, 0)).to(torch.int32)  # (B+1,)
    rank = torch.arange(q.shape[0], dtype=torch.int32, device=q.device)  # place among rows in use
    sequence = torch.searchsorted(new_cu[1:], rank, right=True)  # B beyond the last
    shifts = torch.nn.functional.pad(cu[:-1] - new_cu[:-1], (0, 1))
    rows = (rank + shifts[sequence]).to(torch.int64)
    return rows.where(sequence < lengths.shape[0], -1), new_cu


def _check_unsupported(qv: Any, q: Any, k: Any, v: Any, attention_chunk: Any) -> None:
    for name, value in (("qv", qv), ("q_descale", q), ("k_descale", k), ("v_descale", v)):
        if value is not None:
            raise ValueError(f"{name} must be None (not supported), got {type(value).__name__}")
    if check_int("attention_chunk", attention_chunk, low=0):
        raise ValueError(f"attention_chunk must be 0 (not supported), got {attention_chunk}")


def _check_hints(num_splits: Any, pack_gqa: Any, sm_margin: Any) -> None:
    check_int("num_splits", num_splits, low=0)
    check_int("sm_margin", sm_margin, low=0)
    if pack_gqa is not None:
        check_bool("pack_gqa", pack_gqa)
