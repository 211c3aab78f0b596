"""What a plan needs to know of a device: its memory, and how much arithmetic a byte must bring.

Peaks (dense bfloat16 with float32 sums), bandwidths and memory are the makers' published figures.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Device:
    """A kind of device that a step is planned for."""

    name: str
    peak: float  # operations a second of a matrix product
    bandwidth: float  # bytes a second
    processors: int = 1  # multiprocessors; of a CPU it doesn't matter
    memory: int = 0  # bytes; 0: not known
    cache: int = 0  # bytes of the last level
    cuda: bool = True

    @property
    def balance(self) -> float:
        """Operations for each byte moved at which both limits are met."""
        return self.peak / self.bandwidth


MB, GB = 10**6, 10**9

# Of a CPU only the ratio counts: a core of a server does 50-150 GFLOP/s in float32 and has about
# 5-10 GB/s of the memory's bandwidth to itself.
CPU = Device("cpu", 160e9, 10e9, cache=16 * MB, cuda=False)

_GPUS = (
    Device("h200", 989e12, 4.8e12, 132, 141 * GB, 50 * MB),
    Device("h100", 989e12, 3.35e12, 132, 80 * GB, 50 * MB),
    Device("h100-pcie", 756e12, 2.0e12, 114, 80 * GB, 50 * MB),
    Device("a100", 312e12, 2.039e12, 108, 80 * GB, 40 * MB),
    Device("a100-40gb", 312e12, 1.555e12, 108, 40 * GB, 40 * MB),
    Device("l40s", 362e12, 864e9, 142, 48 * GB, 96 * MB),
    Device("a6000", 155e12, 768e9, 84, 48 * GB, 6 * MB),
    Device("a10", 125e12, 600e9, 72, 24 * GB, 6 * MB),
    Device("4090", 165e12, 1008e9, 128, 24 * GB, 72 * MB),
    Device("3090", 71e12, 936e9, 82, 24 * GB, 6 * MB),
)
GPUS = {device.name: device for device in _GPUS}
DEFAULT_GPU = GPUS["h100"]
_WORDS = re.compile(r"nvidia|geforce|rtx|tesla|sxm\d?|hbm\d?e?|\b80gb\b|[^a-z0-9]")


def gpu_named(name: str) -> Device | None:
    """The device that a name such as ``"H100"``, ``"RTX 4090"`` or ``"NVIDIA A100-SXM4-40GB"``
    means; None where it means none of them."""
    words = _WORDS.sub("", name.lower())
    return next((d for d in _GPUS if _WORDS.sub("", d.name) == words), None)


def gpu_of_size(memory: int) -> Device:
    """An unnamed GPU with so many bytes, taken for the first of about that size, else an H100."""
    near = (d for d in _GPUS if abs(d.memory - memory) <= 0.1 * d.memory)
    like = next(near, DEFAULT_GPU)
    return replace(like, name=f"GPU taken for {like.name}", memory=memory)


def device_of(device: torch.device | str) -> Device:
    """The device a model lives on; a GPU that isn't listed is taken for an H100."""
    device = torch.device(device)
    if device.type != "cuda":
        return CPU
    if not torch.cuda.is_available():
        return DEFAULT_GPU
    return gpu_named(torch.cuda.get_device_name(device)) or DEFAULT_GPU
