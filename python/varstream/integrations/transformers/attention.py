"""The attention function of ``attn_implementation="varstream"``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from varstream._checks import INTEGERS, check_int, check_mask_values, check_tensor
from varstream.integrations.transformers.masks import (
    ELSEWHERE,
    Pattern,
    RowMask,
    rows_of_padding,
    split_at_restarts,
)
from varstream.ops.attention import varlen_attention
from varstream.ops.attention_call import in_kernel_layout

# What a model or a caller may ask of an attention function and that this one can't do.
_REFUSED = (
    "attention_bias",
    "block_indices",
    "block_table",
    "cache",
    "head_mask",
    "indices",
    "k_cache",
    "output_attentions",
    "position_bias",
    "sinks",
    "v_cache",
)


def varstream_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: RowMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    deterministic: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | Tensor | None = None,
    max_length_k: int | Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over the real tokens of a batch, called by transformers' models.

    Args:
        module: the attention layer; its ``is_causal`` counts where neither mask nor argument says.
        query: ``(B, H, Sq, D)``, rotated.
        key: ``(B, Hkv, Sk, D)``, the cache's keys included.
        value: ``(B, Hkv, Sk, Dv)``.
        attention_mask: what ``varstream_mask`` made: it says which tokens are real, and whether
            and how far each sees, as it does for ``eager``. A plain ``(B, Sk)`` mask of real
            tokens, or None, leaves that to ``is_causal`` and ``sliding_window``.
        dropout: probability of dropping a probability, in [0, 1).
        scaling: factor on q.k, default ``1 / sqrt(D)``.
        sliding_window: keys visible, the query's own included; read without a ``RowMask`` only.
        softcap: scores become ``softcap * tanh(scores / softcap)`` when positive.
        is_causal: hide keys after the query; read without a ``RowMask`` only.
        s_aux: ``(H,)`` sinks, logits that join the softmax denominator only.
        deterministic: make the backward bitwise repeatable; None follows torch's global setting.
        cu_seq_lens_q, cu_seq_lens_k: ``(n+1,)`` cumulative lengths of documents in the flattened
            batch, as ``DataCollatorWithFlattening`` gives them.
        max_length_q, max_length_k: their longest lengths.
        kwargs: ``position_ids`` (B, S) that restart tell documents of a causal batch that came
            without any mask; the rest of what models pass down is not for attention.

    Returns:
        out ``(B, Sq, H, Dv)``, zero at padding, and None for the weights, which are never formed.

    Raises:
        TypeError, ValueError: an argument breaks its contract, or asks for what packed rows can't
            express; the message names it.
    """
    for name in _REFUSED:
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise ValueError(
                f'{name} must not be given to attn_implementation="varstream", '
                f"got {type(kwargs[name]).__name__}; {ELSEWHERE}"
            )
    check_tensor("query", query, ndim=4, layout="(B, H, Sq, D)")
    check_tensor("key", key, shape=(query.shape[0], None, None, None), layout="(B, Hkv, Sk, D)")
    check_tensor("value", value, ndim=4, layout="(B, Hkv, Sk, Dv)")
    if isinstance(attention_mask, RowMask):
        rows = attention_mask
        _check_sizes(rows, query, key)
    else:
        rows = _rows_without_mask_function(
            module, query, key, attention_mask, sliding_window, is_causal
        )
    max_q: int | None = rows.max_seqlen_q
    max_k: int | None = rows.max_seqlen_k
    if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
        rows = _with_lengths(rows, cu_seq_lens_q, cu_seq_lens_k)
        max_q = _length("max_length_q", max_length_q)
        max_k = _length("max_length_k", max_length_k)
    elif rows.positions_decide:
        rows = split_at_restarts(rows, kwargs.get("position_ids"))
        max_q, max_k = rows.max_seqlen_q, rows.max_seqlen_k
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    out = varlen_attention(
        _packed_rows(query, rows.indices_q),
        _packed_rows(key, rows.indices_k),
        _packed_rows(value, rows.indices_k),
        rows.cu_seqlens_q,
        rows.cu_seqlens_k,
        max_seqlen_q=max_q,
        max_seqlen_k=max_k,
        causal=rows.causal,
        window=rows.window,
        softmax_scale=scaling,
        softcap=softcap or 0.0,
        sinks=s_aux,
        dropout_p=dropout,
        deterministic=deterministic,
    )
    assert isinstance(out, Tensor)
    batch, heads, length, _ = query.shape
    if rows.indices_q is not None:
        out = torch.ops.varstream.unpack(out, rows.indices_q, batch * length, 0.0)
    return out.reshape(batch, length, heads, value.shape[3]), None


