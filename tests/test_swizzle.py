"""Where shared tiles keep their chunks (csrc/tile/swizzle.cuh), against tensor-layouts.

The compiler proves the absence of bank conflicts for every tile too, by static_assert.
"""

from __future__ import annotations

import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest
from tensor_layouts import Layout, Swizzle, compose
from tensor_layouts.analysis import bank_conflicts

ROOT = Path(__file__).resolve().parent.parent
ROWS, CHUNKS = 32, (4, 8, 12, 16, 24, 32)
# Bits that are XORed, the lowest of them in an address counted in values, how far above the others
# stand: rows of 32, 64, 128 and 256 values.
SWIZZLES = {4: (2, 3, 3), 8: (3, 3, 3), 16: (3, 3, 4), 32: (3, 3, 5)}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[tuple[int, int], int]]:
    """By chunks of a row: from (row, chunk) to the chunk's place in the tile."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    program = tmp_path_factory.mktemp("swizzle") / "swizzle"
    source = ROOT / "tests/cpp/swizzle.cpp"
    subprocess.run(
        [compiler, "-std=c++17", f"-I{ROOT / 'csrc'}", source, "-o", program], check=True
    )
    found: dict[int, dict[tuple[int, int], int]] = defaultdict(dict)
    for line in subprocess.run(program, capture_output=True, text=True).stdout.splitlines():
        chunks, row, chunk, place = map(int, line.split())
        found[chunks][row, chunk] = place
    assert tuple(found) == CHUNKS
    return found


@pytest.mark.parametrize("chunks", SWIZZLES)
def test_swizzles_are_those_of_tensor_layouts(places, chunks):
    columns = 8 * chunks
    tile = compose(Swizzle(*SWIZZLES[chunks]), Layout((ROWS, columns), (columns, 1)))
    for (row, chunk), place in places[chunks].items():
        for value in range(8):
            assert tile(row, 8 * chunk + value) == 8 * place + value, (row, chunk)


@pytest.mark.parametrize("chunks", SWIZZLES)
def test_ldmatrix_meets_no_conflict_by_tensor_layouts(chunks):
    """Eight rows at one chunk, a lane each; without the swizzle they would collide."""
    columns = 8 * chunks
    column = Layout((8, 8), (columns, 1))  # lanes go down the rows, values along them
    swizzled = compose(Swizzle(*SWIZZLES[chunks]), column)
    assert bank_conflicts(swizzled, element_bytes=2, group_size=8)["max_ways"] == 1
    assert bank_conflicts(column, element_bytes=2, group_size=8)["max_ways"] > 1


@pytest.mark.parametrize("chunks", CHUNKS)
def test_no_access_of_eight_lanes_meets_a_conflict(places, chunks):
    own = places[chunks]
    assert sorted(own.values()) == list(range(ROWS * chunks))
    for first in range(0, ROWS, 8):
        for chunk in range(chunks):  # ldmatrix
            groups = {own[row, chunk] % 8 for row in range(first, first + 8)}
            assert len(groups) == 8, (first, chunk)
    lanes = 8 if chunks % 8 == 0 else 4  # copies: as many neighbours to a row
    for first in range(0, ROWS, 8 // lanes):
        for chunk in range(0, chunks, lanes):
            groups = {own[first + i // lanes, chunk + i % lanes] % 8 for i in range(8)}
            assert len(groups) == 8, (first, chunk)
