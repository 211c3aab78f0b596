"""The head's row kernel alone, over one chunk of logits: log-probabilities, log-sum-exps and the
gradient written over the logits, or the statistics without a gradient.

The floor is a copy of the bytes that must move, each logit read once and each gradient written
once. The first call of a run, which is checked, sees logits; as gradients replace them, those that
are timed see gradients. Nothing here has run on a GPU yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from varstream._load import has_cuda_kernel

from .. import floors
from .. import head_grid as grid
from ..case import OURS, Bar, Case, Setup, Shape, floor

OPERATORS = torch.ops.varstream
KERNEL = "softmax_rows_"
REFERENCE_ROWS = 256
TIME_OVER_COPY = 1 / 0.85
# Its arguments that the plain loss does without.
ABSENT = dict.fromkeys(
    ("count", "bias", "class_weight", "dsmooth", "dlse", "dentropy", "lse_sq_scale")
    + ("class_sum", "log_sum_sq", "argmax", "shard_sums", "shard_target_z", "shard_given")
)


@dataclass(frozen=True)
class Kind:
    """The dtypes of logits and gradient, the latter None for statistics alone, with entropies."""

    logits: torch.dtype
    gradient: torch.dtype | None


class Chunk:
    """logits (C, V), target (C, 1), dnll (C, 1), the upstream gradient of -log p, and what the
    kernel writes."""

    def __init__(self, kind: Kind, shape: Shape, device: torch.device, seed: int) -> None:
        draw = torch.Generator(device).manual_seed(seed)
        rows, classes = shape["rows"], shape["classes"]
        self.kind, self.classes = kind, classes
        self.target = torch.randint(0, classes, (rows, 1), generator=draw, device=device)
        self.dnll = torch.rand(rows, 1, generator=draw, device=device)
        self.logp = torch.empty_like(self.dnll)
        self.lse, self.entropy = (torch.empty_like(self.dnll[:, 0]) for _ in range(2))
        self._state = draw.get_state()
        self.logits = self.drawn()

    def drawn(self) -> Tensor:
        """The logits before any call."""
        draw = torch.Generator(self.target.device)
        draw.set_state(self._state)
        size = (self.target.shape[0], self.classes)
        dtype, device = self.kind.logits, self.target.device
        return torch.randn(size, generator=draw, dtype=dtype, device=device).mul_(3)

    @property
    def moved(self) -> int:
        """Bytes that must move."""
        written = 0 if self.kind.gradient is None else self.kind.gradient.itemsize
        return self.logits.numel() * (self.kind.logits.itemsize + written)

    def ours(self) -> list[Tensor]:
        gradient = self.kind.gradient
        OPERATORS.softmax_rows_(
            logits=self.logits,
            classes=self.classes,
            first_row=0,
            target=self.target,
            logit_scale=1.0,
            softcap=0.0,
            temperature=1.0,
            dnll=self.dnll,
            gradient=gradient,
            logp=self.logp,
            lse=self.lse,
            entropy=self.entropy if gradient is None else None,
            **ABSENT,
        )
        found = [self.logp[:, 0], self.lse]
        if gradient is None:
            return [*found, self.entropy]
        # Narrower gradients start where their row's logits did.
        return [*found, self.logits.view(gradient)[:, : self.classes]]

    def float32(self) -> list[Tensor]:
        """The same from the drawn logits, some rows at a time."""
        parts = [t.split(REFERENCE_ROWS) for t in (self.drawn(), self.target, self.dnll)]
        found = [self._float32(*part) for part in zip(*parts, strict=True)]
        return [torch.cat(column) for column in zip(*found, strict=True)]

    def _float32(self, logits: Tensor, target: Tensor, dnll: Tensor) -> list[Tensor]:
        z = logits.float()
        logp = z.log_softmax(1)
        p = logp.exp()
        found = [logp.gather(1, target)[:, 0], z.logsumexp(1)]
        if self.kind.gradient is None:
            return [*found, -(p * logp).sum(1)]
        p.scatter_add_(1, target, torch.full_like(dnll, -1.0))
        return [*found, p.mul_(dnll)]


def _build(kind: Kind, shape: Shape, device: torch.device, seed: int) -> Setup:
    chunk = Chunk(kind, shape, device, seed)
    return Setup(
        runs={
            OURS: chunk.ours,
            "float32": chunk.float32,
            "copy_floor": floors.copy(chunk.moved, device),
        },
        operand_bytes=chunk.logits.nbytes,
    )


def _needs(device: str) -> str | None:
    compiled = hasattr(OPERATORS, KERNEL) and has_cuda_kernel(KERNEL)
    return None if compiled else f"built without a CUDA kernel of {KERNEL}"


def _case(name: str, kind: Kind, rows: int, classes: int) -> Case:
    written = "no gradient" if kind.gradient is None else "gradients in bfloat16"
    return Case(
        f"head_rows/{name}_{classes}",
        KERNEL,
        {"rows": rows, "classes": classes},
        partial(_build, kind),
        {"rows": 300, "classes": 520},
        dtype=str(kind.logits).removeprefix("torch."),
        devices=("cuda",),
        peers=(floor("copy_floor"),),
        bars=(Bar("time/copy_floor", TIME_OVER_COPY),),
        reference="float32",
        tolerance=grid.TOLERANCE,
        needs=_needs,
        note=f"one chunk of logits, {written}; floor: a copy of the bytes that must move",
    )


GRADIENT = {
    "gradient_bf16": Kind(torch.bfloat16, torch.bfloat16),
    "gradient_fp32": Kind(torch.float32, torch.bfloat16),
}
STATISTICS = {
    "statistics_bf16": Kind(torch.bfloat16, None),
    "statistics_fp32": Kind(torch.float32, None),
}

# Rows whose logits take a GiB, as many as a chunk may; of 32000 classes as many as are useful.
CASES = (
    *(
        _case(name, kind, (2 if "bf16" in name else 1) * rows, classes)
        for classes, rows in ((128256, 2048), (256000, 1024), (32000, 2048))
        for name, kind in GRADIENT.items()
    ),
    *(
        _case(name, kind, (2 if "bf16" in name else 1) * 2048, 128256)
        for name, kind in STATISTICS.items()
    ),
)
