"""Collation of documents into one packed row, in the form Hugging Face models take."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor

from varstream._arrays import host_array, int_array
from varstream._checks import check_int, check_mask_values
from varstream.ops.packing import INT32_MAX

_KNOWN = ("input_ids", "labels", "attention_mask")
_MADE = ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


class PackedCollator:
    """Concatenates documents into one row without padding: a ``collate_fn``.

    Give it the documents of one bin at a time::

        packs = batching.best_fit_decreasing(lengths, capacity=8192).shuffled(seed=epoch)
        loader = DataLoader(dataset, batch_sampler=packs.bins, collate_fn=PackedCollator())

    Each example is a mapping with ``input_ids`` (length,) and, when they differ from them,
    ``labels`` (length,): lists, arrays or tensors. Tokens whose ``attention_mask`` is 0 are left
    out. An empty document stays as a sequence of length 0.

    A call returns, for ``total`` tokens in B documents:

    - ``input_ids`` (1, total) int64;
    - ``labels`` (1, total) int64, not shifted (the model shifts); the first token of each document
      is ``ignore_index``, so that no document predicts the next one;
    - ``position_ids`` (1, total) int64, starting again at each document;
    - ``cu_seq_lens_q``, ``cu_seq_lens_k`` (B + 1,) int32, where documents start;
    - ``max_length_q``, ``max_length_k`` int, the longest document, known without a device copy;
    - (1, total) for each name in ``extra``; float32 for lists of floats.

    Args:
        ignore_index: label that the loss leaves out.
        first_position: position of each document's first token (2 for RoBERTa's family).
        max_length: bound to report as ``max_length_*`` in place of the longest document; constant
            values keep compiled and captured code from being made again.
        extra: names of further per-token columns to concatenate, such as ``advantages``.
        ignored: names of columns to leave out. Any other column is refused.
    """

    def __init__(
        self,
        *,
        ignore_index: int = -100,
        first_position: int = 0,
        max_length: int | None = None,
        extra: Sequence[str] = (),
        ignored: Sequence[str] = (),
    ) -> None:
        self.extra = _names("extra", extra)
        self.ignored = frozenset(_names("ignored", ignored))
        for name in (*_KNOWN, *_MADE):
            if name in self.extra:
                raise ValueError(f"extra must not name what PackedCollator handles, got {name!r}")
        self.ignore_index = check_int("ignore_index", ignore_index)
        self.first_position = check_int("first_position", first_position, low=0)
        self.max_length = None if max_length is None else check_int("max_length", max_length, low=0)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate ``examples``; see the class for what comes back.

        Raises:
            TypeError: examples that are no sequence, an example that is no mapping, tokens that
                are no integers, a column that holds no numbers or has a dtype that NumPy lacks.
            ValueError: no examples, a column missing, unknown or of another length, a document
                longer than ``max_length``; the message names the example.
        """
        if not isinstance(examples, Sized) or isinstance(examples, Mapping):
            raise TypeError(
                f"examples must be a sequence of mappings, got {type(examples).__name__}"
            )
        if len(examples) == 0:
            raise ValueError("examples must hold at least one example, got none")
        documents = [self._document(i, example) for i, example in enumerate(examples)]
        lengths = np.array([len(d["input_ids"]) for d in documents], dtype=np.int64)
        starts = np.concatenate(([0], np.cumsum(lengths)))
        total, longest = int(starts[-1]), int(lengths.max())
        if total > INT32_MAX:
            raise ValueError(f"examples must hold fewer than 2**31 tokens, got {total}")
        if self.max_length is not None and longest > self.max_length:
            at = int(lengths.argmax())
            raise ValueError(
                f"example {at} must have at most max_length={self.max_length} tokens, got {longest}"
            )

        batch: dict[str, Any] = {
            name: _row([document[name] for document in documents]) for name in documents[0]
        }
        first_tokens = starts[:-1][lengths > 0]
        batch["labels"][0, torch.from_numpy(first_tokens)] = self.ignore_index
        positions = np.arange(total) - np.repeat(starts[:-1], lengths) + self.first_position
        batch["position_ids"] = torch.from_numpy(positions)[None]
        cu_seqlens = torch.from_numpy(starts.astype(np.int32))
        batch["cu_seq_lens_q"] = cu_seqlens
        batch["cu_seq_lens_k"] = cu_seqlens.clone()
        batch["max_length_q"] = batch["max_length_k"] = (
            longest if self.max_length is None else self.max_length
        )
        return batch

    def _document(self, index: int, example: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The checked per-token columns (length,) of one example."""
        if not isinstance(example, Mapping):
            raise TypeError(f"example {index} must be a mapping, got {type(example).__name__}")
        if "input_ids" not in example:
            raise ValueError(f"example {index} must have input_ids, got {sorted(example)}")
        unknown = set(example) - {*_KNOWN, *self.extra} - self.ignored
        if unknown:
            raise ValueError(
                f"example {index} has the column {min(unknown)!r}, which PackedCollator doesn't "
                "know: name it in extra (one value per token) or in ignored"
            )
        tokens = int_array(f"input_ids of example {index}", example["input_ids"])
        labels = example.get("labels")
        columns = {
            "input_ids": tokens,
            "labels": tokens if labels is None else int_array(f"labels of example {index}", labels),
        }
        for name in self.extra:
            if name not in example:
                raise ValueError(f"example {index} must have {name}, got {sorted(example)}")
            columns[name] = _extra_array(f"{name} of example {index}", example[name])
        mask = example.get("attention_mask")
        kept = None
        if mask is not None:
            name = f"attention_mask of example {index}"
            given = host_array(name, mask)
            if given.dtype.kind == "f":
                check_mask_values(name, torch.tensor(given))
            kept = given != 0
        for name, column in (*columns.items(), ("attention_mask", kept)):
            if column is not None and column.shape[:1] != tokens.shape:
                raise ValueError(
                    f"{name} of example {index} must have one value per token, {len(tokens)}, "
                    f"got shape {column.shape}"
                )
        return columns if kept is None else {name: c[kept] for name, c in columns.items()}


def _names(argument: str, names: Any) -> tuple[str, ...]:
    """The names of columns; one name alone is taken for a mistake, not for its letters."""
    if isinstance(names, str):
        raise TypeError(f"{argument} must be a sequence of names, got the string {names!r}")
    if not isinstance(names, Iterable) or isinstance(names, Tensor):
        raise TypeError(f"{argument} must be a sequence of names, got {type(names).__name__}")
    names = tuple(names)
    for i, name in enumerate(names):
        if not isinstance(name, str):
            raise TypeError(f"{argument}[{i}] must be a str, got {type(name).__name__}")
    return names


def _extra_array(name: str, values: Any) -> np.ndarray:
    """An array of ``values``; floats without a dtype of their own become float32, as in torch."""
    array = host_array(name, values)
    untyped = array.dtype == np.float64 and not hasattr(values, "dtype")
    return array.astype(np.float32) if untyped else array


def _row(columns: list[np.ndarray]) -> Tensor:
    """Per-document columns (length, ...) -> (1, total, ...).

    Empty documents have no say in dtype and shape, and integers none beside floats.
    """
    columns = [c for c in columns if len(c)] or columns[:1]
    dtypes = [c.dtype for c in columns]
    dtype = np.result_type(*([d for d in dtypes if d.kind == "f"] or dtypes))
    return torch.from_numpy(np.concatenate(columns, dtype=dtype))[None]
