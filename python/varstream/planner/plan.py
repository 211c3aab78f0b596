"""``plan_memory``: the predicted peak of a training step by part, and the chunks that keep it
within a budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from varstream._checks import FLOATING, check_bool, check_device, check_int
from varstream.planner import memory
from varstream.planner.choose import STATES_OF, Choice, Job, choose, largest_length
from varstream.planner.devices import GPUS, Device, device_of, gpu_named, gpu_of_size
from varstream.planner.memory import Step
from varstream.planner.reasons import reason
from varstream.planner.report import MemoryPlan
from varstream.planner.shapes import (
    ALL_LINEAR,
    MODES,
    Mode,
    ModelShape,
    describe,
    describe_config,
)

_ORDER = (
    (memory.WEIGHTS, memory.STATES, memory.GRADIENTS, memory.INPUTS, memory.TABLES, memory.FLOW)
    + (memory.ROUTERS, memory.RETURNED)
    + (memory.KV, memory.DKV, memory.CHUNK, memory.TILES, memory.SUMS)
    + (memory.HIDDEN, memory.HEAD_DX, memory.HEAD_DW, memory.LOGITS, memory.HEAD_TEMPORARIES)
    + (memory.OPTIMIZER, memory.CONTEXT, memory.FRAGMENTATION)
)


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
    optimizer_dtype: torch.dtype | None = None,
    accumulate: bool = False,
    mode: str = "full",
    lora_rank: int = 16,
    lora_targets: str | Sequence[str] = ALL_LINEAR,
    trained: str | Sequence[str] = "lm_head",
    device: torch.device | str = "cpu",
    gpu: str | int | None = None,
) -> MemoryPlan:
    """Predict the peak memory of one training step of a streamed model, and choose its chunks.

    Nothing is run and nothing allocated. The budget is for the whole job: weights, gradients,
    optimizer states and everything that forward and backward allocate; Python, torch's own code
    and data loading are not in it. ``vs.stream(model, memory_budget=...)`` means the same.
    Gradients are taken to be None before the step (``zero_grad(set_to_none=True)``) unless
    ``accumulate``. Autocast is not counted, and on the CPU each of ``torch.get_num_threads()``
    threads has a block of attention scores.

    For a GPU the same moments are counted with the CUDA kernels' buffers, plus what is assumed of
    the driver, cuBLAS and the allocator; such a plan says that it is not yet measured.

    Args:
        config_or_model: a Hugging Face config or causal language model that ``vs.stream``
            understands, streamed or not, with adapters or not. Of a model what ``requires_grad``
            says is trained; of a config what ``mode`` says.
        tokens: real tokens of the step, all documents together, at least 1.
        budget_bytes: bytes that the whole job may take, or None for no bound but ``gpu``'s.
        longest: tokens of the longest document; default: ``tokens``, one document.
        chunk_size: rows of a layer chunk, or ``"auto"``: without a budget 1024 on the CPU (up to
            4096 where that costs little) and 4096 on a GPU, more where the roofline knee is higher;
            with a budget the largest that fits, down to 128. A chunk below the knee is said to be
            in ``reason`` and ``below_knee``.
        head_chunk_size: rows of a chunk of logits, or ``"auto"``: the head's own rule, with a
            budget down to 64.
        dtype: of weights and activations; default: the model's or the config's (if it has none
            float32, on a GPU bfloat16).
        optimizer: ``"adamw"`` keeps two states a trained parameter, ``"sgd"`` (no momentum) and
            ``"none"`` keep none.
        optimizer_dtype: of the states; default: each parameter's own.
        accumulate: gradients of an earlier backward are kept and added to.
        mode: ``"full"``; ``"lora"``: the model is frozen and has float32 adapters; ``"frozen"``:
            only ``trained`` is trained.
        lora_rank: of the adapters.
        lora_targets: names, or ends of names, of the linear layers that get one, or
            ``"all-linear"``: all but the head.
        trained: names, or parts of names, of the parameters trained in mode ``"frozen"``.
        device: ``"cpu"`` or ``"cuda"``: the GPU that is there, else an H100.
        gpu: a GPU's name, such as ``"a100"``, or the bytes of one without a name, in place of
            ``device``. Its memory is the budget where none is given.

    Returns:
        The plan; one that doesn't fit says so in ``fits`` and ``reason``.

    Raises:
        TypeError, ValueError: an argument breaks its contract.
        UnsupportedModelError: a ValueError naming the part of the model that isn't understood.

    Source: the allocations of ``varstream.streaming``, traced on the meta device, and of
    ``varstream.reference``, moment by moment.
    """
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
    check_optimizer_dtype(optimizer_dtype)
    of_config = _mode(config_or_model, mode, lora_rank, lora_targets, trained)
    target = _device(device, gpu)
    if budget_bytes is None and gpu is not None:
        budget_bytes = target.memory
    step = Step(tokens, longest, torch.get_num_threads(), accumulate, 0, target)
    default = torch.bfloat16 if target.cuda else torch.float32
    shape = _shape(config_or_model, dtype, of_config, default)
    state = None if optimizer_dtype is None else optimizer_dtype.itemsize
    job = Job(shape, step, optimizer, chunk_size, head_chunk_size, budget_bytes, state)
    return make_plan(job, "model" if isinstance(config_or_model, nn.Module) else mode)


def make_plan(job: Job, mode: str = "full") -> MemoryPlan:
    """``plan_memory`` after its checks."""
    choice, device = choose(job), job.step.device
    resident = job.resident
    before = sum(resident.values())
    moments = [*choice.moments, choice.optimizer]
    peak = max(moments, key=lambda moment: moment.total)
    both = {name: resident.get(name, 0) + peak.parts.get(name, 0) for name in _ORDER}
    longest = None if job.budget is None else largest_length(job)
    totals: dict[str, int] = {}
    for moment in moments:
        totals[moment.name] = max(totals.get(moment.name, 0), before + moment.total)
    return MemoryPlan(
        parts={name: size for name, size in both.items() if size},
        peak_bytes=before + peak.total,
        step_bytes=max(moment.total for moment in choice.moments),
        moment=peak.name,
        moments=totals,
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
        reason=reason(job, choice, before + peak.total, longest),
        mode=mode,
        device=device.name,
        knee=choice.knee,
        below_knee=choice.below_knee,
        measured=not device.cuda,
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


def check_optimizer_dtype(dtype: Any) -> None:
    """Refuse a dtype that no optimizer state has."""
    if dtype is not None and dtype not in FLOATING:
        raise ValueError(f"optimizer_dtype must be a floating torch.dtype, got {dtype!r}")


def _mode(given: Any, mode: str, rank: int, targets: Any, trained: Any) -> Mode:
    """The checked mode of a config; a model's parameters say themselves what is trained."""
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if isinstance(given, nn.Module) and mode != "full":
        raise ValueError(
            f"mode must be left out for a model, got {mode!r}: what its parameters' requires_grad "
            "and adapters say is planned; mode is for configs"
        )
    check_int("lora_rank", rank, low=1)
    names = _names("lora_targets", targets)
    return Mode(
        mode, rank, ALL_LINEAR if names == [ALL_LINEAR] else names, parts=_names("trained", trained)
    )