def _packed_rows(x: Tensor, indices: Tensor | None) -> Tensor:
    """x (B, H, S, D) to its real rows (total, H, D)."""
    rows = x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])
    return in_kernel_layout(rows) if indices is None else torch.ops.varstream.pack(rows, indices)


def _check_sizes(rows: RowMask, query: Tensor, key: Tensor) -> None:
    want = rows.batch, rows.q_length, rows.kv_length
    if (query.shape[0], query.shape[2], key.shape[2]) != want:
        raise ValueError(
            f"attention_mask is for (batch, queries, keys) {want}, "
            f"got query {tuple(query.shape)} and key {tuple(key.shape)}"
        )


def _rows_without_mask_function(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    sliding_window: int | None,
    is_causal: bool | None,
) -> RowMask:
    """Rows of a layer that was called without the registered mask function."""
    batch, q_length, kv_length = query.shape[0], query.shape[2], key.shape[2]
    causal = getattr(module, "is_causal", None) if is_causal is None else is_causal
    if causal is None:
        raise ValueError(
            f"is_causal must be given: {type(module).__name__} does not say whether it is causal"
        )
    window = (-1, -1)
    if sliding_window is not None:
        side = check_int("sliding_window", sliding_window, low=1) - 1
        window = (side, side)
    pattern = Pattern(bool(causal), (window[0], 0) if causal else window)
    padding = None
    if attention_mask is not None:
        if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
            shape = tuple(getattr(attention_mask, "shape", ()))
            raise ValueError(
                "attention_mask must be a tensor (B, Sk) of real tokens, "
                f"got {type(attention_mask).__name__} of shape {shape}; {ELSEWHERE}"
            )
        check_tensor("attention_mask", attention_mask, shape=(batch, kv_length), layout="(B, Sk)")
        check_mask_values("attention_mask", attention_mask)
        padding = attention_mask != 0
    rows = rows_of_padding(
        pattern,
        batch,
        q_length,
        kv_length,
        padding,
        start=kv_length - q_length if causal else None,
        device=query.device,
    )
    decide = bool(causal) and attention_mask is None and q_length == kv_length
    return replace(rows, positions_decide=decide)


def _with_lengths(rows: RowMask, cu_q: Tensor | None, cu_k: Tensor | None) -> RowMask:
    """The same visibility over documents of given lengths."""
    if rows.indices_q is not None or rows.indices_k is not None:
        raise ValueError(
            "cu_seq_lens_q and cu_seq_lens_k must not be given with an attention_mask that has "
            "padding: lengths are of flattened rows without any"
        )
    if cu_q is None or cu_k is None:
        raise ValueError("cu_seq_lens_q and cu_seq_lens_k must be given together, got one of them")
    for name, cu in (("cu_seq_lens_q", cu_q), ("cu_seq_lens_k", cu_k)):
        check_tensor(name, cu, ndim=1, dtypes=INTEGERS, layout="(n+1,)")
    return replace(rows, cu_seqlens_q=cu_q.to(torch.int32), cu_seqlens_k=cu_k.to(torch.int32))


def _length(name: str, value: int | Tensor | None) -> int | None:
    if isinstance(value, Tensor):
        value = int(value)
    return None if value is None else check_int(name, value, low=0)
