"""Which chunks: the largest that a budget allows, up to a default; and the largest length."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from varstream.planner.head_memory import automatic_chunk
from varstream.planner.knee import knee, words_below
from varstream.planner.memory import (
    CHUNK,
    CONTEXT,
    FRAGMENTATION,
    GRADIENTS,
    STATES,
    TILES,
    WEIGHTS,
    Moment,
    Step,
    head_moments,
    last_moments,
    layer_moments,
    optimizer_moment,
)
from varstream.planner.shapes import ModelShape
from varstream.reference.head import MIN_CHUNK_ROWS

CPU_CHUNK = 1024  # rows that keep the matrix products near full speed
CUDA_CHUNK = 4096
LARGEST_CHUNK, SMALLEST_CHUNK = 4096, 128
SMALL_PART = 8  # a wider chunk's activations are at most one part in so many of the others
STATES_OF = {"adamw": 2, "sgd": 0, "none": 0}  # tensors a parameter
# Assumed of a GPU: what the driver and torch's kernels take, cuBLAS's workspaces (two handles), and
# the part of a step's memory that its allocator holds beyond what is allocated.
CUDA_CONTEXT, CUBLAS_WORKSPACE, FRAGMENTED = 600 << 20, 2 * (32 << 20), 1 / 16
_NO_END = 1 << 40


@dataclass(frozen=True)
class Job:
    """Everything that is given: the model, the step, what else takes memory, wishes and budget."""

    shape: ModelShape
    step: Step
    optimizer: str
    chunk_size: int | str
    head_chunk_size: int | str
    budget: int | None
    state_itemsize: int | None = None  # bytes of an optimizer state's element; None: the weight's

    @property
    def resident(self) -> dict[str, int]:
        """What exists before a step begins: weights, optimizer states, kept gradients."""
        m, size = self.shape, self.state_itemsize
        states = m.trained.bytes if size is None else m.trained.elements * size
        cuda = CUDA_CONTEXT + CUBLAS_WORKSPACE if self.step.device.cuda else 0
        return {
            WEIGHTS: m.weights.bytes,
            STATES: STATES_OF[self.optimizer] * states,
            GRADIENTS: m.trained.bytes if self.step.accumulate else 0,
            CONTEXT: cuda,
        }

    @property
    def room(self) -> int | None:
        """What the budget leaves for a step."""
        return None if self.budget is None else self.budget - sum(self.resident.values())

    def at(self, tokens: int) -> Job:
        """The same job with another number of tokens; one document stays one document."""
        single = self.step.longest == self.step.tokens
        longest = tokens if single else min(tokens, self.step.longest)
        return replace(self, step=replace(self.step, tokens=tokens, longest=longest))


@dataclass(frozen=True)
class Choice:
    """Chosen chunks and the moments of a step with them; the last is the optimizer's."""

    chunk: int
    head_chunk: int
    default_chunk: int
    moments: list[Moment]
    optimizer: Moment
    fits: bool
    knee: int  # rows
    below_knee: str  # what to warn of; "" for nothing


def choose(job: Job) -> Choice:
    """The default chunks where they fit, else the next smaller ones that do, else the smallest.

    Layers and head peak at different moments, so each chunk is chosen by itself.
    """
    m, step, room = job.shape, job.step, job.room
    default = 0
    rows = knee_of(m, step)
    if isinstance(job.chunk_size, int):
        chunks = [job.chunk_size]
    else:
        default = default_chunk(m, step)
        chunks = _by_preference(default, max(default, LARGEST_CHUNK), SMALLEST_CHUNK)
    if isinstance(job.head_chunk_size, int):
        head_chunks = [job.head_chunk_size]
    else:
        automatic = automatic_chunk(m, step.device)
        head_chunks = _by_preference(automatic, automatic, min(automatic, MIN_CHUNK_ROWS))
    chunk, layers = _first_fitting(chunks, lambda c: _held(layer_moments(m, step, c), step), room)
    head_chunk, head = _first_fitting(
        head_chunks, lambda c: _held(head_moments(m, step, c, chunk), step), room
    )
    moments = [*layers, *head, *_held(last_moments(m, step, chunk), step)]
    last = _optimizer(job)
    fits = room is None or max(moment.total for moment in [*moments, last]) <= room
    words = words_below(chunk, rows, step.tokens, step.device)
    return Choice(chunk, head_chunk, default, moments, last, fits, rows, words)


