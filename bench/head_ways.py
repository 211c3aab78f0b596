"""Ways to a linear head's cross-entropy and log-probabilities: ours, and what torch and the
packages for GPUs offer.

A loss takes x (N, d), weight (V, d), target (N,) and a reduction. Log-probabilities take a flag in
its place: whether the rows' entropies are returned as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import varstream as vs

from .case import OURS

IGNORED = -100
DTYPE = torch.bfloat16
CHECKPOINTED_ROWS = 256
# What TRL's trainers pass: classes of one tile.
TRL_TILE = 32768

Loss = Callable[[Tensor, Tensor, Tensor, str], Any]
Logprobs = Callable[[Tensor, Tensor, Tensor, bool], Sequence[Tensor]]


@dataclass(frozen=True)
class Head:
    """x (N, d) and weight (V, d) in bfloat16, target (N,), and the directions of a backward:
    float32 (N,) for a row's loss or log-probability, and for its entropy."""

    x: Tensor
    weight: Tensor
    target: Tensor
    upstream: tuple[Tensor, Tensor]

    @property
    def leaves(self) -> list[Tensor]:
        """The tensors whose gradients are formed."""
        return [t for t in (self.x, self.weight) if t.requires_grad]

    @property
    def valid(self) -> Tensor:
        """(N,): the rows that take part."""
        return self.target.ne(IGNORED)


def draw(
    shape: Mapping[str, int],
    device: torch.device,
    seed: int,
    *,
    ignored: float = 0.0,
    frozen: bool = False,
    backward: bool = True,
) -> Head:
    """A head of normal numbers; ``ignored`` is the part of the rows that takes no part."""
    generator = torch.Generator(device).manual_seed(seed)
    rows, width, classes = shape["rows"], shape["width"], shape["classes"]

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=DTYPE, device=device)

    def uniform() -> Tensor:
        return torch.rand(rows, generator=generator, device=device)

    target = torch.randint(0, classes, (rows,), generator=generator, device=device)
    if ignored:
        target[uniform() < ignored] = IGNORED
    return Head(
        normal(rows, width).requires_grad_(backward),
        normal(classes, width).mul_(0.05).requires_grad_(backward and not frozen),
        target,
        (uniform(), uniform()),
    )


def loss_and_gradients(way: Loss, h: Head, reduction: str) -> list[Tensor]:
    """The loss and its gradients; without a reduction, of the rows' losses times ``upstream``."""
    loss = way(h.x, h.weight, h.target, reduction)
    weights = h.upstream[0].to(loss.dtype) if loss.dim() else None
    return [loss.detach(), *torch.autograd.grad(loss, h.leaves, weights)]


def logprobs_and_gradients(way: Logprobs, h: Head, entropy: bool) -> list[Tensor]:
    """Log-probabilities, entropies if wanted, and the gradients of both times ``upstream``, if the
    head has leaves."""
    found = way(h.x, h.weight, h.target, entropy)
    if not h.leaves:
        return list(found)
    weights = [u.to(t.dtype) for u, t in zip(h.upstream, found, strict=False)]
    return [*(t.detach() for t in found), *torch.autograd.grad(found, h.leaves, weights)]


# --- plain torch ----------------------------------------------------------------------------------


def row_values(x: Tensor, weight: Tensor, target: Tensor, entropy: bool) -> tuple[Tensor, ...]:
    """log p(target) (N,), 0 at ignored rows, and the entropy (N,) if wanted: logits in the
    operands' dtype, all else in float32."""
    logp = F.log_softmax(F.linear(x, weight).float(), 1)
    found = logp.gather(1, target.clamp(min=0)[:, None])[:, 0].masked_fill(target == IGNORED, 0.0)
    return (found, -(logp.exp() * logp).sum(1)) if entropy else (found,)


def dense(x: Tensor, weight: Tensor, target: Tensor, reduction: str) -> Tensor:
    """All logits, widened to float32 as trainers do."""
    return F.cross_entropy(F.linear(x, weight).float(), target, reduction=reduction)


def dense_bf16(x: Tensor, weight: Tensor, target: Tensor, reduction: str) -> Tensor:
    """All logits, left in bfloat16; the loss is rounded to that too."""
    return F.cross_entropy(F.linear(x, weight), target, reduction=reduction)


