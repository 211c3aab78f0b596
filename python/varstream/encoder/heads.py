"""What a head reads of an encoder's output, and what it does with padded positions, where a
padding-free encoder has nothing to give.

Heads stay as they are. Those that work position by position run on packed rows, as one sequence of
all tokens, and those that read one row of each sequence get that row. Calls in which transformers
lets a head look at padding (labels on padding, a softmax over all positions) would differ silently
from the padded model; they are refused. A padded position 0 that is read is kept among the packed
rows, unless the family can't tell what its model gives there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from torch import Tensor

from varstream.encoder.families import FAMILIES
from varstream.streaming import UnsupportedModelError

IGNORE_INDEX = -100


class Form(Enum):
    """How an encoder hands out its last hidden states."""

    PADDED = "(B, S, d), 0 on padding"
    PACKED = "a varstream.Packed"
    ROWS = "(1, total, d)"
    TOKENS = "(1, total, d), and no pooler"
    FIRST = "(B, 1, d), position 0 of each sequence"
    MEAN = "(B, 1, d), the mean of each sequence"


@dataclass(frozen=True)
class Head:
    """The rule for one class.

    Attributes:
        form: what its own forward needs of the encoder.
        reads_first: it reads position 0 of each sequence.
        token_labels: its ``labels`` hold one class per position, on padding too.
        row_labels: name of the labels that hold one value or class per sequence.
        over_positions: arguments of a loss that normalises over all positions.
        positions: field of its output that holds something for every position.
    """

    form: Form = Form.PADDED
    reads_first: bool = False
    token_labels: bool = False
    row_labels: str | None = None
    over_positions: tuple[str, ...] = ()
    positions: str = "logits"

    def check_output_packed(self, model: Any) -> None:
        """Refuse packed output where the head has no output of that kind."""
        if self.form is not Form.ROWS:
            raise UnsupportedModelError(
                f"{type(model).__name__} can't return output_packed: its outputs aren't one row a "
                f"token; call its encoder (model.{model.base_model_prefix})"
            )


_POSITIONWISE = Head(Form.ROWS, token_labels=True)
_FIRST = Head(Form.FIRST, reads_first=True, row_labels="labels")
_BY_SUFFIX = {
    "Model": Head(),  # a pooler, if it has one, reads position 0
    "ForMaskedLM": _POSITIONWISE,
    "ForTokenClassification": _POSITIONWISE,
    "ForSequenceClassification": _FIRST,
    "ForMultipleChoice": _FIRST,
    "ForQuestionAnswering": Head(over_positions=("start_positions", "end_positions")),
}
HEADS = {f.prefix + suffix: head for f in FAMILIES.values() for suffix, head in _BY_SUFFIX.items()}
_PRETRAINING = Head(Form.ROWS, reads_first=True, token_labels=True, positions="prediction_logits")
HEADS["BertForPreTraining"] = replace(_PRETRAINING, row_labels="next_sentence_label")
HEADS["AlbertForPreTraining"] = replace(_PRETRAINING, row_labels="sentence_order_label")
HEADS["BertForNextSentencePrediction"] = _FIRST
HEADS["ElectraForPreTraining"] = Head(Form.ROWS)  # its loss takes real positions only
# It looks for the first token itself, wherever a row is padded.
HEADS["ModernBertForMultipleChoice"] = Head(row_labels="labels")
_MEAN = Head(Form.MEAN, row_labels="labels")


def head_of(model: Any) -> Head:
    """The rule for a model.

    Raises:
        UnsupportedModelError: the class isn't known, or reads more than position 0.
    """
    name = type(model).__name__
    if name not in HEADS:
        raise UnsupportedModelError(
            f"{name} is a head that vs.padding_free doesn't understand; pass its encoder "
            f"(model.{getattr(model, 'base_model_prefix', 'base_model')})"
        )
    summary = getattr(model, "sequence_summary", None)
    if summary is not None and summary.summary_type != "first":
        raise UnsupportedModelError(
            f"sequence_summary.summary_type is {summary.summary_type!r}, which reads padding; "
            "vs.padding_free understands 'first'"
        )
    if name == "ModernBertForSequenceClassification" and model.config.classifier_pooling == "mean":
        return _MEAN
    return HEADS[name]


def check_call(head: Head, given: Mapping[str, Any]) -> None:
    """Check the arguments of a head's forward against its rule.

    Raises:
        ValueError: names the argument that can't be honoured on this padded batch.
    """
    mask = given.get("attention_mask")
    if not isinstance(mask, Tensor):
        return
    padding = mask == 0
    for name in head.over_positions:
        if given.get(name) is not None and bool(padding.any()):
            raise ValueError(
                f"{name} can't be honoured on a padded batch: the loss normalises over padded "
                "positions; compute it from the logits of real positions"
            )
    if head.row_labels is not None:
        _check_empty_rows(head.row_labels, given.get(head.row_labels), padding)
    labels = given.get("labels")
    if head.token_labels and isinstance(labels, Tensor) and labels.shape == mask.shape:
        odd = (labels != IGNORE_INDEX) & padding
        if bool(odd.any()):
            row, column = odd.nonzero()[0].tolist()
            raise ValueError(
                f"labels must be {IGNORE_INDEX} on padding, got {int(labels[row, column])} at "
                f"row {row}, position {column}"
            )


def _check_empty_rows(name: str, labels: Any, padding: Tensor) -> None:
    """Refuse to train a head on a sequence (B, S), or a choice of several (B, choices, S), without
    a single token: what it reads there is padding."""
    empty = padding.all(-1)
    if empty.dim() > 1:
        empty = empty.flatten(1).any(1)  # (B,)
    if not isinstance(labels, Tensor) or labels.shape[:1] != empty.shape:
        return
    if labels.is_floating_point() or labels.numel() != empty.numel():  # has no class to ignore
        if bool(empty.any()):
            raise ValueError(
                f"{name} can't be honoured: row {int(empty.nonzero()[0])} is all padding, which "
                "the head would read; leave it out"
            )
        return
    classes = labels.reshape(-1)
    if bool((odd := empty & (classes != IGNORE_INDEX)).any()):
        row = int(odd.nonzero()[0])
        raise ValueError(
            f"{name} must be {IGNORE_INDEX} where a row is all padding, got {int(classes[row])} "
            f"in row {row}"
        )
