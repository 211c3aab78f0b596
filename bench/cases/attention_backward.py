"""Backward of ``vs.varlen_attention`` on a GPU, over the packs of ``attention_grid``, and over some
of them with ``deterministic=True``.

Each way's forward runs once, before the check; what is timed and weighed is its backward. The floor
is a rate: the operations of the visible scores (10 each a head and element of the head dimension:
2.5 times the forward's) at the speed of a large matrix product. Nothing here has run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from .. import attention_grid as grid
from .. import attention_ways as ways
from .. import floors, lengths
from ..attention_gradients import Gradients, deterministic, reference
from ..attention_grid import Packing
from ..case import OURS, Bar, Case, Peer, Setup, Shape, floor

Runs = Mapping[str, Callable[[], Any]]
# What FlashAttention-2's authors report of their backward at head dim 128 without a mask, 8k and
# 16k tokens, on an H100 with SXM. A time, so that it is an upper limit.
H100 = "H100 80GB HBM3"
H100_FLOPS = 320e12


def _backwards(p: ways.Pack) -> Runs:
    return {name: Gradients(way, p, name in ways.PADDED) for name, way in ways.WAYS.items()}


def _repeatable(p: ways.Pack) -> Runs:
    """Backwards that give the same bits each time, and ours that need not."""
    flags = {
        name: Gradients(partial(ways.WAYS[name], deterministic=True), p)
        for name in (OURS, "flash_attn", "flash_attn_3")
    }
    torch_modes = {
        name: deterministic(Gradients(ways.WAYS[name], p))
        for name in ("sdpa_flash", "sdpa_cudnn", "torch_varlen")
    }
    return {**flags, **torch_modes, "any_order": Gradients(ways.ours, p)}


def _build(
    packing: Packing,
    runs_of: Callable[[ways.Pack], Runs],
    shape: Shape,
    device: torch.device,
    seed: int,
) -> Setup:
    p = packing.draw(shape, device, seed)
    flops = packing.flops(lengths.BACKWARD_PRODUCTS, shape)
    product, scale = floors.gemm_rate(flops, p.q.dtype, device)
    return Setup(
        runs={**runs_of(p), "float32": partial(reference, p), "gemm_rate": product},
        results={name: p.unpad for name in ways.PADDED},
        scales={"gemm_rate": scale},
        figures=lambda peaks, ours: grid.figures(p),
        flops=flops,
        operand_bytes=3 * p.q.nbytes + p.k.nbytes + p.v.nbytes,
    )


def _bars(packing: Packing) -> tuple[Bar, ...]:
    shape = packing.shape
    long = shape.get("seqlen", 0) >= 8192
    if not long or shape["head_dim"] != 128 or packing.causal:
        return packing.bars
    limit = packing.flops(lengths.BACKWARD_PRODUCTS, shape) / H100_FLOPS
    return *packing.bars, Bar("seconds", limit, device=H100)


def _case(
    packing: Packing,
    name: str,
    runs_of: Callable[[ways.Pack], Runs],
    compared: tuple[Peer, ...],
    bars: tuple[Bar, ...],
    note: str,
) -> Case:
    return Case(
        f"attention_backward/{name}",
        "varlen_attention",
        packing.shape,
        partial(_build, packing, runs_of),
        packing.quick,
        dtype="bfloat16",
        devices=("cuda",),
        peers=(*compared, floor("gemm_rate")),
        bars=bars,
        reference="float32",
        tolerance=grid.TOLERANCE,
        note=f"{'causal, ' if packing.causal else ''}backward alone; {packing.note}; {note}",
    )


def _any_order(packing: Packing) -> Case:
    flash = f"{packing.flash} is FlashAttention-2"
    bars = _bars(packing)
    if len(bars) > len(packing.bars):
        flash += "; the limit in seconds is 320 TFLOP/s on an H100"
    return _case(packing, packing.name, _backwards, packing.compared, bars, flash)


def _same_order(packing: Packing) -> Case:
    sdpa = grid.DENSE[:2] if "seqlen" in packing.shape else ()
    compared = (Peer("any_order"), *sdpa, *grid.PACKED)
    note = "deterministic=True, the peers' too; any_order is ours without it"
    return _case(packing, f"deterministic_{packing.name}", _repeatable, compared, (), note)


CASES = (
    *(_any_order(packing) for packing in grid.GRID),
    *(
        _same_order(packing)
        for packing in (
            grid.dense(2048, 64, True),
            grid.dense(8192, 64, False),
            grid.dense(2048, 128, True),
            grid.dense(8192, 128, True),
            grid.packed(16384, "gqa_hd128"),
            grid.packed(16384, "mha_hd64"),
        )
    ),
)
