"""``varstream plan``: will this model's training step fit, with which chunks, up to what length?"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from typing import Any

import torch
import typer
from rich.console import Console

from varstream.cli.config import WHERE, read_config
from varstream.cli.errors import UserError
from varstream.planner.choose import STATES_OF
from varstream.planner.devices import GPUS, gpu_named
from varstream.planner.plan import MemoryPlan, plan_memory
from varstream.planner.shapes import ALL_LINEAR, ITEMSIZE, MODES

_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS |= {f"{_letter}b": 1000**_power, f"{_letter}ib": 1024**_power, _letter: 1024**_power}
_BUDGET = re.compile(r"((?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*([a-z]*)", re.IGNORECASE | re.ASCII)
_ROWS = re.compile(r"0*[1-9]\d{0,17}", re.ASCII)  # an int64, like every number of rows

app = typer.Typer(add_completion=False)


@app.command("plan")
def command(
    config: str = typer.Argument(metavar="CONFIG", help=WHERE),
    tokens: int = typer.Option(
        None, min=1, help="Real tokens of a step.", show_default="the config's longest input"
    ),
    budget: str = typer.Option(
        None, help="Memory of the whole job, such as 16GiB, 16GB or a number of bytes; 16G is GiB."
    ),
    longest: int = typer.Option(
        None, min=1, help="Tokens of the longest document.", show_default="all, one document"
    ),
    dtype: str = typer.Option(
        None, help=f"{', '.join(ITEMSIZE)}.", show_default="the config's, else float32"
    ),
    optimizer: str = typer.Option("adamw", help=f"{', '.join(STATES_OF)}."),
    chunk_size: str = typer.Option("auto", help="Rows of a layer chunk."),
    head_chunk_size: str = typer.Option("auto", help="Rows of a chunk of logits."),
    optimizer_dtype: str = typer.Option(
        None, help="Of the optimizer's states.", show_default="each parameter's"
    ),
    mode: str = typer.Option(
        "full", help="full; lora: adapters on a frozen model; frozen: only --trained."
    ),
    lora_rank: int = typer.Option(16, min=1, help="Rank of the adapters."),
    lora_targets: str = typer.Option(
        ALL_LINEAR, help="Linear layers with adapters, by ends of names, such as q_proj,v_proj."
    ),
    trained: str = typer.Option(
        "lm_head", help="What --mode frozen trains, by parts of names, such as lm_head,norm."
    ),
    device: str = typer.Option("cpu", help="cpu or cuda."),
    gpu: str = typer.Option(
        None, help=f"A GPU in place of --device: its memory, such as 80GB, or {', '.join(GPUS)}."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print plain JSON instead of a table."),
) -> None:
    """Predict a training step's peak memory and choose chunks for a budget.

    The budget counts weights, gradients, optimizer states and what forward and backward allocate,
    as vs.stream(memory_budget=...) does; with --gpu it is that GPU's memory where none is given.
    """
    _one_of("dtype", dtype, ITEMSIZE)
    _one_of("optimizer-dtype", optimizer_dtype, ITEMSIZE)
    _one_of("optimizer", optimizer, STATES_OF)
    _one_of("mode", mode, MODES)
    _one_of("device", device, ("cpu", "cuda"))
    bound = None if budget is None else parse_budget(budget)
    on_gpu = None if gpu is None else parse_gpu(gpu)
    chunks = {"chunk_size": chunk_size, "head_chunk_size": head_chunk_size}
    options = {name: _rows(name, value) for name, value in chunks.items()}
    ours = read_config(config)
    if tokens is None:
        tokens = ours.max_position_embeddings
    if longest is not None and longest > tokens:
        raise UserError(f"--longest {longest} passes the {tokens} tokens; raise --tokens")
    try:
        plan = plan_memory(
            ours,
            tokens,
            bound,
            longest=longest,
            dtype=None if dtype is None else getattr(torch, dtype),
            optimizer=optimizer,
            optimizer_dtype=None if optimizer_dtype is None else getattr(torch, optimizer_dtype),
            mode=mode,
            lora_rank=lora_rank,
            lora_targets=_names(lora_targets),
            trained=_names(trained),
            device=device,
            gpu=on_gpu,
            **options,
        )
    except ValueError as error:
        raise UserError(f"{config}: {error}; mend it") from error
    if plan.max_tokens == 0:
        given = f"--gpu {gpu}" if budget is None else f"--budget {budget}"
        raise UserError(f"{given} is too small: {plan.reason}")
    if as_json:
        print(json.dumps(plan.as_json(), indent=2))
    else:
        show(plan)


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _one_of(option: str, value: str | None, known: Iterable[str]) -> None:
    if value is not None and value not in known:
        names = ", ".join(known)
        raise UserError(f"--{option} must be one of {names}, got {value!r}; choose one")


def parse_gpu(text: str) -> str | int:
    """A GPU's name, or the bytes of a size such as ``80GB``.

    Raises:
        UserError: it is neither.
    """
    if gpu_named(text) is not None:
        return text
    match = _BUDGET.fullmatch(text.strip())
    if match is None or match[2].lower() not in _UNITS:
        names = ", ".join(GPUS)
        raise UserError(
            f"--gpu must be a size such as 80GB or one of {names}, got {text!r}; choose one"
        )
    return parse_budget(text)


def parse_budget(text: str) -> int:
    """Bytes of ``16GiB``, ``16 GB``, ``16G`` (GiB), ``1.5e9``.

    Raises:
        UserError: it is no such size, or below one byte.
    """
    match = _BUDGET.fullmatch(text.strip())
    if match is None or match[2].lower() not in _UNITS:
        raise UserError(f"--budget must be a size such as 16GiB or 800MB, got {text!r}; write one")
    size = float(match[1]) * _UNITS[match[2].lower()]
    if not math.isfinite(size):
        raise UserError(f"--budget must be finite, got {text!r}; write a smaller one")
    if size < 1:
        raise UserError(f"--budget must be at least one byte, got {text!r}; write a larger one")
    return int(size)


def _rows(name: str, value: str) -> Any:
    if value == "auto":
        return value
    if not _ROWS.fullmatch(value):
        option = name.replace("_", "-")
        raise UserError(f"--{option} must be auto or at least 1, got {value[:20]!r}; write one")
    return int(value)


def show(plan: MemoryPlan) -> None:
    """Print the table and what follows from it."""
    console = Console(soft_wrap=True)
    console.print(plan)
    for name, value in plan.summary():
        console.print(f"{name}: {value}", highlight=False, markup=False)
