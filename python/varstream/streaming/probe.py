"""What a model asks of its attention, seen before it is streamed: two tokens run through its
backbone, each layer up to its attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from varstream._random_state import random_state_kept
from varstream.streaming.layer_call import implementation, refuse_extras
from varstream.streaming.structure import Parts, UnsupportedModelError, attention_of

_IMPLEMENTATION = "varstream_probe"
# Queries and distances to keys at which masks are compared; the formulas know no length.
_QUERIES = (1 << 20, 1000003, (1 << 20) + 4095)
_DISTANCES = (-1, 0, 1, 2, *(1 << n for n in range(2, 20)))


class _Asked(Exception):
    """Leaves a layer that has called its attention."""


@dataclass
class _Mask:
    """A mask as models hand it on."""

    sees: Any  # transformers' function of batch, head, query and key


@torch.no_grad()
def check_attention(parts: Parts) -> None:
    """Refuse a model whose layers ask more of their attention than a chunk's can do: a mask beside
    causality and the window that they name, sinks, a bias.

    Raises:
        UnsupportedModelError: names the layer's attention.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(_IMPLEMENTATION, _mask)
    backbone, device = parts.backbone, next(parts.backbone.parameters()).device
    with ExitStack() as stack:
        stack.enter_context(random_state_kept([device]))
        for layer in dict.fromkeys(parts.layers):
            stack.enter_context(_stopping(layer))
        for config in {id(c): c for c in _configs(parts)}.values():
            stack.enter_context(implementation(config, _IMPLEMENTATION))
        try:
            type(backbone).forward(
                backbone,
                input_ids=torch.zeros(1, 2, dtype=torch.int64, device=device),
                attention_mask=torch.ones(1, 2, dtype=torch.int64, device=device),
                position_ids=torch.arange(2, device=device)[None],
                use_cache=False,
            )
        except UnsupportedModelError:
            raise
        except Exception as error:  # of the model's: such as a mask that it takes apart
            raise UnsupportedModelError(
                f"{type(backbone).__name__} can't be run on two tokens up to its attention: {error}"
            ) from error


def _configs(parts: Parts) -> list[Any]:
    """The configurations that say where attention comes from."""
    attentions = [attention_of(layer)[1] for layer in parts.layers]
    return [parts.backbone.config, *(a.config for a in attentions if hasattr(a, "config"))]


@contextmanager
def _stopping(layer: Any) -> Iterator[None]:
    """Within, the layer runs up to its attention and gives back its input."""

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        try:
            type(layer).forward(layer, *args, **kwargs)
        except _Asked:
            return args[0] if args else kwargs["hidden_states"]
        name = type(attention_of(layer)[1]).__name__
        raise UnsupportedModelError(
            f"{name} doesn't take its attention from transformers' registry"
        )

    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward


def _mask(*, mask_function: Any, **_: Any) -> _Mask:
    return _Mask(mask_function)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> NoReturn:
    name = type(module).__name__
    refuse_extras(name, kwargs)
    if not isinstance(attention_mask, _Mask) or not _is_window(attention_mask.sees, sliding_window):
        raise UnsupportedModelError(
            f"{name} has a mask beside causality and the window that it names "
            f"({sliding_window}), which streaming can't honour"
        )
    raise _Asked


def _is_window(sees: Any, window: int | None) -> bool:
    """Whether a mask's formula is causality and this window, which counts the row itself."""
    query = torch.tensor(_QUERIES)[:, None]
    distances = torch.tensor(_DISTANCES if window is None else (*_DISTANCES, window - 1, window))
    zero = torch.tensor(0)
    expected = distances >= 0
    if window is not None:
        expected = expected & (distances < window)
    try:
        seen = sees(zero, zero, query, query - distances)
    except (IndexError, TypeError, AttributeError):  # it reads the batch
        return False
    return bool((torch.as_tensor(seen).broadcast_to(3, len(distances)) == expected).all())
