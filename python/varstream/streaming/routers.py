"""Mixture-of-experts routers: their logits out of a streamed layer, and the load balancing loss."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from varstream.streaming.structure import UnsupportedModelError


def router_class(backbone: Any) -> tuple[type, int] | None:
    """The class of the backbone's routers and the place of the logits in their output; None where
    there are none."""
    recorder = (getattr(backbone, "_can_record_outputs", None) or {}).get("router_logits")
    if recorder is None:
        return None
    if isinstance(recorder, type):
        return recorder, 0
    return recorder.target_class, recorder.index


@contextmanager
def recorded(layer: nn.Module, routers: tuple[type, int] | None) -> Iterator[list[Tensor]]:
    """Within, the logits of the layer's routers go into the list, in their order."""
    logits: list[Tensor] = []
    if routers is None:
        yield logits
        return
    kind, place = routers

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        logits.append(output[place] if isinstance(output, tuple) else output)

    handles = [m.register_forward_hook(keep) for m in layer.modules() if isinstance(m, kind)]
    try:
        yield logits
    finally:
        for handle in handles:
            handle.remove()


def balances_load(model: Any) -> bool:
    """Whether the model's class adds a load balancing loss that streaming understands."""
    home = sys.modules[type(model).__module__]
    return hasattr(home, "load_balancing_loss_func") and hasattr(model, "router_aux_loss_coef")


def load_balancing(model: Any, logits: list[Tensor]) -> Tensor:
    """The model's own auxiliary loss of logits (n, experts) of real rows, as its class computes it
    of all rows that an attention mask shows.

    Raises:
        UnsupportedModelError: the model's module has none.
    """
    if not balances_load(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no load balancing loss that streaming understands; "
            "pass output_router_logits=False"
        )
    function = sys.modules[type(model).__module__].load_balancing_loss_func
    return function(tuple(logits), model.num_experts, model.num_experts_per_tok, None)
