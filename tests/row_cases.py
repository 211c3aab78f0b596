"""What the tests of the head's row kernels share: rows with poison around them, where the kernels
hold them, the bytes they move."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import emulation
import torch
from attention_cases import Backend
from torch import Tensor

WORD = 16  # bytes
LARGE_BYTES = 163 << 10  # shared memory of a block of sm_80
# Rows of this many words are held in every way; 17001 float32, 34002 of two bytes.
LONG_WORDS = 4251

# Shared memory of a block, blocks of a cluster: what makes a kernel hold a long row so.
RESIDENCIES = {
    "kept": (LARGE_BYTES, 1),
    "ring": (40 << 10, 1),
    "cluster2": (52 << 10, 2),
    "cluster4": (40 << 10, 4),
    "cluster8": (40 << 10, 8),
}
# The same for the distillation, which holds two rows.
PAIR_RESIDENCIES = {
    "kept": (LARGE_BYTES, 1),
    "ring": (80 << 10, 1),
    "cluster2": (100 << 10, 2),
    "cluster4": (80 << 10, 4),
    "cluster8": (80 << 10, 8),
}
SCHEDULES = ["warp-greedy", "round-robin", "3", "17"]


def long_classes(dtype: torch.dtype) -> int:
    """Classes of a long row, the last word not full."""
    return LONG_WORDS * WORD // dtype.itemsize - 3


@contextmanager
def device(backend: Backend, residency: tuple[int, int] = (LARGE_BYTES, 8)) -> Iterator[None]:
    """The emulated device has this shared memory and these clusters; a GPU what it has."""
    if backend.name != "emulated":
        yield
        return
    operators = emulation.load()
    operators.set_shared_limit(residency[0])
    operators.set_cluster_limit(residency[1])
    try:
        yield
    finally:
        operators.set_shared_limit(LARGE_BYTES)
        operators.set_cluster_limit(1)


@dataclass
class Rows:
    """``values`` (rows, classes) as the kernels take them, in a buffer with NaN around each row."""

    values: Tensor
    extra: int = 1  # words behind a row
    buffer: Tensor = field(init=False)

    def __post_init__(self) -> None:
        rows, classes = self.values.shape
        per_word = WORD // self.values.element_size()
        columns = (-(-classes // per_word) + self.extra) * per_word
        self.buffer = self.values.new_full((rows + 2, columns + per_word), torch.nan)
        self.padded[:, :classes] = self.values

    @property
    def padded(self) -> Tensor:
        """The rows (rows, classes and more) without the NaN above, below and at the end of each."""
        per_word = WORD // self.values.element_size()
        return self.buffer[1:-1, :-per_word]

    def gradient(self, dtype: torch.dtype) -> Tensor:
        """What a kernel left in the rows, of ``dtype`` from their starts."""
        return self.padded.view(dtype)[:, : self.values.shape[1]]

    def assert_poison_stays(self, used: int | None = None) -> None:
        """Nothing was written but to the words of the rows."""
        per_word = WORD // self.values.element_size()
        words = -(-self.values.shape[1] // per_word)
        end = words * per_word
        assert self.buffer[0].isnan().all() and self.buffer[-1].isnan().all()
        assert self.buffer[1:-1, end:].isnan().all()


def operator(backend: Backend, name: str) -> Any:
    """A row kernel's operator."""
    library = "varstream_emulated" if backend.name == "emulated" else "varstream"
    return getattr(getattr(torch.ops, library), name)


SOFTMAX_INPUTS = ("bias", "class_weight", "dnll", "dsmooth", "dlse", "dentropy", "lse_sq_scale")
SOFTMAX_RESULTS = ("logp", "lse", "entropy", "class_sum", "log_sum_sq", "argmax")


def softmax_rows(
    backend: Backend,
    rows: Rows,
    target: Tensor,
    *,
    gradient: torch.dtype | None = None,
    count: int | None = None,
    first_row: int = 0,
    scaling: tuple[float, float, float] = (1.0, 0.0, 1.0),
    wanted: tuple[str, ...] = ("logp", "lse"),
    **inputs: Tensor | None,
) -> dict[str, Tensor]:
    """The kernel over ``rows``; results by name, "gradient" among them. They start as NaN."""
    assert set(inputs) <= set(SOFTMAX_INPUTS)
    number = rows.values.shape[0]
    found = {}
    for name in wanted:
        shape = target.shape if name == "logp" else (number,)
        made = torch.full(shape, -7) if name == "argmax" else torch.full(shape, torch.nan)
        found[name] = backend.here(made)
    rows.buffer = backend.here(rows.buffer)
    counted = None if count is None else backend.here(torch.tensor(count))
    operator(backend, "softmax_rows_")(
        rows.padded,
        rows.values.shape[1],
        first_row,
        counted,
        backend.here(target),
        *scaling,
        *(backend.here(inputs.get(name)) for name in SOFTMAX_INPUTS),
        gradient,
        *(found.get(name) for name in SOFTMAX_RESULTS),
        *[None] * 3,
    )
    rows.buffer = rows.buffer.cpu()
    found = {name: value.cpu() for name, value in found.items()}
    if gradient is not None:
        found["gradient"] = rows.gradient(gradient)
    rows.assert_poison_stays()
    return found


def bytes_of(call: Any) -> tuple[int, int]:
    """Bytes of global memory that the emulated kernels read and write during ``call``."""
    operators = emulation.load()
    operators.clear_instruction_counts()
    call()
    count = operators.instruction_count
    return count("global bytes read"), count("global bytes written")


def cluster_barriers() -> int:
    """Barriers of clusters since the counts were cleared."""
    found: int = emulation.load().instruction_count("cluster barrier")
    return found
