"""Instruction wrappers: host twins against independent models, the device side against nvcc.

`mmasim` models the tensor cores' arithmetic bit by bit; `tensor-layouts` knows which lane holds
which element, and the banks of shared memory.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from mmasim.nv_ptx.sim import MMA
from tensor_layouts import Layout
from tensor_layouts.analysis import bank_conflicts
from tensor_layouts.atoms_nv import (
    SM75_U16x8_LDSM_T,
    SM75_U32x4_LDSM_N,
    SM80_16x8x16_F32BF16BF16F32_TN,
    SM80_16x8x16_F32F16F16F32_TN,
)
from test_emulator import COMPILER, ROOT, cuda_headers
from torch import Tensor

DTYPES = [torch.bfloat16, torch.float16]
ATOMS = {
    torch.bfloat16: SM80_16x8x16_F32BF16BF16F32_TN,
    torch.float16: SM80_16x8x16_F32F16F16F32_TN,
}
# Bits kept below the largest term's leading one, and products summed at once.
ARCHITECTURES = {"Ampere": (24, 8), "Hopper": (25, 16)}
SMALLEST_EXPONENT = {torch.bfloat16: -126, torch.float16: -14, torch.float32: -126}
INSTRUCTIONS = [
    "bar.sync",
    "bar.arrive",
    "cp.async.cg.shared.global",
    "cp.async.ca.shared.global",
    "cp.async.commit_group",
    "cp.async.wait_group",
    "ldmatrix.sync.aligned.m8n8.x4.shared.b16",
    "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16",
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
    "ex2.approx.ftz.f32",
    "rcp.approx.ftz.f32",
    "lg2.approx.ftz.f32",
    "shfl.sync.bfly",
    "shfl.sync.down",
    "shfl.sync.idx",
    "vote.sync.ballot",
    "bar.warp.sync",
    "atom.shared",
    "red.global.add.f32",
    *(f"ld.global.L1::no_allocate.{word}" for word in ("u16", "u32", "v2.u32", "v4.u32")),
    *(f"st.global.cs.{word}" for word in ("u16", "u32", "v2.u32", "v4.u32")),
]
FROM_SM_90 = [
    "red.global.add.v4.f32",
    "barrier.cluster.arrive.release.aligned",
    "barrier.cluster.wait.acquire.aligned",
    "mapa.shared::cluster.u32",
    "ld.shared::cluster.u32",
]


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    headers = cuda_headers()
    if COMPILER is None or headers is None:
        pytest.skip("needs a host C++ compiler and CUDA's headers")
    path = tmp_path_factory.mktemp("ptx") / "ptx_host.so"
    sources = [*sorted((ROOT / "csrc/emu").glob("*.cpp")), ROOT / "tests/cpp/ptx_host.cpp"]
    flags = ["-std=c++17", "-O2", "-shared", "-fPIC", "-DVARSTREAM_EMULATED"]
    include = [f"-I{ROOT / 'csrc'}", "-isystem", headers]
    subprocess.run([COMPILER, *flags, *include, *sources, "-o", path], check=True)
    return ctypes.CDLL(str(path))


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)


# --- mma on fragments packed by tensor-layouts' atoms ---------------------------------------------


def places(layout: Layout, values: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of each (lane, value): the layout's offsets count column by column."""
    offsets = np.array([[layout(lane, v) for v in range(values)] for lane in range(32)])
    return offsets % rows, offsets // rows


