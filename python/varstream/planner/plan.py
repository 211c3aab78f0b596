"""``plan_memory``: the predicted peak of a training step by part, and the chunks that keep it
within a budget."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from varstream._checks import FLOATING, check_bool, check_device, check_int
from varstream.planner import memory
from varstream.planner.choose import (
    CPU_CHUNK,
    SMALL_PART,
    STATES_OF,
    Choice,
    Job,
    choose,
    largest_length,
)
from varstream.planner.memory import Step
from varstream.planner.shapes import ModelShape, describe, describe_config

_ORDER = (
    (memory.WEIGHTS, memory.STATES, memory.GRADIENTS, memory.INPUTS, memory.TABLES, memory.FLOW)
    + (memory.RETURNED,)
    + (memory.KV, memory.DKV, memory.CHUNK, memory.TILES, memory.SUMS, memory.FOUND)
    + (memory.HIDDEN, memory.HEAD_DX, memory.HEAD_DW, memory.LOGITS, memory.HEAD_TEMPORARIES)
    + (memory.OPTIMIZER,)
)


@dataclass(frozen=True)
class MemoryPlan:
    """A training step's predicted memory on the CPU and the chunks it was predicted for.

    Attributes:
        parts: bytes of each part at the moment of the peak; they add up to ``peak_bytes``.
        peak_bytes: of the whole job: weights, gradients, optimizer states and the step.
        step_bytes: what forward and backward allocate at most on top of what existed before
            (gradients they leave included): what ``varstream.testing.peak_memory`` measures.
        moment: when the peak is reached.
        moments: every moment looked at and the whole job's bytes then.
        chunk_size: rows of a layer chunk.
        head_chunk_size: rows of a chunk of logits.
        tokens, longest: real tokens of the step and of its longest document.
        positions: the config's ``max_position_embeddings``. Memory knows no such bound, so a plan
            may pass it; what is printed says so.
        dtype: of weights and activations.
        optimizer: ``"adamw"``, ``"sgd"`` or ``"none"``.
        budget_bytes: the whole job's bound, or None.
        max_tokens: the most tokens that fit the budget with any chunks the caller left open; None
            without a budget.
        fits: whether ``peak_bytes`` is within the budget; True without one.
        reason: why these chunks, or why it can't fit and what to change.
    """

    parts: dict[str, int]
    peak_bytes: int
    step_bytes: int
    moment: str
    moments: dict[str, int]
    chunk_size: int
    head_chunk_size: int
    tokens: int
    longest: int
    positions: int
    dtype: str
    optimizer: str
    budget_bytes: int | None
    max_tokens: int | None
    fits: bool
    reason: str

    def as_json(self) -> dict[str, Any]:
        """Plain data; ``MemoryPlan(**data)`` is this plan again."""
        return asdict(self)

    def __str__(self) -> str:
        rows = [(name, size, size / self.peak_bytes) for name, size in self.parts.items()]
        width = max(len(name) for name in self.parts)
        lines = [f"{self.title}: {size_words(self.peak_bytes)} at the {self.moment}"]
        lines += [
            f"  {name:<{width}}  {size_words(size):>10}  {share:4.0%}" for name, size, share in rows
        ]
        return "\n".join([*lines, *(f"{name}: {value}" for name, value in self.summary())])

    @property
    def title(self) -> str:
        """Tokens and dtype in words."""
        documents = "one document" if self.longest == self.tokens else f"longest {self.longest:,}"
        return f"{self.tokens:,} tokens ({documents}), {self.dtype}, {self.optimizer}"

    def summary(self) -> list[tuple[str, str]]:
        """What is shown below the parts."""
        lines = [
            ("step alone", size_words(self.step_bytes)),
            ("chunk size", f"{self.chunk_size:,} rows"),
            ("head chunk size", f"{self.head_chunk_size:,} rows"),
        ]
        if self.budget_bytes is not None:
            words = "fits" if self.fits else "does not fit"
            lines.append(("budget", f"{size_words(self.budget_bytes)}, {words}"))
            lines.append(("largest length", f"{self.max_tokens:,} tokens{self._by_memory()}"))
        if self.longest > self.positions:
            passed = f"the longest document passes the model's {self.positions:,}"
            lines.append(("positions", passed))
        return [*lines, ("reason", self.reason)]

    def _by_memory(self) -> str:
        """What to add to ``max_tokens`` where it, as one document, passes the positions."""
        one = self.longest == self.tokens
        if not one or self.max_tokens is None or self.max_tokens <= self.positions:
            return ""
        return f" by memory; the model has {self.positions:,} positions"

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table(title=self.title, title_justify="left", show_footer=True)
        table.add_column(f"at the {self.moment}", footer="peak")
        table.add_column("memory", justify="right", footer=size_words(self.peak_bytes))
        table.add_column("share", justify="right", footer="100%")
        for name, size in self.parts.items():
            table.add_row(name, size_words(size), f"{size / self.peak_bytes:.0%}")
        return table


def plan_memory(
    config_or_model: Any,
    tokens: int,
    budget_bytes: int | None = None,
    *,
    longest: int | None = None,
    chunk_size: int | str = "auto",
    head_chunk_size: int | str = "auto",
    dtype: torch.dtype | None = None,
    optimizer: str = "adamw",
    accumulate: bool = False,
    device: torch.device | str = "cpu",
) -> MemoryPlan:
    """Predict the peak memory of one training step of a streamed model, and choose its chunks.

    Nothing is run and nothing allocated. The budget is for the whole job: weights, gradients,
    optimizer states and everything that forward and backward allocate; Python, torch's own code
    and data loading are not in it. ``vs.stream(model, memory_budget=...)`` means the same.
    Gradients are taken to be None before the step (``zero_grad(set_to_none=True)``) unless
    ``accumulate``. The prediction is made for the CPU, without autocast, and for
    ``torch.get_num_threads()`` threads, each of which has a block of attention scores.

    Args:
        config_or_model: a Hugging Face config or causal language model that ``vs.stream``
            understands, streamed or not. A model's frozen parameters get no gradients; of a config
            everything is trained.
        tokens: real tokens of the step, all documents together, at least 1.
        budget_bytes: bytes that the whole job may take, or None for no bound.
        longest: tokens of the longest document; default: ``tokens``, one document.
        chunk_size: rows of a layer chunk, or ``"auto"``: without a budget 1024, up to 4096 where
            that costs little; with one the largest that fits, down to 128.
        head_chunk_size: rows of a chunk of logits, or ``"auto"``: the head's own rule, with a
            budget down to 64.
        dtype: of weights and activations; default: the config's (float32 if it has none) or the
            model's.
        optimizer: ``"adamw"`` keeps two states a trained parameter, ``"sgd"`` (no momentum) and
            ``"none"`` keep none.
        accumulate: gradients of an earlier backward are kept and added to.
        device: only ``"cpu"`` in this version.

    Returns:
        The plan; one that doesn't fit says so in ``fits`` and ``reason``.

    Raises:
        TypeError, ValueError: an argument breaks its contract.
        UnsupportedModelError: a ValueError naming the part of the model that isn't understood.

    Source: the allocations of ``varstream.streaming`` and ``varstream.reference``, moment by
    moment; CPU peaks are as predicted to 6 % on the tested shapes, lower with few labels, tiny
    chunks or partly trained layers; nothing is measured on CUDA.
    """
    if check_device("device", device).type != "cpu":
        raise ValueError(
            f'device must be "cpu", got {str(device)!r}: this version predicts CPU memory only'
        )
    check_int("tokens", tokens, low=1)
    if longest is None:
        longest = tokens
    if check_int("longest", longest, low=1) > tokens:
        raise ValueError(f"longest must be at most tokens ({tokens}), got {longest}")
    if budget_bytes is not None:
        check_int("budget_bytes", budget_bytes, low=1)
    check_chunk("chunk_size", chunk_size)
    check_chunk("head_chunk_size", head_chunk_size)
    check_optimizer(optimizer)
    if dtype is not None and dtype not in FLOATING:
        raise ValueError(f"dtype must be a floating torch.dtype, got {dtype!r}")
    check_bool("accumulate", accumulate)
    step = Step(tokens, longest, torch.get_num_threads(), accumulate)
    shape = _shape(config_or_model, dtype)
    return make_plan(Job(shape, step, optimizer, chunk_size, head_chunk_size, budget_bytes))


def make_plan(job: Job) -> MemoryPlan:
    """``plan_memory`` after its checks."""
    choice = choose(job)
    resident = job.resident
    before = sum(resident.values())
    moments = [*choice.moments, choice.optimizer]
    peak = max(moments, key=lambda moment: moment.total)
    both = {name: resident.get(name, 0) + peak.parts.get(name, 0) for name in _ORDER}
    longest = None if job.budget is None else largest_length(job)
    return MemoryPlan(
        parts={name: size for name, size in both.items() if size},
        peak_bytes=before + peak.total,
        step_bytes=max(moment.total for moment in choice.moments),
        moment=peak.name,
        moments={moment.name: before + moment.total for moment in moments},
        chunk_size=choice.chunk,
        head_chunk_size=choice.head_chunk,
        tokens=job.step.tokens,
        longest=job.step.longest,
        positions=job.shape.max_length,
        dtype=job.shape.dtype,
        optimizer=job.optimizer,
        budget_bytes=job.budget,
        max_tokens=longest,
        fits=choice.fits,
        reason=_reason(job, choice, before + peak.total, longest),
    )


def require_fit(job: Job) -> Choice:
    """The chunks of a job that must fit its budget.

    Raises:
        ValueError: it doesn't, even with the smallest chunks that were left open.
    """
    choice = choose(job)
    if not choice.fits:
        raise ValueError(f"memory_budget is too small: {make_plan(job).reason}")
    return choice


def size_words(size: int) -> str:
    """Bytes for people: binary units, three digits."""
    value, unit = float(size), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:,.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.3g} {unit}"


# --- checks ---------------------------------------------------------------------------------------


def check_chunk(name: str, value: Any) -> None:
    """Refuse what is neither ``"auto"`` nor a number of rows."""
    if isinstance(value, bool) or not (isinstance(value, int) or value == "auto"):
        raise TypeError(f'{name} must be an int or "auto", got {value!r}')
    if value != "auto" and value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_optimizer(optimizer: Any) -> None:
    """Refuse an optimizer whose states aren't known."""
    if optimizer not in tuple(STATES_OF):
        raise ValueError(f"optimizer must be one of {', '.join(STATES_OF)}, got {optimizer!r}")


