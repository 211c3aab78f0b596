"""What the two FlashAttention faces share: padded batches as packed ones, and arguments by their
own names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from varstream._checks import FLOATING, INTEGERS, check_int, check_tensor
from varstream.ops.attention import varlen_attention
from varstream.ops.attention_call import in_kernel_layout


def check_window_size(window_size: Any) -> tuple[int, int]:
    """Check ``window_size``, (left, right) with -1 for unbounded, and return it as a tuple."""
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise TypeError(f"window_size must be a pair (left, right) of ints, got {window_size!r}")
    left, right = window_size
    return check_int("window_size[0]", left, low=-1), check_int("window_size[1]", right, low=-1)


def check_max_seqlen(name: str, value: Any) -> int:
    """Check a maximum length, an int or a tensor that holds one, and return the int.

    transformers passes tensors where FlashAttention's binding converts them.
    """
    if isinstance(value, Tensor):
        check_tensor(name, value, ndim=0, dtypes=INTEGERS)
        value = int(value)
    return check_int(name, value, low=0)


def attend_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
    *,
    window_size: Any,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """``varlen_attention`` under FlashAttention's argument names: out and lse ``(H, total_q)``.

    Tensors of any strides, as FlashAttention takes them.
    """
    # None means cu_seqlens_q to varlen_attention; FlashAttention has no such default.
    check_tensor("cu_seqlens_k", cu_seqlens_k)
    result = varlen_attention(
        in_kernel_layout(q),
        in_kernel_layout(k),
        in_kernel_layout(v),
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q=check_max_seqlen("max_seqlen_q", max_seqlen_q),
        max_seqlen_k=check_max_seqlen("max_seqlen_k", max_seqlen_k),
        window=check_window_size(window_size),
        return_lse=True,
        **options,
    )
    assert isinstance(result, tuple)
    return result


def attend_padded(
    q: Tensor, k: Tensor, v: Tensor, *, window_size: Any, **options: Any
) -> tuple[Tensor, Tensor]:
    """Sequences of one length each: q ``(B, Sq, H, D)``, k and v ``(B, Sk, Hkv, ...)`` to out
    ``(B, Sq, H, Dv)`` and lse ``(B, H, Sq)``."""
    check_tensor("q", q, ndim=4, dtypes=FLOATING, layout="(B, Sq, H, D)")
    batch, rows, heads, _ = q.shape
    check_tensor("k", k, shape=(batch, None, None, None), layout="(B, Sk, Hkv, D)")
    keys, kv_heads = k.shape[1:3]
    check_tensor("v", v, shape=(batch, keys, kv_heads, None), layout="(B, Sk, Hkv, Dv)")
    starts = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
    out, lse = attend_packed(
        q.reshape(batch * rows, *q.shape[2:]),
        k.reshape(batch * keys, *k.shape[2:]),
        v.reshape(batch * keys, *v.shape[2:]),
        starts * rows,
        starts * keys,
        rows,
        keys,
        window_size=window_size,
        **options,
    )
    out = out.reshape(batch, rows, heads, v.shape[3])
    return out, lse.reshape(heads, batch, rows).transpose(0, 1)
