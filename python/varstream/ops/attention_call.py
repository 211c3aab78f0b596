"""The arguments of the attention ops: their contract, checked, and their defaults, resolved."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from varstream._checks import (
    FLOATING,
    check_bool,
    check_cu_seqlens,
    check_cu_values,
    check_float,
    check_int,
    check_same_dtype,
    check_tensor,
    values_visible,
)

MAX_HEAD_DIM = 256


class Call(NamedTuple):
    """The op's arguments after q, k and v, in schema order, checked and with every default
    resolved."""

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
    """Check every argument of ``varlen_attention`` against its contract and resolve the
    defaults."""
    _check_qkv(q, k, v)
    device, heads = q.device, q.shape[1]
    cu_q, max_q = _check_lengths("cu_seqlens_q", "max_seqlen_q", cu_seqlens_q, max_seqlen_q, q, "q")
    if cu_seqlens_k is None:
        if k.shape[0] != q.shape[0]:
            raise ValueError(
                "cu_seqlens_k must be given when k has other rows than q, "
                f"got {k.shape[0]} and {q.shape[0]}"
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
                f"alibi_slopes must have shape ({heads},) or ({batch}, {heads}), "
                f"got {tuple(alibi_slopes.shape)}"
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
        cu_q,
        cu_k,
        seqused_k,
        alibi_slopes,
        sinks,
        rng_state,
        max_q,
        max_k,
        check_bool("causal", causal),
        left,
        right,
        check_float("softmax_scale", softmax_scale),
        check_float("softcap", softcap, low=0.0),
        dropout_p,
        check_bool("deterministic", deterministic),
    )


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
    """Check cumulative lengths and their maximum; with the maximum given, rows past the end are a
    tail."""
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
                    f"seqused_k must be between 0 and the sequence's {cu[b + 1] - cu[b]} keys, "
                    f"got {used} at entry {b}"
                )


def _check_window(window: Any) -> tuple[int, int]:
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"window must be a pair (left, right) of ints, got {window!r}")
    return check_int("window[0]", window[0], low=-1), check_int("window[1]", window[1], low=-1)


def autocast_cast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast to the autocast dtype if autocast is on, as it does for torch's own attention."""
    kind = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t.to(dtype) if t.dtype != torch.float64 else t for t in tensors)
