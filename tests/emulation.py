"""The CUDA kernels on this machine's CPU: builds and loads the library of emulated kernels, and
puts them in the place of the composed ones."""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from varstream.ops import _linear_cross_entropy, _token_logprobs, attention, linear_distillation
from varstream.parallel import _kernels as sharded_head

ROOT = Path(__file__).resolve().parent.parent
SANITIZE = "VARSTREAM_EMULATED_SANITIZE"  # "1": the library built with sanitizers
SCHEDULE = "VARSTREAM_EMULATED_SCHEDULE"  # the schedule where a test names none
LOW = (torch.bfloat16, torch.float16)


def cuda_headers() -> Path | None:
    """Where cuda_bf16.h is: it compiles with a host compiler too."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).parent.parent, "/usr/local/cuda"]
    found = [Path(home) / "include" for home in homes if home]
    return next((p for p in found if (p / "cuda_bf16.h").is_file()), None)


def missing() -> str | None:
    """What this machine lacks to build emulated kernels."""
    if shutil.which("g++") is None:
        return "emulated kernels need g++"
    return None if cuda_headers() else "emulated kernels need CUDA's headers (CUDA_HOME)"


def skip_unless_buildable() -> None:
    reason = missing()
    if reason:
        pytest.skip(reason)


def tool(name: str) -> str:
    """A build tool: of this Python's environment, else of PATH."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    assert found, f"{name} is missing (requirements-dev.txt)"
    return found


def run(*command: str) -> None:
    """Run a build tool, not under the sanitizers that this process may have preloaded."""
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")


def build(sanitize: bool) -> Path:
    """The built library; builds only what has changed, and one process at a time."""
    folder = ROOT / "build" / ("emulated-sanitized" if sanitize else "emulated")
    folder.mkdir(parents=True, exist_ok=True)
    configure = [
        tool("cmake"),
        *("-S", str(ROOT / "tests/cpp"), "-B", str(folder), "-G", "Ninja"),
        f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
        "-DCMAKE_CXX_COMPILER=g++",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DCUDA_HEADERS={cuda_headers()}",
        f"-DSANITIZE={'ON' if sanitize else 'OFF'}",
    ]
    wanted = "\n".join([*configure, torch.__version__])
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stamp = folder / ".configured"
        if not stamp.is_file() or stamp.read_text() != wanted:
            run(configure[0], "--fresh", *configure[1:])
            stamp.write_text(wanted)
        run(configure[0], "--build", str(folder))
    return folder / "varstream_emulated.so"


@functools.cache
def library() -> Path | Exception:
    """The library this process uses, or why it could not be built: tried once."""
    try:
        return build(os.environ.get(SANITIZE) == "1")
    except Exception as error:
        return error


def load() -> Any:
    """Build and load the library where that has not been done; returns its operators."""
    skip_unless_buildable()
    path = library()
    if isinstance(path, Exception):
        raise path
    torch.ops.load_library(str(path))  # a second time does nothing
    return torch.ops.varstream_emulated


def choose_schedule(name: str | None = None) -> None:
    """Order of the emulated threads: "warp-greedy", "round-robin", or the seed of a random one."""
    name = name or os.environ.get(SCHEDULE, "warp-greedy")
    orders = {"warp-greedy": (0, 0), "round-robin": (1, 0)}
    order, seed = orders[name] if name in orders else (2, int(name))
    load().set_schedule(order, seed)


# Drivers that CUDA tensors go through, and the row kernels they call.
DRIVERS = {
    "linear_cross_entropy": _linear_cross_entropy.driver,
    "token_logprobs": _token_logprobs.driver,
    "token_logprobs_bwd": _token_logprobs.bwd_driver,
    "token_logprobs_bwd_accumulate": _token_logprobs.accumulate_driver,
    "linear_distillation": linear_distillation.driver,
}
ROW_KERNELS = ("softmax_rows_", "distillation_rows_")


def _emulated(name: str, composed: Callable[..., Any]) -> Callable[..., Any]:
    """The operator's emulated kernel for bfloat16 and float16, else its composed one."""

    def run(first: Tensor, *rest: Any) -> Any:
        kernel = getattr(torch.ops.varstream_emulated, name)
        return (kernel if first.dtype in LOW else composed)(first, *rest)

    return run


KERNELS = {
    "varlen_attention": attention._forward,
    "varlen_attention_bwd": attention._backward,
    "varlen_attention_bwd_accumulate": attention._backward_accumulate,
}


@contextmanager
def emulated(schedule: str | None = None) -> Iterator[Any]:
    """varlen_attention and its backward, of bfloat16 and float16 CPU tensors, run the emulated
    kernels inside; so does the head, of these and of float32, through the drivers that serve CUDA,
    and the head over several ranks.

    Other dtypes stay with the composed kernels. Yields the library's operators.
    """
    operators = load()
    choose_schedule(schedule)
    library = torch.library.Library("varstream", "IMPL")
    serve = sharded_head.serve
    try:
        sharded_head.serve = lambda device: device.type == "cpu"
        with warnings.catch_warnings():  # that a kernel is overridden is the point
            warnings.filterwarnings("ignore", message="(?s)Warning only once.*Overriding")
            for name, composed in KERNELS.items():
                library.impl(name, _emulated(name, composed), "CPU", allow_override=True)
            for name in ROW_KERNELS:
                library.impl(name, getattr(operators, name), "CPU")
            for name, driver in DRIVERS.items():
                library.impl(name, driver, "CPU", allow_override=True)
        yield operators
    finally:
        sharded_head.serve = serve
        library._destroy()
