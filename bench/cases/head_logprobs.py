"""``vs.token_logprobs`` on a GPU in bfloat16: forward alone, and with the backward under weights
that differ from row to row, as of a policy's loss.

The floor is the very matrix products, the logits' twice where they are formed again. Nothing here
has run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from .. import floors
from .. import head_grid as grid
from .. import head_reference as reference
from .. import head_ways as ways
from ..case import Case, Setup, Shape


def _build(entropy: bool, products: str, shape: Shape, device: torch.device, seed: int) -> Setup:
    h = ways.draw(shape, device, seed, backward=products != "z")

    def figures(peaks: Mapping[str, int], ours: Any) -> dict[str, float]:
        return grid.figures(peaks, h.leaves, shape["rows"], shape["classes"])

    return Setup(
        runs={
            **{
                name: partial(ways.logprobs_and_gradients, way, h, entropy)
                for name, way in ways.LOGPROBS.items()
            },
            "float32": partial(reference.logprobs, h, entropy),
            "gemm_floor": floors.head_products(h.x, h.weight, products),
        },
        figures=figures,
        flops=grid.flops(products, h.x, h.weight),
        operand_bytes=h.x.nbytes + h.weight.nbytes,
    )


def _case(
    name: str, entropy: bool, backward: bool, limit: float | None, shape: Shape = grid.MAIN
) -> Case:
    what = "log-probabilities and entropies" if entropy else "log-probabilities"
    passes = "forward and backward" if backward else "forward only"
    count = "4 matrix products, the logits' twice" if backward else "1 matrix product"
    return Case(
        f"logprobs/bf16_gpu_{name}",
        "token_logprobs",
        shape,
        partial(_build, entropy, "zzxw" if backward else "z"),
        grid.QUICK,
        dtype="bfloat16",
        devices=("cuda",),
        peers=grid.logprob_peers(entropy),
        bars=(*grid.gemm_bar(limit), grid.CHUNK_BAR),
        reference="float32",
        tolerance=grid.TOLERANCE,
        note=f"{what}, {passes}; floor: {count}",
    )


CASES = (
    _case("inference", False, False, None),
    _case("inference_entropy", True, False, grid.FORWARD_OVER_GEMM),
    _case("plain", False, True, grid.PER_TOKEN_OVER_GEMM),
    _case("entropy", True, True, grid.PER_TOKEN_OVER_GEMM),
    _case("plain_classes_151936", False, True, None, grid.SHAPES["_classes_151936"]),
)