def _shape(given: Any, dtype: torch.dtype | None) -> ModelShape:
    if isinstance(given, nn.Module):
        shape = describe(given)
        if dtype is not None and str(dtype).removeprefix("torch.") != shape.dtype:
            raise ValueError(f"dtype must be the model's {shape.dtype} or None, got {dtype}")
        return shape
    if not hasattr(given, "model_type"):
        raise TypeError(
            f"config_or_model must be a Hugging Face config or model, got {type(given).__name__}"
        )
    return describe_config(given, dtype)


# --- reasons --------------------------------------------------------------------------------------


def _reason(job: Job, choice: Choice, peak: int, longest: int | None) -> str:
    if not choice.fits:
        assert longest is not None and job.budget is not None
        return _why_not(job, choice, peak, longest)
    if choice.default_chunk == 0:
        words = f"Chunks of {choice.chunk:,} rows as asked"
    elif choice.chunk != choice.default_chunk:
        size = "smaller" if choice.chunk < choice.default_chunk else "larger"
        words = (
            f"The default chunks of {choice.default_chunk:,} rows would pass the budget; "
            f"{choice.chunk:,} are the next {size} that fit"
        )
    elif choice.chunk > CPU_CHUNK:
        words = (
            f"Chunks of {choice.chunk:,} rows cost little here: their activations are at most "
            f"1/{SMALL_PART} of a layer's backward, or the head's peak is the higher one"
        )
    else:
        words = f"Chunks of {choice.chunk:,} rows are the default"
    return words + "."


