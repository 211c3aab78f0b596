"""Which model types of transformers are understood."""

from __future__ import annotations

from typing import Any

from torch import nn

from varstream.encoder import postnorm
from varstream.encoder.deberta import DEBERTA
from varstream.encoder.family import Family
from varstream.encoder.modernbert import MODERNBERT
from varstream.encoder.mpnet import MPNET
from varstream.streaming import UnsupportedModelError

FAMILIES: dict[str, Family] = {
    "bert": postnorm.BERT,
    "roberta": postnorm.ROBERTA,
    "xlm-roberta": postnorm.XLM_ROBERTA,
    "electra": postnorm.ELECTRA,
    "distilbert": postnorm.DISTILBERT,
    "albert": postnorm.ALBERT,
    "mpnet": MPNET,
    "deberta-v2": DEBERTA,
    "modernbert": MODERNBERT,
}


def check_whole(model: Any) -> None:
    """Refuse a module of somebody else's around an encoder that is understood.

    Raises:
        UnsupportedModelError: names what to pass in its place.
    """
    if type(model).__module__.startswith("transformers.") or not isinstance(model, nn.Module):
        return
    for path, module in model.named_modules():
        stock = path and type(module).__module__.startswith("transformers.models.")
        if stock and hasattr(module, "base_model") and module.config.model_type in FAMILIES:
            raise UnsupportedModelError(
                f"{type(model).__name__} isn't a class that vs.padding_free understands, but "
                f"contains a {type(module).__name__}; pass the encoder (its submodule {path})"
            )


def family_of(model: Any) -> Family:
    """The family of a model or its backbone.

    Raises:
        UnsupportedModelError: its model type is none that is understood.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in FAMILIES:
        raise UnsupportedModelError(
            f"{type(model).__name__} has model type {kind!r}; "
            f"vs.padding_free understands {', '.join(FAMILIES)}"
        )
    return FAMILIES[kind]
