"""``vs.linear_cross_entropy``: forward and backward, plain and with every option.

Each option runs at the main job's shape against the same loss over dense logits, torch's own
chunked loss where that has the option, and the matrix products of its own gradient done plainly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import varstream as vs

from .. import floors, peers
from ..case import Bar, Case, Peer, Setup, Shape, floor

# float32 against float32, gradients summed over thousands of rows
TOLERANCE = 2e-5
MAIN = {"rows": 4096, "width": 512, "classes": 32000}
QUICK = {"rows": 37, "width": 16, "classes": 101}
IGNORED = -100

Keywords = Mapping[str, Any]


@dataclass(frozen=True)
class Variant:
    """One option of the head.

    Attributes:
        keywords: of ``vs.linear_cross_entropy``, from the operands.
        torch: whether torch's chunked loss takes the same keywords.
        products: of its floor, see ``floors.head_products``.
        targets: K targets in each row.
        ignored: the part of the rows that takes no part.
        frozen: the weight takes no gradient.
        metrics: the call also returns the argmax and the like.
    """

    name: str
    keywords: Callable[[Operands], Keywords] = lambda o: {}
    torch: bool = False
    products: str = "zxw"
    targets: int = 1
    ignored: float = 0.0
    frozen: bool = False
    metrics: bool = False


class Operands:
    """x (N, d) and weight (V, d), targets (N,) or (N, K), and what single options need."""

    def __init__(self, shape: Shape, variant: Variant, device: torch.device, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        rows, width, classes = shape["rows"], shape["width"], shape["classes"]

        def to(t: Tensor) -> Tensor:
            return t.to(device)

        self.input = to(torch.randn(rows, width, generator=draw)).requires_grad_()
        self.weight = to(torch.randn(classes, width, generator=draw) * 0.05)
        self.weight.requires_grad_(not variant.frozen)
        self.bias = to(torch.randn(classes, generator=draw)).requires_grad_()
        size = (rows,) if variant.targets == 1 else (rows, variant.targets)
        self.target = to(torch.randint(0, classes, size, generator=draw))
        if variant.ignored:
            self.target[to(torch.rand(rows, generator=draw)) < variant.ignored] = IGNORED
        self.valid = self.target.reshape(rows, -1).ne(IGNORED).any(1)
        self.class_weight = to(torch.rand(classes, generator=draw) + 0.5)
        self.token_weight = to(torch.rand(size, generator=draw))
        self.upstream = to(torch.rand(size, generator=draw))

    def parameters(self, keywords: Keywords) -> list[Tensor]:
        """The tensors whose gradients are formed."""
        leaves = [self.input, self.weight, keywords.get("linear_bias")]
        return [t for t in leaves if t is not None and t.requires_grad]

    def gradients(self, loss: Tensor, keywords: Keywords) -> list[Tensor]:
        """The loss and its gradients; an unreduced loss is weighed by ``upstream``."""
        weights = self.upstream if loss.dim() else None
        grads = torch.autograd.grad(loss, self.parameters(keywords), weights)
        return [loss.detach(), *grads]


VARIANTS = (
    Variant("main", torch=True),
    Variant("bias", lambda o: {"linear_bias": o.bias}, torch=True),
    Variant("class_weight", lambda o: {"weight": o.class_weight}, torch=True),
    # torch's chunked path falls back to dense logits when labels are smoothed
    Variant("label_smoothing", lambda o: {"label_smoothing": 0.1}),
    Variant("softcap", lambda o: {"softcap": 30.0}),
    Variant("temperature", lambda o: {"temperature": 0.7}),
    Variant("logit_scale", lambda o: {"logit_scale": 0.5}),
    Variant("z_loss", lambda o: {"z_loss": 1e-4}),
    Variant("token_weight", lambda o: {"token_weight": o.token_weight}),
    Variant("two_targets", targets=2),
    Variant("metrics", lambda o: {"return_metrics": True}, metrics=True),
    Variant("ignored_half", torch=True, ignored=0.5),
    Variant("frozen", torch=True, frozen=True, products="zx"),
    Variant("none", lambda o: {"reduction": "none"}, torch=True, products="zzxw"),
)


def dense_loss(
    x: Tensor,
    head: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    temperature: float = 1.0,
    z_loss: float = 0.0,
    token_weight: Tensor | None = None,
    return_metrics: bool = False,
) -> Any:
    """The same loss over all logits (N, V) at once, in plain PyTorch."""
    logits = F.linear(x, head, linear_bias)
    if logit_scale != 1.0:
        logits = logits * logit_scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if temperature != 1.0:
        logits = logits / temperature
    columns = target.reshape(x.shape[0], -1)  # (N, K)
    losses = torch.stack(
        [
            F.cross_entropy(
                logits, t, weight=weight, label_smoothing=label_smoothing, reduction="none"
            )
            for t in columns.unbind(1)
        ],
        1,
    ).view_as(target)
    if token_weight is not None:
        losses = losses * token_weight
    if reduction == "none":
        return losses
    valid = columns.ne(IGNORED)
    weights = valid if weight is None else valid * weight[columns.clamp(min=0)]
    loss = losses.sum() / weights.sum()
    if z_loss:
        lse = logits.logsumexp(1) * valid.any(1)
        loss = loss + z_loss * lse.square().sum() / valid.any(1).sum()
    return (loss, logits.argmax(1)) if return_metrics else loss


def _ours(o: Operands, variant: Variant) -> list[Tensor]:
    keywords = variant.keywords(o)
    loss: Any = vs.linear_cross_entropy(o.input, o.weight, o.target, **keywords)
    if variant.metrics:
        loss, metrics = loss
        return [*o.gradients(loss, keywords), metrics.argmax]
    return o.gradients(loss, keywords)


def _dense(o: Operands, variant: Variant) -> list[Tensor]:
    keywords = variant.keywords(o)
    loss = dense_loss(o.input, o.weight, o.target, **keywords)
    if variant.metrics:
        loss, argmax = loss
        return [*o.gradients(loss, keywords), argmax]
    return o.gradients(loss, keywords)


def _torch(o: Operands, variant: Variant) -> list[Tensor]:
    keywords = variant.keywords(o)
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=512)
    loss = F.linear_cross_entropy(o.input, o.weight, o.target, options=options, **keywords)
    return o.gradients(loss, keywords)


def _build(variant: Variant, shape: Shape, device: torch.device, seed: int) -> Setup:
    o = Operands(shape, variant, device, seed)
    gradients = sum(t.nbytes for t in o.parameters(variant.keywords(o)))
    logits = shape["rows"] * shape["classes"] * o.input.element_size()
    rows = o.input.detach()[o.valid]
    return Setup(
        runs={
            "varstream": partial(_ours, o, variant),
            "dense": partial(_dense, o, variant),
            "torch_chunked": partial(_torch, o, variant),
            "gemm_floor": floors.head_products(rows, o.weight, variant.products),
        },
        figures=lambda peaks, ours: {
            "memory_over_logits": (peaks["varstream"] - gradients) / logits
        },
        operand_bytes=o.input.nbytes + o.weight.nbytes,
    )


BARS = (Bar("time/gemm_floor", 1.08), Bar("memory_over_logits", 0.15))


def _case(variant: Variant, name: str, shape: Shape, barred: bool) -> Case:
    needs = (
        peers.torch_chunked
        if variant.torch
        else peers.never("torch's chunked path has no such option")
    )
    bars = (*BARS, Bar("time/torch_chunked", 1.03)) if variant.torch else BARS
    return Case(
        f"head/{name}",
        "linear_cross_entropy",
        shape,
        partial(_build, variant),
        QUICK,
        peers=(Peer("dense"), Peer("torch_chunked", needs), floor("gemm_floor")),
        bars=bars if barred else (),
        reference="dense",
        tolerance=TOLERANCE,
        note=f"forward and backward; floor: the {len(variant.products)} matrix products",
    )


CASES = (
    *(_case(variant, variant.name, MAIN, True) for variant in VARIANTS),
    _case(VARIANTS[0], "short", {"rows": 1024, "width": 512, "classes": 32000}, False),
    _case(VARIANTS[0], "wide", {"rows": 1024, "width": 2048, "classes": 32000}, False),
)
