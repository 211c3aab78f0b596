"""Named length lists and option sets that tests and benchmarks share."""

from __future__ import annotations

from itertools import accumulate

import torch

# Awkward lengths: empty, one, primes, a block edge and its neighbours, one huge among many tiny.
LENGTHS = {
    "none": [],
    "empty": [0],
    "one": [1],
    "primes": [2, 3, 5, 7, 11, 13, 17],
    "edges": [255, 256, 257],
    "holes": [0, 4, 0, 0, 9, 0],
    "one_huge_many_tiny": [700, *[1, 2, 3] * 6],
}

# (query lengths, key lengths) of calls whose queries stand against a longer or shorter prefix
LENGTH_PAIRS = {
    "prefix": ([5, 0, 1, 17, 300], [5, 3, 1, 40, 600]),
    "more_queries": ([7, 31, 0, 2], [3, 31, 4, 0]),
    "one_query": ([1, 1, 1], [1, 129, 513]),
    "block_edges": ([256, 257], [511, 513]),
}

# The same for kernels in tiles of 64 or 128 rows and keys: small, as they may be emulated.
TILE_LENGTHS = {
    "edges": [63, 64, 65, 1, 0],
    "wide_edges": [127, 128, 129],
    "one_huge_many_tiny": [*[1, 2, 3] * 3, 300, 0, *[5, 4] * 3],
}
TILE_LENGTH_PAIRS = {
    "prefix": ([5, 0, 1, 17, 70], [5, 3, 1, 40, 130]),
    "more_queries": ([7, 65, 0, 2], [3, 31, 4, 0]),
    "one_query": ([1, 1, 1], [1, 129, 65]),
    "key_edges": ([3, 64, 5, 2], [63, 64, 65, 128]),
}

# Lengths of the documents in streaming.md's check, and chunk sizes against them
DOCUMENTS = [5, 1, 17, 0, 9, 23]
CHUNKS = [1, 4, 7, 16, 1000]


def cu_seqlens(lengths: list[int]) -> torch.Tensor:
    """int32 (B+1,) cumulative lengths."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
