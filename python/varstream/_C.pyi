"""The compiled module (csrc/torch/module.cpp). Importing it registers ``torch.ops.varstream``."""

from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

class BuildInfo(TypedDict):
    version: str
    cuda: bool  # whether CUDA kernels were built
    cuda_reason: str  # which nvcc built them, or why there are none
    nvcc: str  # version, empty without
    cuda_archs: str  # CMake's spelling, separated by spaces
    cutlass: str  # version of the headers found, empty without
    torch: str  # version built against
    compiler: str
    kernels: list[str]  # names of the CUDA kernels in this module

def build_info() -> BuildInfo: ...
def cuda_symbols() -> dict[str, bool]: ...

# (lengths int64 (n,), capacity, max_depth) -> (order int64 (n,), offsets int64 (bins + 1,))
def best_fit_decreasing(
    lengths: NDArray[np.int64], capacity: int, max_depth: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]: ...
def first_fit_decreasing(
    lengths: NDArray[np.int64], capacity: int, max_depth: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]: ...
def next_fit(
    lengths: NDArray[np.int64], capacity: int, max_depth: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]: ...

# (costs float64 (n,), bins) -> bin int64 (n,)
def balance_lpt(costs: NDArray[np.float64], bins: int) -> NDArray[np.int64]: ...
def balance_karmarkar_karp(costs: NDArray[np.float64], bins: int) -> NDArray[np.int64]: ...
