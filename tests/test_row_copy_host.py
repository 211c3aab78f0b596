"""The CUDA row copy kernel, compiled by the host compiler under sanitizers (no GPU needed)."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMPILER = shutil.which("g++") or shutil.which("c++")
FLAGS = ["-std=c++17", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@pytest.mark.skipif(COMPILER is None, reason="no host C++ compiler")
def test_row_copy_kernel_on_the_host(tmp_path: Path):
    binary = tmp_path / "row_copy_host"
    source = ROOT / "tests" / "cpp" / "row_copy_host.cpp"
    subprocess.run(
        [COMPILER, *FLAGS, "-DVARSTREAM_EMULATED", f"-I{ROOT / 'csrc'}", source, "-o", binary],
        check=True,
    )
    result = subprocess.run([binary], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " 0 failures" in result.stdout
