"""The head on a GPU in bfloat16: ``vs.linear_cross_entropy`` forward and backward beside the losses
people use there, then its log-probabilities, divergences and row kernel.

The floor is the very matrix products: logits, dX and dW over the rows that take part. Nothing here
has run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from .. import floors
from .. import head_grid as grid
from .. import head_reference as reference
from .. import head_ways as ways
from ..case import Case, Setup, Shape
from . import distillation, head_logprobs, head_rows


@dataclass(frozen=True)
class Kind:
    """What is asked of the loss.

    Attributes:
        products: of the floor, see ``floors.head_products``.
        ignored: the part of the rows that takes no part.
        frozen: the weight takes no gradient.
    """

    note: str
    reduction: str = "mean"
    products: str = "zxw"
    ignored: float = 0.0
    frozen: bool = False


MEAN = Kind("forward and backward; floor: the 3 matrix products")
NONE = Kind(
    "forward, and backward under gradients that differ from row to row; floor: 4 matrix products, "
    "the logits' twice",
    reduction="none",
    products="zzxw",
)
FROZEN = Kind(
    "forward and backward, no gradient of the weight; floor: 2 matrix products",
    products="zx",
    frozen=True,
)
IGNORED_HALF = Kind(
    "forward and backward, half the rows ignored; floor: the other half's 3 matrix products",
    ignored=0.5,
)


def _build(kind: Kind, shape: Shape, device: torch.device, seed: int) -> Setup:
    h = ways.draw(shape, device, seed, ignored=kind.ignored, frozen=kind.frozen)
    rows = h.x.detach()[h.valid] if kind.ignored else h.x

    def figures(peaks: Mapping[str, int], ours: Any) -> dict[str, float]:
        return grid.figures(peaks, h.leaves, shape["rows"], shape["classes"])

    return Setup(
        runs={
            **{
                name: partial(ways.loss_and_gradients, way, h, kind.reduction)
                for name, way in ways.LOSSES.items()
            },
            "float32": partial(reference.loss, h, kind.reduction),
            "gemm_floor": floors.head_products(rows, h.weight, kind.products),
        },
        figures=figures,
        flops=grid.flops(kind.products, rows, h.weight),
        operand_bytes=h.x.nbytes + h.weight.nbytes,
    )


def _case(
    name: str,
    shape: Shape,
    kind: Kind = MEAN,
    limit: float | None = None,
    quack: str | None = None,
) -> Case:
    return Case(
        f"head/bf16_gpu{name}",
        "linear_cross_entropy",
        shape,
        partial(_build, kind),
        grid.QUICK,
        dtype="bfloat16",
        devices=("cuda",),
        peers=grid.loss_peers(quack),
        bars=(*grid.gemm_bar(limit), grid.CHUNK_BAR),
        reference="float32",
        tolerance=grid.TOLERANCE,
        note=kind.note,
    )


# Its search over tile shapes would not fit into a step at every shape.
_TUNES = "tunes itself for each shape: see the cases with a bar on time"

CASES = (
    *(
        _case(
            name,
            shape,
            limit=grid.OVER_GEMM.get(name),
            quack=None if name in grid.OVER_GEMM else _TUNES,
        )
        for name, shape in grid.SHAPES.items()
    ),
    _case("_none", grid.MAIN, NONE, grid.PER_TOKEN_OVER_GEMM, "has no losses of single rows"),
    _case("_frozen", grid.MAIN, FROZEN, quack=_TUNES),
    _case("_ignored_half", grid.MAIN, IGNORED_HALF, quack=_TUNES),
    *head_logprobs.CASES,
    *distillation.CASES,
    *head_rows.CASES,
)