def knee_of(m: ModelShape, step: Step) -> int:
    """Rows below which a chunk of the model leaves the device waiting for memory."""
    heads = 1 if m.attention is None else m.attention.heads
    kinds = {layer.products for layer in m.layers}
    return max((knee(products, heads, step.device) for products in kinds), default=1)


def default_chunk(m: ModelShape, step: Step) -> int:
    """Rows of a chunk without a budget: 1024 on the CPU and 4096 on a GPU, or the knee where that
    is more; on the CPU up to 4096 where more rows cost little.

    They cost little where the layers stay below the head's peak, or where a chunk's activations
    are a small part of what a layer's backward holds anyway.
    """
    chunk = CUDA_CHUNK if step.device.cuda else CPU_CHUNK
    while chunk < knee_of(m, step):
        chunk *= 2
    if step.device.cuda:
        return chunk
    head = head_moments(m, step, automatic_chunk(m, step.device), chunk)
    last = last_moments(m, step, chunk)
    elsewhere = max((moment.total for moment in [*head, *last]), default=0)
    while chunk < min(LARGEST_CHUNK, step.tokens):
        peak = _peak(layer_moments(m, step, 2 * chunk))
        activations = peak.parts.get(CHUNK, 0) + peak.parts.get(TILES, 0)
        if peak.total > elsewhere and activations * SMALL_PART > peak.total - activations:
            break
        chunk *= 2
    return chunk


def largest_length(job: Job) -> int:
    """The most tokens that fit the budget with any chunks, 0 if not even one does.

    Every chunk's peak grows with the tokens, so what fits is an interval.
    """
    fitting, failing = 0, 1
    while failing < _NO_END and choose(job.at(failing)).fits:
        fitting, failing = failing, 2 * failing
    while failing - fitting > 1:
        middle = (fitting + failing) // 2
        if choose(job.at(middle)).fits:
            fitting = middle
        else:
            failing = middle
    return fitting


def _optimizer(job: Job) -> Moment:
    last = optimizer_moment(job.shape, job.optimizer, job.state_itemsize)
    if job.step.accumulate:  # resident then
        last.parts.pop(GRADIENTS)
    return _held([last], job.step)[0]


def _held(moments: list[Moment], step: Step) -> list[Moment]:
    """With what a GPU's allocator holds beyond what is allocated."""
    if not step.device.cuda:
        return moments
    return [
        Moment(name, parts | {FRAGMENTATION: int(sum(parts.values()) * FRAGMENTED)})
        for name, parts in moments
    ]


def _by_preference(default: int, largest: int, smallest: int) -> list[int]:
    """The default, then halves of it, then, as a last resort, its doubles: a single chunk sums no
    parameter gradients, which can save more than smaller chunks do."""
    sizes, size = [default], default
    while size > smallest:
        size = max(smallest, size // 2)
        sizes.append(size)
    while 2 * default <= largest:
        default *= 2
        sizes.append(default)
    return sizes


def _first_fitting(
    sizes: Iterable[int], moments_of: Callable[[int], list[Moment]], room: int | None
) -> tuple[int, list[Moment]]:
    """The first size whose moments fit the room; the one with the lowest peak if none does."""
    best: tuple[int, list[Moment]] | None = None
    for size in sizes:
        moments = moments_of(size)
        if room is None or not moments or _peak(moments).total <= room:
            return size, moments
        if best is None or _peak(moments).total < _peak(best[1]).total:
            best = size, moments
    assert best is not None
    return best


def _peak(moments: list[Moment]) -> Moment:
    return max(moments, key=lambda moment: moment.total)
