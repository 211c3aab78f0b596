"""``vs.varlen_attention`` forward on a GPU, over the packs of ``attention_grid``, and the kernel
that lists the tiles.

The floor is a rate: the operations of the visible scores (4 each a head and element of the head
dimension) at the speed of a large matrix product measured in the same rounds. Nothing here has run
on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from .. import attention_grid as grid
from .. import attention_ways as ways
from .. import floors, lengths, timers
from ..attention_grid import Packing
from ..case import OURS, Case, Setup, Shape, floor


def _run(way: ways.Way, pack: ways.Pack) -> Any:
    with torch.no_grad():
        return way(pack)


def _build(packing: Packing, shape: Shape, device: torch.device, seed: int) -> Setup:
    p = packing.draw(shape, device, seed)
    flops = packing.flops(lengths.FORWARD_PRODUCTS, shape)
    product, scale = floors.gemm_rate(flops, p.q.dtype, device)
    return Setup(
        runs={
            **{name: partial(_run, way, p) for name, way in ways.WAYS.items()},
            "float32": partial(_run, ways.float32, p),
            "gemm_rate": product,
        },
        results={name: p.unpad for name in ways.PADDED},
        scales={"gemm_rate": scale},
        figures=lambda peaks, ours: grid.figures(p),
        flops=flops,
        operand_bytes=2 * p.q.nbytes + p.k.nbytes + p.v.nbytes,
    )


def _case(packing: Packing) -> Case:
    causal = "causal, " if packing.causal else ""
    return Case(
        f"attention_forward/{packing.name}",
        "varlen_attention",
        packing.shape,
        partial(_build, packing),
        packing.quick,
        dtype="bfloat16",
        devices=("cuda",),
        peers=(*packing.compared, floor("gemm_rate")),
        bars=packing.bars,
        reference="float32",
        tolerance=grid.TOLERANCE,
        note=f"{causal}forward; {packing.note}; {packing.flash} is FlashAttention-2",
    )


# --- the tile schedule ----------------------------------------------------------------------------


def _build_schedule(packing: Packing, shape: Shape, device: torch.device, seed: int) -> Setup:
    p = packing.draw(shape, device, seed)
    run = partial(_run, ways.ours, p)

    def figures(peaks: Mapping[str, int], ours: Any) -> dict[str, float]:
        found = {"sequences": float(len(p.lengths))}
        if device.type == "cuda":
            names = {"schedule": "varlen::TileSchedule", "attention": "attention::Forward"}
            for figure, kernel in names.items():
                seconds = timers.kernel_seconds(run, kernel)
                if seconds is not None:
                    found[f"{figure}_us"] = seconds * 1e6
        return found

    return Setup(
        runs={OURS: run, "float32": partial(_run, ways.float32, p)},
        figures=figures,
        operand_bytes=4 * p.q.nbytes,
    )


def _schedule(name: str, lengths_of: grid.Lengths, tokens: int, seqlen: int = 0) -> Case:
    shape = grid.sizes(tokens, 1, 1, 64) | ({"seqlen": seqlen} if seqlen else {})
    return Case(
        f"tile_schedule/{name}",
        "varlen_attention",
        shape,
        partial(_build_schedule, Packing(name, lengths_of, shape, causal=True)),
        {"tokens": 320, "head_dim": 16} | ({"seqlen": 320} if seqlen else {}),
        dtype="bfloat16",
        devices=("cuda",),
        reference="float32",
        tolerance=grid.TOLERANCE,
        note="one head, causal; schedule_us and attention_us are the two kernels alone, by torch's "
        "profiler; the time is that of the whole call",
    )


CASES = (
    *(_case(packing) for packing in grid.GRID),
    _schedule("sentences", grid.short, 1 << 19),
    _schedule("documents", grid.ragged, 1 << 18),
    _schedule("one_long", grid.equal, 1 << 17, 1 << 17),
)
