"""Which model types of transformers are understood."""

from __future__ import annotations

from typing import Any

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
