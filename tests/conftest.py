"""Shared fixtures: seeds, torch's global state, and leaving GPU tests out where there is no GPU."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from attention_cases import BACKENDS, MARKS
from emulation import emulated


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "emulated: runs kernels on the host's emulator")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests marked gpu on machines without a CUDA device; the summary says so."""
    if torch.cuda.is_available():
        return
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items:
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=gpu_items)
        config.stash[_LEFT_OUT] = len(gpu_items)


_LEFT_OUT = pytest.StashKey[int]()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Of several processes each tells the one that prints."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash.get(_LEFT_OUT, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    stash, output = node.config.stash, getattr(node, "workeroutput", {})  # none of one that crashed
    stash[_LEFT_OUT] = max(stash.get(_LEFT_OUT, 0), output.get("left_out", 0))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config
) -> None:
    left_out = config.stash.get(_LEFT_OUT, 0)
    if left_out:
        terminalreporter.write_line(f"{left_out} GPU tests left out: no CUDA device here")


@pytest.fixture(autouse=True)
def _fresh_state():
    """Same seeds for every test; torch's global switches are put back afterwards."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    deterministic = torch.are_deterministic_algorithms_enabled()
    grad = torch.is_grad_enabled()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors are tiny here; a test that wants threads asks for them
    yield
    torch.set_default_dtype(dtype)
    torch.set_default_device(None)
    torch.use_deterministic_algorithms(deterministic)
    torch.set_grad_enabled(grad)
    torch.set_num_threads(threads)


@pytest.fixture(params=[pytest.param(name, marks=marks) for name, marks in MARKS.items()])
def backend(request: pytest.FixtureRequest):
    """Where a test's attention runs: the CPU's kernels, emulated ones, a GPU's."""
    chosen = BACKENDS[request.param]
    if chosen.name != "emulated":
        yield chosen
        return
    with emulated():
        yield chosen