def _names(argument: str, value: Any) -> list[str]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(n, str) and n for n in names):
        raise TypeError(f"{argument} must be a name or a list of names, got {value!r}")
    if not names:
        raise ValueError(f"{argument} must name something, got {value!r}")
    return list(names)


def _shape(given: Any, dtype: torch.dtype | None, mode: Mode, default: torch.dtype) -> ModelShape:
    if isinstance(given, nn.Module):
        shape = describe(given)
        if dtype is not None and str(dtype).removeprefix("torch.") != shape.dtype:
            raise ValueError(f"dtype must be the model's {shape.dtype} or None, got {dtype}")
        return shape
    if not hasattr(given, "model_type"):
        raise TypeError(
            f"config_or_model must be a Hugging Face config or model, got {type(given).__name__}"
        )
    return describe_config(given, dtype or getattr(given, "dtype", None) or default, mode)


def _device(device: Any, gpu: Any) -> Device:
    if gpu is None:
        return device_of(check_device("device", device))
    if isinstance(gpu, int):
        return gpu_of_size(check_int("gpu", gpu, low=1))
    found = gpu_named(gpu) if isinstance(gpu, str) else None
    if found is None:
        known = ", ".join(GPUS)
        raise ValueError(f"gpu must be a number of bytes or one of {known}, got {gpu!r}")
    return found
