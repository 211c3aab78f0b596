"""``vs.token_logprobs``: log-probabilities of the targets, with and without the entropy, forward
and backward under weights that differ from row to row."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import varstream as vs

from .. import floors, peers
from ..case import Case, Peer, Setup, Shape, floor
from ..head_ways import trl_chunked
from .head import MAIN, QUICK, TOLERANCE


def _dense(x: Tensor, weight: Tensor, target: Tensor, entropy: bool) -> tuple[Tensor, ...]:
    logp = F.log_softmax(F.linear(x, weight), 1)
    found = logp.gather(1, target[:, None])[:, 0]
    return (found, -(logp.exp() * logp).sum(1)) if entropy else (found,)


def _ours(x: Tensor, weight: Tensor, target: Tensor, entropy: bool) -> tuple[Tensor, ...]:
    found: Any = vs.token_logprobs(x, weight, target, return_entropy=entropy)
    return found if entropy else (found,)


WAYS = {"varstream": _ours, "dense": _dense, "trl_chunked": trl_chunked}


def _build(entropy: bool, products: str, shape: Shape, device: torch.device, seed: int) -> Setup:
    draw = torch.Generator().manual_seed(seed)
    rows, width, classes = shape["rows"], shape["width"], shape["classes"]
    x = torch.randn(rows, width, generator=draw).to(device)
    weight = (torch.randn(classes, width, generator=draw) * 0.05).to(device)
    target = torch.randint(0, classes, (rows,), generator=draw).to(device)
    upstream = [torch.rand(rows, generator=draw).to(device) for _ in range(2)]
    backward = products != "z"
    leaves = [t.requires_grad_(backward) for t in (x, weight)]

    def run(name: str) -> list[Tensor]:
        found = WAYS[name](x, weight, target, entropy)
        grads = torch.autograd.grad(found, leaves, upstream[: len(found)]) if backward else ()
        return [*(t.detach() for t in found), *grads]

    gradients = (x.nbytes + weight.nbytes) * backward
    logits = rows * classes * x.element_size()
    return Setup(
        runs={
            **{name: partial(run, name) for name in WAYS},
            "gemm_floor": floors.head_products(x, weight, products),
        },
        figures=lambda peaks, ours: {
            "memory_over_logits": (peaks["varstream"] - gradients) / logits
        },
        operand_bytes=x.nbytes + weight.nbytes,
    )


def _case(name: str, entropy: bool, products: str, note: str) -> Case:
    return Case(
        f"logprobs/{name}",
        "token_logprobs",
        MAIN,
        partial(_build, entropy, products),
        QUICK,
        peers=(Peer("dense"), Peer("trl_chunked", peers.trl), floor("gemm_floor")),
        reference="dense",
        tolerance=TOLERANCE,
        note=f"{note}; floor: matrix products, the logits' twice where they are formed again",
    )


CASES = (
    _case("plain", False, "zzxw", "forward and backward"),
    _case("entropy", True, "zzxw", "forward and backward, through the entropy too"),
    _case("inference", False, "z", "forward only"),
)
