"""Where and with what a case was measured."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

import varstream


def cpu_name() -> str:
    """The CPU's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.split(":", 1)[1].split())
    return platform.processor() or platform.machine()


def device_record(device: torch.device) -> dict[str, Any]:
    """Kind, name and cores (of the CPU, or the GPU's multiprocessors)."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {
            "kind": "cuda",
            "name": properties.name,
            "cores": properties.multi_processor_count,
        }
    return {"kind": "cpu", "name": cpu_name(), "cores": os.cpu_count() or 1}


def file_name(record: dict[str, Any]) -> str:
    """``<device>.json``: one file of results for each kind of device."""
    words = record["name"] if record["kind"] == "cuda" else f"{record['name']} {record['cores']}"
    suffix = "" if record["kind"] == "cuda" else "_cores"
    slug = "".join(c if c.isalnum() else "_" for c in words.lower())
    return f"{slug}{suffix}.json"


def _git(*arguments: str) -> str | None:
    """What git says about this checkout; None outside one."""
    try:
        answer = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


def environment(device: torch.device) -> dict[str, Any]:
    """Machine, versions and commit; ``load_after`` is filled in when the case is done."""
    commit = _git("rev-parse", "HEAD")
    status = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "device": device_record(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "varstream": varstream.__version__,
        "python": platform.python_version(),
        "commit": commit,
        "dirty": None if status is None else bool(status),
        "date": time.strftime("%Y-%m-%d"),
        "load_before": load(),
        "load_after": None,
    }


def load() -> float:
    """Runnable processes over the last minute: how quiet the machine is."""
    return round(os.getloadavg()[0], 2)
