"""The arguments of the attention ops: their contract, checked, and their defaults, resolved."""

from __future__ import annotations

import math
from itertools import pairwise
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
    is_compiling,
    values_visible,
)

MAX_HEAD_DIM = 256
KERNEL_DTYPES = (torch.bfloat16, torch.float16)
KERNEL_WORD = 8  # 16-bit values in the 16 bytes that a kernel moves at a time
# Asked once: torch.compile can't trace the question.
KERNELS_COMPILED = _load.has_cuda_kernel("varlen_attention")


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
    validate: bool = False,
) -> Call:
    """Check every argument of ``varlen_attention`` and resolve the defaults.

    Values inside tensors are read on the CPU always, on a GPU with ``validate``.
    """
    check_bool("validate", validate)
    _check_qkv(q, k, v)
    device, heads = q.device, q.shape[1]
    cu_q, max_q = _check_lengths(
        "cu_seqlens_q", "max_seqlen_q", cu_seqlens_q, max_seqlen_q, q, "q", validate
    )
    if cu_seqlens_k is None:
        if k.shape[0] != q.shape[0]:
            raise ValueError(
                "cu_seqlens_k must be given when k has other rows than q, "
                f"got {k.shape[0]} and {q.shape[0]}"
            )
        cu_k, max_k = cu_q, max_q
        if max_seqlen_k is not None:
            _, max_k = _check_lengths(
                "cu_seqlens_q", "max_seqlen_k", cu_q, max_seqlen_k, k, "k", validate
            )
    else:
        cu_k, max_k = _check_lengths(
            "cu_seqlens_k", "max_seqlen_k", cu_seqlens_k, max_seqlen_k, k, "k", validate
        )
    batch = cu_q.shape[0] - 1
    if cu_k.shape[0] != batch + 1:
        raise ValueError(
            f"cu_seqlens_k must have {batch + 1} entries like cu_seqlens_q, got {cu_k.shape[0]}"
        )
    if seqused_k is not None:
        _check_seqused(seqused_k, cu_k, batch, validate)
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
    v_shape = (k.shape[0], k.shape[1], None)
    check_tensor("v", v, shape=v_shape, device=q.device, layout="(total_k, Hkv, Dv)")
    check_same_dtype(q=q, k=k, v=v)
    if k.shape[2] != q.shape[2]:
        raise ValueError(f"k must have q's head dim {q.shape[2]}, got shape {tuple(k.shape)}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] != 0:
        raise ValueError(f"q must have a multiple of k's {k.shape[1]} heads, got {q.shape[1]}")
    for name, tensor in (("q", q), ("v", v)):
        if not 1 <= tensor.shape[2] <= MAX_HEAD_DIM:
            raise ValueError(
                f"{name} must have a head dim from 1 to {MAX_HEAD_DIM}, got {tensor.shape[2]}"
            )
    if _in_kernels(q):
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            _check_kernel_rows(name, tensor)


def _in_kernels(q: Tensor) -> bool:
    """Whether compiled CUDA kernels serve a call with these queries."""
    return KERNELS_COMPILED and q.is_cuda and q.dtype in KERNEL_DTYPES


def in_kernel_layout(t: Tensor) -> Tensor:
    """q, k or v ``(rows, heads, dim)`` as the CUDA kernels read it; a compact copy where its heads
    aren't contiguous or don't start at multiples of 16 bytes.

    For callers whose own contract takes any strides; ``varlen_attention`` refuses such tensors.
    """
    if not isinstance(t, Tensor) or t.layout is not torch.strided or t.dim() != 3:
        return t  # the checks come afterwards
    if t.dtype not in KERNEL_DTYPES or (t.stride(2) == 1 and _heads_aligned(t)):
        return t
    return t.clone(memory_format=torch.contiguous_format)  # contiguous() keeps an odd offset


def _heads_aligned(t: Tensor) -> bool:
    """Whether every head of t (rows, heads, dim) starts at a multiple of 16 bytes.

    torch.compile can't trace an offset: what begins within a tensor is left to the operator then.
    """
    steps = [t.stride(d) for d in range(2) if t.shape[d] > 1]
    offset = 0 if is_compiling() else t.storage_offset()
    return all(step % KERNEL_WORD == 0 for step in (offset, *steps))


def _check_kernel_rows(name: str, t: Tensor) -> None:
    """What the CUDA kernels want of q, k, v: heads of whole 16-byte words."""
    if t.shape[2] % KERNEL_WORD != 0:
        raise ValueError(
            f"{name} must have a head dim that is a multiple of {KERNEL_WORD} in {t.dtype} on "
            f"CUDA, got {t.shape[2]}; pad it with zeros"
        )
    if t.numel() == 0:
        return
    if t.stride(2) != 1:
        raise ValueError(
            f"{name} must be contiguous in its last dimension on CUDA, got strides {t.stride()}; "
            "call .contiguous()"
        )
    if not _heads_aligned(t):
        raise ValueError(
            f"{name} must have heads that start at multiples of 16 bytes on CUDA, got strides "
            f"{t.stride()} and offset {t.storage_offset()}; call .contiguous()"
        )


def _check_lengths(
    cu_name: str,
    max_name: str,
    cu: Any,
    max_seqlen: int | None,
    rows: Tensor,
    rows_name: str,
    validate: bool,
) -> tuple[Tensor, int]:
    """Check cumulative lengths and their maximum; given one, rows past the end are a tail."""
    total = rows.shape[0]
    if max_seqlen is None:
        cu = check_cu_seqlens(cu_name, cu, total, rows.device, validate)
        return cu, int((cu[1:] - cu[:-1]).max()) if cu.shape[0] > 1 else 0
    cu = check_cu_seqlens(cu_name, cu, None, rows.device, validate)
    check_int(max_name, max_seqlen, low=0)
    if values_visible(cu, validate=validate):
        values = cu.tolist()
        if values[-1] > total:
            raise ValueError(
                f"{cu_name} must not pass {rows_name}'s {total} rows, got {values[-1]}"
            )
        longest = max((b - a for a, b in pairwise(values)), default=0)
        if longest > max_seqlen:
            raise ValueError(
                f"{max_name} must be at least the longest length {longest}, got {max_seqlen}"
            )
    return cu, max_seqlen


def _check_seqused(seqused_k: Any, cu_k: Tensor, batch: int, validate: bool) -> None:
    check_tensor(
        "seqused_k",
        seqused_k,
        shape=(batch,),
        dtypes=(torch.int32,),
        device=cu_k.device,
        layout="(B,)",
    )
    if values_visible(seqused_k, cu_k, validate=validate):
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


# --- backward -------------------------------------------------------------------------------------


def check_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    sinks: Tensor | None,
    dk: Tensor,
    dv: Tensor,
    dsinks: Tensor | None,
    *,
    alibi_slopes: Tensor | None,
) -> None:
    """Check what the backward takes beside the forward's arguments; q, k, v are checked already."""
    acc, device = (acc_dtype(q.dtype),), q.device
    rows, heads, value_dim = q.shape[0], q.shape[1], v.shape[2]
    for name, tensor in (("dout", dout), ("out", out)):
        shape = (rows, heads, value_dim)
        check_tensor(
            name, tensor, shape=shape, dtypes=(q.dtype,), device=device, layout="(total_q, Hq, Dv)"
        )
    of_lse: dict[str, Any] = {"shape": (heads, rows), "dtypes": acc, "device": device}
    check_tensor("lse", lse, layout="(Hq, total_q)", **of_lse)
    if dlse is not None:
        check_tensor("dlse", dlse, layout="(Hq, total_q)", **of_lse)
    check_tensor("dk", dk, shape=k.shape, dtypes=acc, device=device, layout="(total_k, Hkv, D)")
    check_tensor("dv", dv, shape=v.shape, dtypes=acc, device=device, layout="(total_k, Hkv, Dv)")
    if (dsinks is None) != (sinks is None):
        raise ValueError("dsinks must be given exactly when sinks is given")
    if dsinks is not None:
        check_tensor("dsinks", dsinks, shape=(heads,), dtypes=acc, device=device, layout="(Hq,)")
    written = {"dk": dk, "dv": dv, "dsinks": dsinks}
    for name, buffer in written.items():
        _check_accumulator(name, buffer)
        if buffer is not None and _in_kernels(q):
            _check_kernel_accumulator(name, buffer)
    _check_disjoint(
        written,
        {
            "dout": dout,
            "q": q,
            "k": k,
            "v": v,
            "out": out,
            "lse": lse,
            "dlse": dlse,
            "sinks": sinks,
            "alibi_slopes": alibi_slopes,
        },
    )


