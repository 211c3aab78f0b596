"""Bank conflicts of shared memory, from the addresses that the kernels' own code makes
(csrc/tools/kernel_banks.py)."""

from __future__ import annotations

from collections import Counter

import kernels
import pytest
from emulation import skip_unless_buildable
from kernels import COMMITTED
from tensor_layouts import Layout
from tensor_layouts.analysis import bank_conflicts

import kernel_banks  # isort: skip  (csrc/tools, put on the path by kernels)

PRODUCTS = {"q k", "p v", "dout v", "q k and dout v", "dV", "dK", "dQ"}
Patterns = list[kernel_banks.Pattern]


@pytest.fixture(scope="module")
def patterns() -> Patterns:
    skip_unless_buildable()
    return kernel_banks.patterns()


def name_of(pattern: kernel_banks.Pattern) -> str:
    return f"{pattern['kernel']} {pattern['instance']}"


def test_no_pattern_meets_a_conflict(patterns):
    assert [one for one in patterns if kernel_banks.conflicts(one) != 0] == []


def test_every_kernel_with_shared_tiles_is_there(patterns):
    tiled = {name for name, own in kernels.traits().items() if "rows" in own}
    assert {name_of(one) for one in patterns} == tiled | {"head every", "tile_schedule every"}


def test_as_many_accesses_as_the_machine_code_has(patterns):
    """LDSM and stores of scores in the main loop, a warp: the enumeration leaves none out."""
    loads: Counter[str] = Counter()
    stores: Counter[str] = Counter()
    for one in patterns:
        loads[name_of(one)] += one["count"] if one["what"] in PRODUCTS else 0
        stores[name_of(one)] += one["count"] if one["what"] == "weights and dS stored" else 0
    for (kernel, arch), row in COMMITTED.items():
        name = kernels.kernel_table.constants_of(kernel)
        if "tile" not in row or arch != "sm_80":
            continue
        assert loads[name] == row["threads"] // 32 * row["sass"]["loop"]["LDSM"], kernel
        assert stores[name] == row["threads"] // 32 * row["sass"]["loop"]["STS"], kernel


STRIDES = (4, 8, 12, 16, 28, 32, 64, 128, 132, 256)


@pytest.mark.parametrize(
    ("width", "stride"), [(w, s) for w in (4, 8, 16) for s in STRIDES if s % w == 0]
)
def test_wavefronts_by_tensor_layouts(width, stride):
    """Lanes a stride apart, in words of 4 bytes; those of one wavefront share the banks."""
    skip_unless_buildable()
    group = 128 // width
    words = Layout((group, width // 4), (stride // 4, 1))
    ways = bank_conflicts(words, element_bytes=4, group_size=group * (width // 4))["max_ways"]
    [(ideal, needed)] = kernel_banks.wavefronts([(width, [stride * i for i in range(32)])])
    assert (ideal, needed) == (width // 4, width // 4 * ways)


def test_wavefronts_by_hand():
    skip_unless_buildable()
    rows = [256 * (lane % 16) + 16 * (lane // 16) for lane in range(32)]  # a tile without a swizzle
    swizzled = [256 * (lane % 16) + 16 * (lane // 16 ^ lane % 8) for lane in range(32)]
    everywhere = [64] * 32
    pairs = [8 * (lane // 4) for lane in range(32)]
    found = kernel_banks.wavefronts([(16, rows), (16, swizzled), (4, everywhere), (4, pairs)])
    assert found == [(4, 32), (4, 4), (1, 1), (1, 1)]
