"""The first layer's input, looked up again in the backward instead of kept: token ids say it all
where it comes straight from a plain embedding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Lookup:
    """An embedding's call on packed token ids (1, n)."""

    embedding: Any
    ids: Tensor
    output: Tensor | None  # (1, n, d)
    version: int  # of the weight

    def __call__(self, rows: slice) -> Tensor:
        """Rows (c, d) of the output."""
        if self.embedding.weight._version != self.version:
            raise RuntimeError(
                "the embedding's weight was changed in place between the forward and the backward "
                "that looks tokens up again"
            )
        return self.embedding.forward(self.ids[:, rows]).squeeze(0)


def is_plain(embedding: Any) -> bool:
    """Whether an embedding gives the same for the same ids again, and nobody takes part in it."""
    everywhere = nn.modules.module
    hooks = (
        embedding._forward_hooks,
        embedding._forward_pre_hooks,
        everywhere._global_forward_hooks,
    )
    return (
        isinstance(embedding, nn.Embedding)
        and type(embedding).__module__.startswith(("torch.nn.", "transformers.models."))
        and "forward" not in embedding.__dict__
        and embedding.max_norm is None
        and not any(hooks)
    )


@contextmanager
def looked_up(embedding: Any) -> Iterator[list[Lookup]]:
    """Within, the embedding's calls go into the list, where they can be repeated.

    Not where ranks share a model: its weight may be elsewhere by the backward.
    """
    calls: list[Lookup] = []
    ranks = torch.distributed.is_available() and torch.distributed.is_initialized()
    if ranks or not is_plain(embedding):
        yield calls
        return

    def keep(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        if len(args) == 1:
            calls.append(Lookup(module, args[0], output, module.weight._version))

    handle = embedding.register_forward_hook(keep)
    try:
        yield calls
    finally:
        handle.remove()
        for call in calls:
            call.output = None
