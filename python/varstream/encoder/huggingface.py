"""``vs.padding_free`` and ``vs.restore_padding``: a Hugging Face encoder, in place.

The forwards of the encoder, of its layers and of the head are replaced on the instances; weights,
configuration and ``state_dict`` stay what they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from varstream._checks import check_bool
from varstream.encoder import sentences
from varstream.encoder.checks import check_stock
from varstream.encoder.families import check_whole, family_of
from varstream.encoder.forwards import (
    STATE,
    State,
    backbone_forward,
    bound,
    head_forward,
    layer_forward,
)
from varstream.encoder.heads import head_of

_OURS = (layer_forward, head_forward, backbone_forward, *sentences.FORWARDS)


def padding_free(model: Any, output_packed: bool = False) -> Any:
    """Make a Hugging Face encoder of the BERT family run on real tokens only, in place.

    A padded batch is packed before the embeddings, every layer runs on packed rows, forward and
    backward, and the last hidden states are unpacked once. Real positions hold what the padded
    model gives there; padded positions hold 0, and their gradients are 0. Use the model as before,
    for training and for inference; padding may stand anywhere (left, right, in holes, whole rows).
    Heads that work position by position run on packed rows, so padding costs them nothing either;
    their outputs are 0 on padding. Dropout draws its masks over packed rows: the same distribution,
    other draws than the padded model's. Gradient checkpointing is honoured. ``restore_padding``
    undoes it.

    With ``output_packed=True``, here or in a call, an encoder's ``last_hidden_state`` is a
    :class:`varstream.Packed` that was never unpacked (``varstream.encoder.pooling`` pools it), and
    so are the logits of a head for masked language modelling or token classification.

    A ``SentenceTransformer`` keeps its interface: its encoder runs packed, and a stock ``Pooling``
    by mean or first token takes packed rows.

    Refused at the call with a ValueError that names the reason: ``output_attentions``,
    ``output_hidden_states``, masks that aren't ``(B, S)``, caches, cross-attention and any other
    argument that has no meaning here; and where the padded model would read padding: token labels
    other than -100 on padding, a label other than -100 for a sequence that is all padding, the
    span loss of question answering on a padded batch. (Without labels, pooler and logits of such a
    sequence hold what they make of zeros.) A pooler or classification head gets position 0 of the
    padded model where that is padding too; only DeBERTa's and ModernBERT's refuse such a row.

    Args:
        model: a model of type ``bert``, ``roberta``, ``xlm-roberta``, ``electra``, ``distilbert``,
            ``albert``, ``mpnet``, ``deberta-v2`` (v3 too) or ``modernbert``: the encoder alone, or
            with its head for masked language modelling, pre-training, next sentence prediction,
            sequence or token classification, multiple choice or question answering; or a
            ``SentenceTransformer`` on one of these encoders.
        output_packed: what calls without that argument return.

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: a ValueError naming the part of the model that isn't understood, or
            the head that can't return packed output; nothing was changed.

    Source: ByteTransformer (arXiv 2210.03052), which removes padding for inference.
    """
    check_bool("output_packed", output_packed)
    if sentences.is_sentence_transformer(model):
        return sentences.padding_free(model, output_packed, padding_free)
    sentences.check_other(model)
    check_whole(model)
    family = family_of(model)
    if any(STATE in module.__dict__ for module in model.modules()):
        restore_padding(model)
    check_stock("the model", model, family.kind)
    backbone = model.base_model
    head = head_of(model)
    if output_packed and model is not backbone:
        head.check_output_packed(model)
    family.check(backbone)
    forwards: dict[nn.Module, Callable[..., Any]]
    forwards = dict.fromkeys(family.layers(backbone).values(), layer_forward)
    if model is not backbone:
        forwards[model] = head_forward
    forwards[backbone] = backbone_forward
    state = State(head, family, output_packed)
    for module, forward in forwards.items():
        module.__dict__[STATE] = state
        module.forward = bound(forward, module)
    return model


def restore_padding(model: Any) -> Any:
    """Undo ``padding_free``: give the model its own forwards back. Returns the same model.

    Raises:
        ValueError: the model is not padding-free, or a forward was replaced since.
    """
    modules = model.modules() if isinstance(model, nn.Module) else ()
    patched = [m for m in modules if STATE in m.__dict__]
    if not patched:
        raise ValueError(f"{type(model).__name__} is not a padding-free model")
    for module in patched:
        if getattr(module.forward, "func", None) not in _OURS:
            raise ValueError(
                f"{type(module).__name__}.forward was replaced after vs.padding_free; undo that "
                "first"
            )
    for module in patched:
        del module.__dict__[STATE], module.forward
    return model