def _check_accumulator(name: str, buffer: Tensor | None) -> None:
    """Refuse a buffer that can't be added into: part of a graph, or overlapping itself."""
    if buffer is None:
        return
    if buffer.requires_grad:
        raise ValueError(f"{name} must not require a gradient: it is added into")
    sizes = zip(buffer.shape, buffer.stride(), strict=True)
    if any(size > 1 and stride == 0 for size, stride in sizes):
        raise ValueError(f"{name} must not be expanded, got strides {buffer.stride()}")
    if not is_compiling() and _meets_itself(buffer):
        raise ValueError(
            f"{name} must hold each element once, got shape {tuple(buffer.shape)} with strides "
            f"{buffer.stride()}, which overlap"
        )


def _meets_itself(t: Tensor) -> bool:
    """Whether some dimension's stride doesn't pass what the dimensions of smaller stride reach."""
    reach = 0
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += (size - 1) * stride
    return False


def _check_kernel_accumulator(name: str, buffer: Tensor) -> None:
    """What the CUDA kernels want of a buffer that they add into."""
    if buffer.shape[-1] > 1 and buffer.stride(-1) != 1:
        raise ValueError(
            f"{name} must be contiguous in its last dimension on CUDA, got strides "
            f"{buffer.stride()}"
        )


def _check_disjoint(written: dict[str, Tensor | None], read: dict[str, Tensor | None]) -> None:
    """Refuse accumulators that share memory with each other or with an input."""
    if is_compiling():
        return
    taken = {name: _extent(t) for name, t in read.items()}
    for name, buffer in written.items():
        begin, end = _extent(buffer)
        for other, (other_begin, other_end) in taken.items():
            if begin < other_end and other_begin < end:
                raise ValueError(
                    f"{name} must not share memory with {other} (their address ranges overlap)"
                )
        taken[name] = begin, end


def _extent(t: Tensor | None) -> tuple[float, float]:
    """First and one-past-last byte address that the (strided) tensor touches; an empty range, which
    overlaps nothing, where it touches none or has no address."""
    if t is None or t.numel() == 0 or t.is_meta or type(t) is not Tensor:
        return math.inf, -math.inf
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    begin = t.data_ptr()
    return begin, begin + (last + 1) * t.element_size()
