"""``SentenceTransformer`` models: their encoder on packed rows, and pooling without padding.

The encoder inside is made padding-free as any other. Where a stock ``Pooling`` follows it, that
takes packed rows for the modes that it can; it pools padded token embeddings, as before, for the
rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from varstream.encoder.forwards import ASKED, STATE, Asked, bound
from varstream.encoder.heads import Form
from varstream.encoder.pooling import cls_pool, mean_pool
from varstream.ops.packing import Packed, unpack
from varstream.streaming import UnsupportedModelError

_LIBRARY = "sentence_transformers."
_PACKED = "varstream_packed"  # what the encoder's module hands to Pooling, beside the features
# Features by which Pooling does something else.
_SPECIAL = ("cls_token_embeddings", "token_weights_sum")


def is_sentence_transformer(model: Any) -> bool:
    """Whether the model is of the class itself: the library's other models end in other modules."""
    return _is_stock(model, "SentenceTransformer")


def check_other(model: Any) -> None:
    """Refuse a CrossEncoder, which runs its model as that stands.

    Raises:
        UnsupportedModelError: names what to pass in its place.
    """
    if _is_stock(model, "CrossEncoder"):
        raise UnsupportedModelError(
            "a CrossEncoder is not what vs.padding_free understands; pass its model (cross.model)"
        )


def padding_free(model: Any, output_packed: bool, inner: Callable[[Any], Any]) -> Any:
    """``vs.padding_free`` of a SentenceTransformer, by ``inner`` on the encoder in it.

    Raises:
        UnsupportedModelError: names the module that isn't understood; nothing was changed.
    """
    if output_packed:
        raise UnsupportedModelError(
            "a SentenceTransformer can't return output_packed; call its encoder (model[0].model)"
        )
    modules = list(model.children())
    first = modules[0] if modules else None
    if not _is_stock(first, "Transformer") or getattr(first, "backend", "torch") != "torch":
        raise UnsupportedModelError(
            f"the first module is {type(first).__name__}; vs.padding_free understands a "
            "SentenceTransformer that begins with a Transformer on torch"
        )
    assert first is not None
    if getattr(first, "can_flatten_inputs", False):
        raise UnsupportedModelError(
            "the Transformer module unpads its inputs itself; set its unpad_inputs to False"
        )
    text = first.modality_config.get("text", {})
    output = text.get("method_output_name")
    names = (output,) if isinstance(output, str) else tuple(output or ())
    if text.get("method") != "forward" or names != ("last_hidden_state",):
        raise UnsupportedModelError(
            f"the Transformer module takes {'.'.join(map(str, names))} of "
            f"{text.get('method')}; vs.padding_free understands last_hidden_state of forward"
        )
    for module in modules[:2]:
        if "forward" in module.__dict__ and STATE not in module.__dict__:
            raise UnsupportedModelError(
                f"{type(module).__name__} has a forward set on the instance; call vs.padding_free "
                "first and wrap afterwards"
            )
    inner(first.model)
    if len(modules) > 1 and _is_stock(modules[1], "Pooling"):
        for module, forward in zip(modules, FORWARDS, strict=False):
            module.__dict__[STATE] = True
            module.forward = bound(forward, module)
    return model


def _is_stock(module: Any, name: str) -> bool:
    return type(module).__name__ == name and type(module).__module__.startswith(_LIBRARY)


@torch._disable_dynamo
def transformer_forward(self: Any, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
    """The module's own forward; its token embeddings padded, and packed beside."""
    asked = Asked(Form.TOKENS)
    ASKED.set(asked)
    try:
        features = type(self).forward(self, features, **kwargs)
    finally:
        ASKED.set(None)
    name = self.module_output_name
    assert asked.batch is not None
    packed = asked.batch.packed._replace(values=features[name][0])
    features[name] = unpack(packed)
    features[_PACKED] = packed
    return features


@torch._disable_dynamo
def pooling_forward(self: Any, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
    """Pooling on packed rows where every mode has it, else the module's own."""
    packed = features.pop(_PACKED, None)
    modes = self.pooling_mode
    modes = (modes,) if isinstance(modes, str) else modes
    prompt = not self.include_prompt and "prompt_length" in features
    special = prompt or any(name in features for name in _SPECIAL)
    if packed is None or special or any(mode not in _POOLS for mode in modes):
        return type(self).forward(self, features, **kwargs)
    features["sentence_embedding"] = torch.cat([_POOLS[mode](packed) for mode in modes], dim=-1)
    return features


def _mean_sqrt(packed: Packed) -> Tensor:
    """The sum over each sequence over the root of its length."""
    means = mean_pool(packed)
    root = packed.cu_seqlens.diff().to(torch.float64).sqrt()
    return means * root[:, None].to(means.dtype)


_POOLS: dict[str, Callable[[Packed], Tensor]] = {
    "cls": cls_pool,
    "mean": mean_pool,
    "mean_sqrt_len_tokens": _mean_sqrt,
}
FORWARDS: tuple[Callable[..., Any], ...] = (transformer_forward, pooling_forward)