def mma(twins: ctypes.CDLL, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """c + a b of a (n, 16, 16), b (n, 8, 16) (column major) and c (n, 16, 8), by one warp."""
    atom = ATOMS[a.dtype]

    def fragments(x: Tensor, layout: Layout, values: int) -> np.ndarray:
        rows, columns = places(layout, values, x.shape[1])
        bits = x.view(torch.int32 if x.dtype == torch.float32 else torch.int16).numpy()
        return np.ascontiguousarray(bits[:, rows, columns])

    fa, fb = fragments(a, atom.a_layout, 8), fragments(b, atom.b_layout, 4)
    fd = fragments(c, atom.c_layout, 4)
    bfloat16 = int(a.dtype == torch.bfloat16)
    assert twins.run_mma(bfloat16, len(a), pointer(fa), pointer(fb), pointer(fd)) == 0
    rows, columns = places(atom.c_layout, 4, 16)
    d = np.empty(c.shape, np.int32)
    d[:, rows, columns] = fd
    return torch.from_numpy(d).view(torch.float32)


def exponent(x: Tensor, dtype: torch.dtype) -> Tensor:
    """floor(log2 |x|) as the tensor core sees x: subnormal inputs aren't normalised."""
    e = torch.frexp(x.double()).exponent.double() - 1
    return torch.where(x == 0, -132.0, e.clamp(min=SMALLEST_EXPONENT[dtype]))


def modelled_error(a: Tensor, b: Tensor, c: Tensor, architecture: str) -> Tensor:
    """How far the modelled tensor core may be from the exact c + a b, element by element.

    It sums a few products and the accumulator at once: each term loses what lies `bits` below the
    leading one of the largest; the sum is then truncated to float32.
    """
    bits, at_once = ARCHITECTURES[architecture]
    exact = a.double()[:, :, None] * b.double()[:, None]  # (n, 16, 8, 16)
    exponents = exponent(a, a.dtype)[:, :, None] + exponent(b, b.dtype)[:, None]
    total, error = c.double(), torch.zeros_like(c, dtype=torch.float64)
    for first in range(0, 16, at_once):
        chunk = slice(first, first + at_once)
        largest = exponents[..., chunk].amax(-1)
        largest = torch.maximum(largest, exponent(total.abs() + error, torch.float32))
        error = error + (at_once + 1) * torch.exp2(largest - bits)
        total = total + exact[..., chunk].sum(-1)
        error = error + torch.exp2(exponent(total.abs() + error, torch.float32) - 23)
    return error


def inputs(kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """a (n, 16, 16), b (n, 8, 16), c (n, 16, 8) without infinities or NaNs."""
    n = 64
    a, b, c = torch.randn(n, 16, 16), torch.randn(n, 8, 16), torch.randn(n, 16, 8)
    wide = 45.0 if dtype == torch.bfloat16 else 10.0

    def scale(x: Tensor, low: float, high: float) -> Tensor:
        return x * torch.exp2(torch.empty_like(x).uniform_(low, high))

    if kind == "wide":
        a, b, c = scale(a, -wide, wide), scale(b, -wide, wide), scale(c, -wide, wide)
    if kind == "cancelling":
        # All but a sixteenth of the products have an opposite; half of c is another's.
        a[..., 8:15], b[..., 8:15] = -a[..., 0:7], b[..., 0:7]
        c[::2] = -(a[::2].to(dtype).double() @ b[::2].to(dtype).double().mT).float()
    if kind == "subnormal":
        if dtype == torch.bfloat16:  # products and sums below 2^-126
            a, b, c = scale(a, -75, -60), scale(b, -75, -60), scale(c, -149, -127)
            a[::2], b[::2] = scale(a[::2], -70, -60), 1.0  # inputs too
        else:
            a, b = scale(a, -24, -14), scale(b, -24, -10)
            c = scale(c, -48, -28)
    return a.to(dtype), b.to(dtype), c


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", ["random", "wide", "cancelling", "subnormal"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mma_against_a_bit_accurate_model(twins, dtype, kind, architecture):
    a, b, c = inputs(kind, dtype)
    found = mma(twins, a, b, c).double()
    exact = c.double() + a.double() @ b.double().mT
    size = c.double().abs() + a.double().abs() @ b.double().abs().mT
    # Ours: a float64 sum, rounded once.
    own = torch.exp2(exponent(exact, torch.float32) - 24) + 32 * 2.0**-53 * size
    assert torch.all((found - exact).abs() <= own)

    name = "bf16" if dtype == torch.bfloat16 else "f16"
    model = MMA(architecture, f"m16n8k16.f32.{name}.{name}.f32")
    modelled = torch.stack([model(*x) for x in zip(a, b.mT, c, strict=True)]).double()
    error = modelled_error(a, b, c, architecture)
    assert torch.all((modelled - exact).abs() <= error + own)  # the bound describes the model
    assert torch.all((modelled - found).abs() <= error + own)
    assert not torch.equal(modelled, found) or kind == "subnormal"  # they are two things


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_mma_of_infinities_and_nans(twins, dtype, architecture):
    a, b, c = inputs("random", dtype)
    for x in (a, b, c):
        chosen = torch.rand_like(x.float()) < 0.02
        special = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0], dtype=x.dtype)
        x[chosen] = special[torch.randint(4, (int(chosen.sum()),))]
    found = mma(twins, a, b, c)
    name = "bf16" if dtype == torch.bfloat16 else "f16"
    model = MMA(architecture, f"m16n8k16.f32.{name}.{name}.f32")
    modelled = torch.stack([model(*x) for x in zip(a, b.mT, c, strict=True)])
    for kind in (torch.isnan, torch.isposinf, torch.isneginf, torch.isfinite):
        assert kind(modelled).any() and torch.equal(kind(found), kind(modelled))
    finite = torch.isfinite(found)
    torch.testing.assert_close(found[finite], modelled[finite], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mma_widens_every_16_bit_value(twins, dtype):
    values = torch.arange(1 << 16).to(torch.int16).view(dtype)
    a = torch.zeros(len(values) // 16, 16, 16, dtype=dtype)
    a[:, :, 3] = values.view(-1, 16)
    b = torch.zeros(len(a), 8, 16, dtype=dtype)
    b[:, :, 3] = 1
    d = mma(twins, a, b, torch.zeros(len(a), 16, 8))[:, :, 0].flatten()
    assert torch.equal(d.nan_to_num(nan=7e7), values.float().nan_to_num(nan=7e7))


@pytest.mark.parametrize("dtype", DTYPES)
def test_mma_fragments_element_by_element(twins, dtype):
    """One value at a time in a or in b: what it meets shows where the instruction sees it."""
    a = torch.eye(256, dtype=dtype).view(256, 16, 16)
    b = torch.arange(1, 129, dtype=dtype).view(1, 8, 16).expand(256, 8, 16)
    d = mma(twins, a, b.contiguous(), torch.zeros(256, 16, 8))
    assert torch.equal(d, a.float() @ b.float().mT)
    b = torch.eye(128, dtype=dtype).view(128, 8, 16)
    a = torch.arange(1, 257, dtype=dtype).view(1, 16, 16).expand(128, 16, 16)
    d = mma(twins, a.contiguous(), b, torch.zeros(128, 16, 8))
    assert torch.equal(d, a.float() @ b.float().mT)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_fragments_written_in_the_wrapper(dtype):
    """The formulas at the head of ptx/mma.cuh, by which kernels address elements."""
    atom = ATOMS[dtype]
    for lane in range(32):
        g, t = lane // 4, lane % 4
        for i in range(4):
            for half in range(2):
                row, column = g + 8 * (i % 2), 2 * t + half + 8 * (i // 2)
                assert atom.a_layout(lane, 2 * i + half) == row + 16 * column
        for i in range(2):
            for half in range(2):
                k = 2 * t + half + 8 * i
                assert atom.b_layout(lane, 2 * i + half) == g + 8 * k
        for i in range(4):
            assert atom.c_layout(lane, i) == g + 8 * (i // 2) + 16 * (2 * t + i % 2)
    # And back: every element stands in one place.
    for layout, values, rows in (
        (atom.a_layout, 8, 16),
        (atom.b_layout, 4, 8),
        (atom.c_layout, 4, 16),
    ):
        places_of = set(
            zip(*(x.ravel().tolist() for x in places(layout, values, rows)), strict=True)
        )
        assert len(places_of) == 32 * values


# --- ldmatrix -----------------------------------------------------------------------------------


def ldmatrix(
    twins: ctypes.CDLL, transposed: bool, rows: np.ndarray, offsets: np.ndarray
) -> tuple[np.ndarray, int]:
    """Values (32 lanes, 8) that a warp loads from rows (32, 8) at byte offsets; bank conflicts."""
    registers = np.empty((32, 4), np.uint32)
    size = int(offsets.max()) + 16
    conflicts = twins.run_ldmatrix(
        int(transposed), size, pointer(rows), pointer(offsets), pointer(registers)
    )
    return registers.view(np.uint16), conflicts


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_element_by_element(twins, transposed):
    atom = SM75_U16x8_LDSM_T if transposed else SM75_U32x4_LDSM_N
    rows = np.arange(256, dtype=np.uint16).reshape(32, 8)  # row of lane l: 8 l to 8 l + 7
    offsets = (np.random.permutation(32) * 48).astype(np.int32)
    found, _ = ldmatrix(twins, transposed, rows, offsets)
    for lane in range(32):
        assert atom.src_layout_bits(lane, 0) == 128 * lane
        for value in range(8):
            bits = atom.dst_layout_bits(lane, 16 * value)
            assert found[lane, value] == bits // 16, (lane, value)
    assert sorted(found.ravel().tolist()) == list(range(256))


def test_ldmatrix_loads_fragments_of_mma(twins):
    """a from a row-major tile; b from rows of its columns, or transposed from rows of k."""
    atom = ATOMS[torch.bfloat16]
    tile = np.arange(256, dtype=np.uint16).reshape(16, 16)
    lane = np.arange(32)
    # Matrices (rows 0 to 7, 8 to 15) x (columns 0 to 7, 8 to 15), rows first.
    row, column = lane % 16, lane // 16 * 8
    chunks = np.stack([tile[r, c : c + 8] for r, c in zip(row, column, strict=True)])
    offsets = (np.arange(32) * 16).astype(np.int32)
    found, _ = ldmatrix(twins, False, np.ascontiguousarray(chunks), offsets)
    rows, columns = places(atom.a_layout, 8, 16)
    assert np.array_equal(found, tile[rows, columns])
    # tile[k][n]: transposed, the first two registers are b of columns 0 to 7, the others of 8 on.
    found, _ = ldmatrix(twins, True, np.ascontiguousarray(chunks), offsets)
    n, k = places(atom.b_layout, 4, 8)
    assert np.array_equal(found[:, :4], tile[k, n])
    assert np.array_equal(found[:, 4:], tile[k, n + 8])


@pytest.mark.parametrize("stride", [0, 16, 32, 48, 64, 80, 96, 128, 144, 192, 256, 272, 512, 528])
def test_bank_conflicts_of_ldmatrix(twins, stride):
    """Each matrix's eight rows, `stride` bytes apart, as four-byte words in 32 banks."""
    rows = np.zeros((32, 8), np.uint16)
    _, conflicts = ldmatrix(twins, False, rows, (np.arange(32) * stride).astype(np.int32))
    words = Layout((8, 4), (stride // 4, 1))
    ways = bank_conflicts(words, element_bytes=4, group_size=8)["max_ways"]
    assert conflicts == 4 * (ways - 1)


# --- the device side ----------------------------------------------------------------------------


def test_every_wrapper_is_compiled():
    source = (ROOT / "tests/cpp/ptx_device.cu").read_text()
    for header in (ROOT / "csrc/ptx").glob("*.cuh"):
        assert f'#include "ptx/{header.name}"' in source
        names = re.findall(r"VARSTREAM_DEVICE \S+ (\w+)\(", header.read_text())
        missing = [n for n in names if not re.search(rf"\bptx::{n}\b", source)]
        assert missing == [], header.name


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_wrappers_compile_for_the_device(architecture: str, tmp_path: Path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc")
    source = ROOT / "tests/cpp/ptx_device.cu"
    flags = ["-std=c++17", f"-arch={architecture}", "-Werror", "all-warnings", "--keep"]
    host = ["-Xcompiler", "-Wall,-Wextra"]
    command = [nvcc, *flags, *host, "-I", ROOT / "csrc", "-c", source, "--keep-dir", tmp_path]
    result = subprocess.run(
        [*command, "-o", tmp_path / "ptx_device.o"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    files = list(tmp_path.glob("*.ptx"))
    assert files
    for assembly in (f.read_text() for f in files):
        assert [i for i in INSTRUCTIONS if i not in assembly] == []
        newer = [i for i in FROM_SM_90 if i in assembly]
        assert newer == (FROM_SM_90 if architecture == "sm_90a" else [])
