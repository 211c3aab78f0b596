"""The head on a GPU in bfloat16 beside the fused losses people use there."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import varstream as vs

from .. import floors, peers
from ..case import Case, Peer, Setup, Shape, floor


def _gradients(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def _liger(x: Tensor, weight: Tensor, target: Tensor) -> Any:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(x, weight, target)


def _cut_cross_entropy(x: Tensor, weight: Tensor, target: Tensor) -> Any:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(x, weight, target, impl="cce_exact")


def _torch_chunked(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(x, weight, target, options=options)


LOSSES = {
    "varstream": vs.linear_cross_entropy,
    "dense": lambda x, weight, target: F.cross_entropy(F.linear(x, weight).float(), target),
    "torch_chunked": _torch_chunked,
    "liger": _liger,
    "cut_cross_entropy": _cut_cross_entropy,
}


def _build(shape: Shape, device: torch.device, seed: int) -> Setup:
    draw = torch.Generator().manual_seed(seed)
    rows, width, classes = shape["rows"], shape["width"], shape["classes"]
    x = torch.randn(rows, width, generator=draw).to(device, torch.bfloat16)
    weight = (torch.randn(classes, width, generator=draw) * 0.05).to(device, torch.bfloat16)
    target = torch.randint(0, classes, (rows,), generator=draw).to(device)
    leaves = [x.requires_grad_(), weight.requires_grad_()]

    def run(name: str) -> list[Tensor]:
        return _gradients(LOSSES[name](x, weight, target), leaves)

    def exact() -> list[Tensor]:
        wide = [t.detach().float().requires_grad_() for t in leaves]
        return _gradients(F.cross_entropy(F.linear(*wide), target), wide)

    gradients, logits = x.nbytes + weight.nbytes, rows * classes * x.element_size()
    return Setup(
        runs={
            **{name: partial(run, name) for name in LOSSES},
            "float32": exact,
            "gemm_floor": floors.head_products(x, weight, "zxw"),
        },
        figures=lambda peaks, ours: {
            "memory_over_logits": (peaks["varstream"] - gradients) / logits
        },
        operand_bytes=gradients,
    )


CASES = (
    Case(
        "head/bf16_gpu",
        "linear_cross_entropy",
        {"rows": 8192, "width": 4096, "classes": 128256},
        _build,
        {"rows": 64, "width": 32, "classes": 512},
        dtype="bfloat16",
        devices=("cuda",),
        peers=(
            Peer("dense"),
            Peer("torch_chunked", peers.torch_chunked),
            Peer("liger", peers.liger),
            Peer("cut_cross_entropy", peers.cut_cross_entropy),
            floor("gemm_floor"),
        ),
        reference="float32",
        tolerance=2e-2,
        note="forward and backward; floor: the 3 matrix products",
    ),
)
