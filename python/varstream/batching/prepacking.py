"""Prepacking: the prompts of an inference batch in few packed rows, so that the prefill computes on
real tokens only (arXiv 2404.09529)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from varstream._arrays import int_array
from varstream._checks import INTEGERS, check_int, check_tensor
from varstream.batching.packing import best_fit_decreasing
from varstream.ops.packing import INT32_MAX, Packed, cu_seqlens, pack, unpack


@dataclass(frozen=True, eq=False)
class PrefillRow:
    """Some prompts, one after another, for one forward.

    Attributes:
        input_ids: (1, total) int64, or None when only lengths were given.
        position_ids: (1, total) int64, starting again at each prompt.
        cu_seqlens: (b + 1,) int32, where prompts start.
        max_seqlen: the longest prompt.
        prompts: (b,) int64, which prompt of the batch each is.
        last: (b,) int64, row of each prompt's last token.
    """

    input_ids: Tensor | None
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    prompts: Tensor
    last: Tensor

    def model_inputs(self) -> dict[str, Any]:
        """The row as a Hugging Face model takes it (no attention mask: documents are told apart by
        ``cu_seq_lens_*``, or by positions that start again)."""
        inputs: dict[str, Any] = {} if self.input_ids is None else {"input_ids": self.input_ids}
        return inputs | {
            "position_ids": self.position_ids,
            "cu_seq_lens_q": self.cu_seqlens,
            "cu_seq_lens_k": self.cu_seqlens,
            "max_length_q": self.max_seqlen,
            "max_length_k": self.max_seqlen,
        }


@dataclass(frozen=True, eq=False)
class Prefill:
    """A batch of prompts in packed rows, and the way back.

    Attributes:
        rows: the rows; every prompt is in exactly one.
        lengths: (B,) int64 on the CPU, tokens of each prompt.
        batch: B.
        seqlen: S, columns of the padded batch (the longest prompt when it came as a list).
        indices: (total,) int64, position in the flattened padded batch of every token of all rows,
            row after row.
    """

    rows: tuple[PrefillRow, ...]
    lengths: Tensor
    batch: int
    seqlen: int
    indices: Tensor

    def last_tokens(self, values: Tensor | Sequence[Tensor]) -> Tensor:
        """What each prompt's last token has, such as the hidden state that the next token is
        predicted from.

        Args:
            values: (total, ...) of one row, or a list with one such tensor per row.

        Returns:
            (B, ...) in the order of the batch. Differentiable.
        """
        checked = self._checked(values)
        found = [v.index_select(0, row.last) for v, row in zip(checked, self.rows, strict=True)]
        return torch.cat(found).index_select(0, self._turn())

    def split(self, values: Tensor | Sequence[Tensor]) -> list[Tensor]:
        """The rows of each prompt, such as its part of a layer's keys or values: B views
        (length, ...) in the order of the batch. Arguments as :meth:`last_tokens`."""
        parts: list[Tensor] = []
        for v, row in zip(self._checked(values), self.rows, strict=True):
            parts += v.split(self.lengths[row.prompts.cpu()].tolist())
        return [parts[i] for i in self._turn().tolist()]

    def unpack(self, values: Tensor | Sequence[Tensor], fill: float = 0.0) -> Tensor:
        """A padded batch (B, S, ...) with every token where it was, ``fill`` on padding.
        Arguments as :meth:`last_tokens`. Differentiable."""
        whole = torch.cat(self._checked(values))
        starts, longest = cu_seqlens(self.lengths), int(self.lengths.max())
        return unpack(
            Packed(whole, starts, longest, self.indices, self.batch, self.seqlen), fill=fill
        )

    def _turn(self) -> Tensor:
        """Where the prompts of the batch stand in the rows: (B,)."""
        return torch.cat([row.prompts for row in self.rows]).argsort()

    def _checked(self, values: Tensor | Sequence[Tensor]) -> list[Tensor]:
        given = [values] if isinstance(values, Tensor) else list(values)
        if len(given) != len(self.rows):
            raise ValueError(
                f"values must hold one tensor per row, {len(self.rows)}, got {len(given)}"
            )
        for i, (value, row) in enumerate(zip(given, self.rows, strict=True)):
            check_tensor(f"values[{i}]", value, device=self.indices.device)
            total = row.position_ids.shape[1]
            if value.dim() < 1 or value.shape[0] != total:
                raise ValueError(
                    f"values[{i}] must have the {total} tokens of its row (total, ...), "
                    f"got shape {tuple(value.shape)}"
                )
        return given


def prefill(
    prompts: Tensor | Sequence[Any] | None = None,
    attention_mask: Tensor | None = None,
    *,
    lengths: Any = None,
    capacity: int | None = None,
    first_position: int = 0,
) -> Prefill:
    """Pack the prompts of a batch, so that one variable-length forward per row replaces the padded
    prefill::

        p = batching.prefill(ids, mask)
        hidden = [model(**row.model_inputs(), use_cache=False).logits[0] for row in p.rows]
        next_logits = p.last_tokens(hidden)  # (B, V)

    Args:
        prompts: (B, S) int64 or int32 with ``attention_mask``, or a list of B prompts, each a list,
            array or tensor of token ids.
        attention_mask: (B, S), nonzero for real tokens; padding may stand anywhere. ``None`` with a
            tensor means that all tokens are real.
        lengths: (B,) tokens of each prompt, in place of ``prompts``: rows then have no
            ``input_ids``.
        capacity: tokens that a row may hold. Default: one row in the given order; otherwise rows
            are filled by :func:`best_fit_decreasing`.
        first_position: position of each prompt's first token (2 for RoBERTa's family).

    Returns:
        A :class:`Prefill`, on the device of ``prompts``.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: no prompt, a prompt without tokens (it has no last one), a prompt longer than
            ``capacity``, shapes or dtypes that don't fit.

    Source: Prepacking (arXiv 2404.09529), with best fit in place of its worst fit.
    """
    if (prompts is None) == (lengths is None):
        raise ValueError("exactly one of prompts and lengths must be given")
    check_int("first_position", first_position, low=0)
    if attention_mask is not None and not isinstance(prompts, Tensor):
        raise ValueError("attention_mask must come with prompts as a tensor (B, S)")
    ids, mask = _padded(prompts, attention_mask, lengths)
    packed = pack(mask if ids is None else ids, mask)
    counts = packed.cu_seqlens.diff().cpu().long()
    if counts.numel() == 0:
        raise ValueError("prompts must hold at least one prompt, got none")
    if not bool(counts.all()):
        at = int((counts == 0).nonzero()[0])
        raise ValueError(f"prompt {at} must have at least one token, got none")
    if capacity is None:
        bins = [np.arange(len(counts))]
    else:
        bins = list(best_fit_decreasing(counts, capacity).bins)
    tokens = None if ids is None else packed.values
    rows, order = [], []
    for members in bins:
        row, picked = _row(members, counts, packed.cu_seqlens, tokens, first_position)
        rows.append(row)
        order.append(picked)
    indices = packed.indices[torch.cat(order)]
    return Prefill(tuple(rows), counts, mask.shape[0], mask.shape[1], indices)


def _padded(
    prompts: Any, attention_mask: Tensor | None, lengths: Any
) -> tuple[Tensor | None, Tensor]:
    """Token ids (B, S), or None, and the mask (B, S) of a batch in whatever form."""
    if isinstance(prompts, Tensor):
        check_tensor("prompts", prompts, ndim=2, dtypes=INTEGERS, layout="(B, S)")
        if attention_mask is None:
            return prompts, torch.ones_like(prompts, dtype=torch.bool)
        return prompts, attention_mask  # pack checks it
    if prompts is None:
        counts = int_array("lengths", lengths)
        if counts.size and counts.min() < 0:
            at = int((counts < 0).argmax())
            raise ValueError(f"lengths must be >= 0, got {counts[at]} at index {at}")
        given = []
    else:
        if not isinstance(prompts, Sequence) or isinstance(prompts, (str, bytes)):
            raise TypeError(
                f"prompts must be a tensor (B, S) or a list of prompts, got "
                f"{type(prompts).__name__}"
            )
        given = [int_array(f"prompt {i}", prompt) for i, prompt in enumerate(prompts)]
        counts = np.array([len(prompt) for prompt in given], dtype=np.int64)
    longest = int(counts.max(initial=0))
    if len(counts) * longest > INT32_MAX:
        raise ValueError(
            f"prompts must have B * S < 2**31 as a padded batch, got {len(counts)} * {longest}"
        )
    mask = np.arange(longest) < counts[:, None]
    if prompts is None:
        return None, torch.from_numpy(mask)
    ids = np.zeros(mask.shape, dtype=np.int64)
    if given:
        ids[mask] = np.concatenate(given)
    return torch.from_numpy(ids), torch.from_numpy(mask)


def _row(
    members: np.ndarray, counts: Tensor, cu: Tensor, tokens: Tensor | None, first_position: int
) -> tuple[PrefillRow, Tensor]:
    """One row of prompts ``members``, and which packed tokens (total,) it takes."""
    device = cu.device
    prompts = torch.from_numpy(np.ascontiguousarray(members))
    own = counts[prompts]
    starts = cu_seqlens(own)
    within = torch.arange(int(own.sum())) - starts[:-1].long().repeat_interleave(own)
    picked = within.to(device) + cu.long()[prompts.to(device)].repeat_interleave(own.to(device))
    row = PrefillRow(
        None if tokens is None else tokens[picked].long()[None],
        (within + first_position).to(device)[None],
        starts.to(device),
        int(own.max()),
        prompts.to(device),
        (starts[1:].long() - 1).to(device),
    )
    return row, picked
