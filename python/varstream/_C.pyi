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

# The query tiles of a packed batch in the order attention takes them, a row each: sequence (batch:
# the rows after the last one), tile of the sequence, first and last row, key begin and end, cost in
# key tiles. Rows and keys count from the sequence's start; a query makes rows_per_query rows.
# cu_seqlens (batch + 1,), seqused_k (batch,) or None; left, right: the window, -1 for no bound.
def tile_schedule(
    cu_seqlens_q: NDArray[np.int32],
    cu_seqlens_k: NDArray[np.int32],
    seqused_k: NDArray[np.int32] | None,
    total_q: int,
    total_k: int,
    left: int,
    right: int,
    rows_per_query: int,
    tile_rows: int,
    tile_keys: int,
) -> NDArray[np.int32]: ...  # (tiles, 7)