def _why_not(job: Job, choice: Choice, peak: int, longest: int) -> str:
    budget = size_words(job.budget or 0)
    resident = job.resident
    before = sum(resident.values())
    need = f"{job.step.tokens:,} tokens need {size_words(peak)} of {budget}"
    if longest > 0:
        smaller = (
            "the smallest chunks"
            if "auto" == job.chunk_size == job.head_chunk_size
            else f"chunks of {choice.chunk:,} and {choice.head_chunk:,} rows"
        )
        return (
            f"{need} with {smaller} ({size_words(before)} before the step begins); "
            f"pass at most {longest:,} tokens a step or a larger budget."
        )
    least = _least(job)
    return (
        f"{need} and even one token needs {size_words(least)} "
        f"({size_words(resident['weights'])} weights, "
        f"{size_words(job.shape.trained * job.shape.itemsize)} gradients, "
        f"{size_words(resident['optimizer states'])} optimizer states); "
        "use a larger budget, a smaller dtype, fewer trained parameters or another optimizer."
    )


def _least(job: Job) -> int:
    """Bytes of the same job with one token and the smallest chunks."""
    choice = choose(job.at(1))
    moments = [*choice.moments, choice.optimizer]
    return sum(job.resident.values()) + max(moment.total for moment in moments)
