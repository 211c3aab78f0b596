"""Result files: written whole or not at all, so that a broken run never spoils an earlier one."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from varstream.demo.settings import DemoError


class Store:
    """A folder of results. A file appears complete, replacing an older one in a single step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.written: list[str] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise DemoError(
                f"--out {folder} can't be written to ({error.strerror}); give another folder"
            ) from None

    def json(self, name: str, data: Any) -> None:
        self.text(name, json.dumps(data, indent=2) + "\n")

    def text(self, name: str, text: str) -> None:
        self._replace(name, lambda path: path.write_text(text, encoding="utf-8"))

    def figure(self, name: str, figure: Any) -> None:
        """Save a matplotlib figure as PNG."""
        self._replace(name, lambda path: figure.savefig(path, format="png", dpi=150))

    def _replace(self, name: str, write: Callable[[Path], Any]) -> None:
        """Write beside the target, then rename over it; on any failure the target stays."""
        handle, temporary = tempfile.mkstemp(dir=self.folder, prefix=f".{name}.")
        os.close(handle)
        try:
            write(Path(temporary))
            os.chmod(temporary, 0o644)
            os.replace(temporary, self.folder / name)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        self.written.append(name)
