"""What the demo does and how large it is; every number a run depends on."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

MIB = 2**20


class DemoError(Exception):
    """The demo can't go on; the message is one line for the user."""


@dataclass(frozen=True)
class Settings:
    """The full demo's sizes by default; lengths are in tokens.

    Attributes:
        data: file or folder of text, or None for Python's standard library.
        out: folder of the results.
        steps: training steps, one packed row each.
        budget: MiB that the largest document's backward may take.
        max_documents, max_bytes: bounds of the corpus.
        max_length: where documents are cut.
        row_tokens: capacity of a packed row; at least ``max_length``.
        compared: documents of the side-by-side comparison.
        compared_tokens: bound of their padded batch, documents times the longest.
        rounds: timed runs of every method, interleaved; no further round is started once they
            have taken ``speed_seconds``.
        length_step: document lengths under the budget are multiples of this.
        length_cap: longest document tried.
        dtype: of weights and computation by torch's name; None is bfloat16 on a GPU, where
            attention runs in kernels then, and float32 on the CPU.
        tiny: the sizes are too small to show the memory gain; the run says so.
    """

    data: Path | None = None
    out: Path = Path("demo_results")
    steps: int = 32
    seed: int = 0
    budget: int = 80
    vocab_size: int = 8192
    max_documents: int = 400
    max_bytes: int = 4 * MIB
    max_length: int = 4096
    row_tokens: int = 4096
    hidden_size: int = 192
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    learning_rate: float = 3e-3
    compared: int = 8
    compared_tokens: int = 16384
    rounds: int = 3
    speed_seconds: float = 45.0
    length_step: int = 256
    length_cap: int = 16384
    dtype: str | None = None
    tiny: bool = False

    def on_gpu(self) -> Settings:
        """Longer documents and the budget to go with a GPU's larger chunks."""
        return replace(self, budget=512, length_cap=65536)

    def quick(self) -> Settings:
        """The same run in seconds, to see that everything works; its numbers mean little."""
        return replace(
            self,
            steps=6,
            budget=12,
            vocab_size=512,
            max_documents=60,
            max_bytes=MIB // 4,
            max_length=256,
            row_tokens=512,
            hidden_size=64,
            layers=2,
            compared=4,
            compared_tokens=1024,
            rounds=1,
            length_cap=1024,
            tiny=True,
        )

    def as_json(self) -> dict[str, Any]:
        """Plain data without the paths, which say more about the machine than about the run."""
        plain = asdict(self)
        del plain["out"], plain["data"]
        return plain
