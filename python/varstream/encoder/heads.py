"""What a head does with padded positions, where a padding-free encoder has nothing to give.

Heads stay as they are. Those that transformers lets look at padding (position 0 of a left-padded
row, labels on padding, a softmax over all positions) would see zeros there and differ silently from
the padded model; those calls are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from varstream.encoder.families import FAMILIES
from varstream.streaming import UnsupportedModelError

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Head:
    """The rule for one class.

    Attributes:
        reads_first: it reads position 0 of each sequence.
        token_labels: its ``labels`` hold one class per position.
        row_labels: name of the labels that hold one value or class per sequence.
        over_positions: arguments of a loss that normalises over all positions.
    """

    reads_first: bool = False
    token_labels: bool = False
    row_labels: str | None = None
    over_positions: tuple[str, ...] = ()


_POSITIONWISE = Head(token_labels=True)
_FIRST = Head(reads_first=True, row_labels="labels")
_BY_SUFFIX = {
    "Model": Head(),  # a pooler, if it has one, reads position 0: see reads_first_position
    "ForMaskedLM": _POSITIONWISE,
    "ForTokenClassification": _POSITIONWISE,
    "ForSequenceClassification": _FIRST,
    "ForMultipleChoice": _FIRST,
    "ForQuestionAnswering": Head(over_positions=("start_positions", "end_positions")),
}
HEADS = {f.prefix + suffix: head for f in FAMILIES.values() for suffix, head in _BY_SUFFIX.items()}
HEADS["BertForPreTraining"] = Head(
    reads_first=True, token_labels=True, row_labels="next_sentence_label"
)
HEADS["BertForNextSentencePrediction"] = _FIRST
HEADS["ElectraForPreTraining"] = Head()  # its loss takes real positions only


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
