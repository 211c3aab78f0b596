"""``import varstream`` in a fresh interpreter; the floor is ``import torch`` alone."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import torch

from ..case import Case, Setup, Shape, floor


def _run(module: str) -> int:
    return subprocess.run([sys.executable, "-c", f"import {module}"], check=True).returncode


def _build(shape: Shape, device: torch.device, seed: int) -> Setup:
    return Setup(
        runs={"varstream": partial(_run, "varstream"), "import_torch": partial(_run, "torch")},
        verify=float,
    )


CASES = (
    Case(
        "import/varstream",
        "import varstream",
        {},
        _build,
        {},
        dtype="none",
        peers=(floor("import_torch"),),
        reference="",
        tolerance=0.0,
        memory=False,
        note="a fresh interpreter; floor: import torch",
    ),
)
