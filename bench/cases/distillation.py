"""``objectives.distillation`` on a GPU in bfloat16, forward and backward: a student's head half as
wide as its teacher's.

The floor is the very matrix products: the student's logits, dX and dW, and the teacher's logits.
Nothing here has run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from .. import floors
from .. import head_divergences as ways
from .. import head_grid as grid
from ..case import Case, Setup, Shape

# Half the rows of the other cases: plain torch keeps several float32 tensors of all logits.
SHAPE = grid.sizes(4096, 2048, 128256) | {"teacher_width": 4096}
QUICK = grid.QUICK | {"teacher_width": 48}


def _build(beta: float, shape: Shape, device: torch.device, seed: int) -> Setup:
    p = ways.draw(shape, device, seed)
    student = floors.head_products(p.x, p.weight, "zxw")
    teacher = floors.head_products(p.teacher_x, p.teacher_weight, "z")

    def products() -> None:
        teacher()
        student()

    def figures(peaks: Mapping[str, int], ours: Any) -> dict[str, float]:
        return grid.figures(peaks, (p.x, p.weight), shape["rows"], shape["classes"])

    return Setup(
        runs={
            **{
                name: partial(ways.loss_and_gradients, way, p, beta)
                for name, way in ways.WAYS.items()
            },
            "float32": partial(ways.reference, p, beta),
            "gemm_floor": products,
        },
        figures=figures,
        flops=grid.flops("zxw", p.x, p.weight) + grid.flops("z", p.teacher_x, p.teacher_weight),
        operand_bytes=sum(t.nbytes for t in p.tensors),
    )


def _case(name: str, beta: float, what: str) -> Case:
    return Case(
        f"distillation/bf16_gpu_{name}",
        "objectives.distillation",
        SHAPE,
        partial(_build, beta),
        QUICK,
        dtype="bfloat16",
        devices=("cuda",),
        peers=grid.divergence_peers(),
        bars=(grid.CHUNK_BAR,),
        reference="float32",
        tolerance=grid.TOLERANCE,
        note=f"{what}, forward and backward; floor: the student's 3 matrix products and the "
        "teacher's 1",
    )


CASES = (
    _case("kl", 0.0, "KL(teacher || student)"),
    _case("jsd", 0.5, "generalised Jensen-Shannon divergence, beta 0.5"),
)