@lru_cache(maxsize=1)
def _compiled(function: Any, *shape: Any) -> Any:
    """A function compiled for one case: what cases before compiled is dropped, so that no limit on
    recompilation is met and no shape becomes dynamic."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


def compiled(function: Any, *args: Any) -> Any:
    """``function(*args)`` by torch.compile."""
    key = [tuple(a.shape) if isinstance(a, Tensor) else a for a in args]
    return _compiled(function, *key)(*args)


def in_chunks(function: Any, rows: Sequence[Tensor], *constants: Any) -> tuple[Tensor, ...]:
    """``function(*rows, *constants)`` of 256 rows at a time, each chunk's logits formed again in
    the backward: how TRL's trainers bound the memory of log-probabilities in plain torch."""
    parts = zip(*(t.split(CHECKPOINTED_ROWS) for t in rows), strict=True)
    found = [checkpoint(function, *part, *constants, use_reentrant=False) for part in parts]
    return tuple(torch.cat(column) for column in zip(*found, strict=True))


def _of_chunk(
    x: Tensor, target: Tensor, weight: Tensor, entropy: bool
) -> tuple[Tensor, ...]:  # the order of ``in_chunks``
    return row_values(x, weight, target, entropy)


def chunked_logprobs(
    x: Tensor, weight: Tensor, target: Tensor, entropy: bool
) -> tuple[Tensor, ...]:
    return in_chunks(_of_chunk, (x, target), weight, entropy)


def chunked_loss(x: Tensor, weight: Tensor, target: Tensor, reduction: str) -> Tensor:
    (found,) = chunked_logprobs(x, weight, target, False)
    return -found if reduction == "none" else -found.sum() / target.ne(IGNORED).sum()


# --- losses ---------------------------------------------------------------------------------------


def ours(x: Tensor, weight: Tensor, target: Tensor, reduction: str, **options: Any) -> Any:
    return vs.linear_cross_entropy(x, weight, target, reduction=reduction, **options)


def torch_chunked(x: Tensor, weight: Tensor, target: Tensor, reduction: str) -> Tensor:
    """torch's own chunked loss with its default options."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(x, weight, target, reduction=reduction, options=options)


def liger(x: Tensor, weight: Tensor, target: Tensor, reduction: str) -> Any:
    """Liger's Triton kernels; the weight's gradient is summed in float32 over its chunks."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(
        x, weight, target, reduction=reduction, accum_dtype=torch.float32
    )


def cut(impl: str, x: Tensor, weight: Tensor, target: Tensor, reduction: str) -> Any:
    """cut-cross-entropy: ``cce_exact`` leaves no gradient out, its default skips small ones."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(x, weight, target, reduction=reduction, impl=impl)


def quack(x: Tensor, weight: Tensor, target: Tensor, reduction: str) -> Any:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(x, weight, target, reduction=reduction)


LOSSES: Mapping[str, Loss] = {
    OURS: ours,
    "bf16_logits": partial(ours, logits_dtype=torch.bfloat16),
    "dense": dense,
    "dense_bf16": dense_bf16,
    "dense_compiled": partial(compiled, dense),
    "checkpointed_chunks": chunked_loss,
    "torch_chunked": torch_chunked,
    "liger": liger,
    "cut_cross_entropy": partial(cut, "cce_exact"),
    "cut_cross_entropy_default": partial(cut, "cce"),
    "quack": quack,
}


# --- log-probabilities ----------------------------------------------------------------------------


def our_logprobs(
    x: Tensor, weight: Tensor, target: Tensor, entropy: bool, **options: Any
) -> tuple[Tensor, ...]:
    found: Any = vs.token_logprobs(x, weight, target, return_entropy=entropy, **options)
    return found if entropy else (found,)


def trl_chunked(x: Tensor, weight: Tensor, target: Tensor, entropy: bool) -> tuple[Tensor, ...]:
    """The kernel of TRL's trainers."""
    from trl.kernels import ChunkedLogProbFunction

    outputs = ("entropy",) if entropy else ()
    found = ChunkedLogProbFunction.apply(x, weight, None, target, 1.0, TRL_TILE, None, 1.0, outputs)
    return found[: 1 + entropy]


def negative(
    loss: Loss, x: Tensor, weight: Tensor, target: Tensor, entropy: bool
) -> tuple[Tensor, ...]:
    """Log-probabilities as the rows' losses, of a way that has no entropy."""
    return (-loss(x, weight, target, "none"),)


LOGPROBS: Mapping[str, Logprobs] = {
    OURS: our_logprobs,
    "bf16_logits": partial(our_logprobs, logits_dtype=torch.bfloat16),
    "dense": row_values,
    "dense_compiled": partial(compiled, row_values),
    "checkpointed_chunks": chunked_logprobs,
    "trl_chunked": trl_chunked,
    "torch_chunked": partial(negative, torch_chunked),
    "liger": partial(negative, liger),
    "cut_cross_entropy": partial(negative, LOSSES["cut_cross_entropy"]),
    "cut_cross_entropy_default": partial(negative, LOSSES["cut_cross_entropy_default"]),
}
