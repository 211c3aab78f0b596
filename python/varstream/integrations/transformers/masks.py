"""The mask that goes with ``attn_implementation="varstream"``: which rows are real, which belong
together and how far they see, found once a forward and shared by all layers.

transformers describes a mask by a function of indices. Its own patterns (causal, bidirectional,
sliding windows, packed documents) are recognised by their construction; anything else is refused
by name, so nothing that a model asks for is dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import masking_utils

from varstream._checks import check_mask_values

ELSEWHERE = 'use attn_implementation="sdpa" or "eager" for it'


@dataclass(frozen=True, eq=False)
class RowMask:
    """What each layer of a model gets as its ``attention_mask``.

    Attributes:
        causal: hide keys after the query.
        window: keys visible to the left and right of the query, -1 for all.
        cu_seqlens_q, cu_seqlens_k: int32 (n+1,), the packed sequences of queries and of keys.
        max_seqlen_q, max_seqlen_k: their longest lengths.
        indices_q, indices_k: int64, rows of the flattened (batch, length) that are real; None for
            all of them.
        batch, q_length, kv_length: sizes of the padded batch that this mask is for.
        positions_decide: nothing was said of padding or documents, so that position ids, should
            they restart, are the documents' (see ``split_at_restarts``).
        memo: what ``split_at_restarts`` found for the position ids of this forward.
    """

    causal: bool
    window: tuple[int, int]
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    indices_q: Tensor | None
    indices_k: Tensor | None
    batch: int
    q_length: int
    kv_length: int
    positions_decide: bool = False
    memo: list[tuple[Tensor, RowMask]] = field(default_factory=list)

    # The four names by which generate (with a static cache) and accelerate treat it as a mask.
    ndim = 4

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, 1, self.q_length, self.kv_length

    def contiguous(self) -> RowMask:
        return self

    def to(self, device: torch.device | str, non_blocking: bool = False) -> RowMask:
        values = ((entry.name, getattr(self, entry.name)) for entry in fields(self))
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=non_blocking)
            for name, value in values
            if isinstance(value, Tensor)
        }
        return replace(self, memo=[], **moved)


class Pattern(NamedTuple):
    """What a mask function of transformers says, documents (B, S) being one number a document."""

    causal: bool
    window: tuple[int, int]
    documents: Tensor | None = None


@torch.compiler.disable(reason="the number of real tokens is a value in the data")
def varstream_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = masking_utils.causal_mask_function,
    attention_mask: Any = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **_: Any,
) -> RowMask:
    """The mask function of ``attn_implementation="varstream"``, called by transformers.

    Args:
        batch_size: B.
        q_length, kv_length: rows of the queries, and of the keys with their cache.
        q_offset: position of the first query; a tensor with a static cache.
        kv_offset: position of the first key (a sliding cache has dropped those before).
        mask_function: what transformers would evaluate at every (query, key).
        attention_mask: (B, positions so far), nonzero marks a real token; or None.
        use_vmap: True when the model or the user brought a mask function.
        config: the model's; tells whether there may be cross-attention.

    Raises:
        ValueError: a mask that packed rows can't express; the message names it.
    """
    if use_vmap:
        raise ValueError(
            f"mask {_describe(mask_function)} has an or_mask_function or and_mask_function, "
            f'which attn_implementation="varstream" does not evaluate; {ELSEWHERE}'
        )
    pattern = read_pattern(mask_function)
    if isinstance(attention_mask, RowMask):  # made before the forward, for a static cache
        if (attention_mask.causal, attention_mask.window) != (pattern.causal, pattern.window):
            raise ValueError(
                f"attention_mask was made for window {attention_mask.window}, causal "
                f"{attention_mask.causal}; the model asks for {_describe(mask_function)}"
            )
        return attention_mask
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            "attention_mask must be (B, S) of real tokens, "
            f"got shape {tuple(attention_mask.shape)}; {ELSEWHERE}"
        )
    if pattern.documents is not None:
        return rows_of_documents(pattern)
    padding = None
    if attention_mask is not None:
        check_mask_values("attention_mask", attention_mask)
        padding = _keys_of(attention_mask != 0, kv_length, kv_offset)
    start = q_offset - kv_offset
    if not pattern.causal:
        # Queries of a cross-attention have other padding than the keys, even at equal lengths.
        crossed = _may_cross_attend(config)
        own = not crossed and q_length == kv_length
        unfilled = isinstance(start, Tensor) or not (crossed or start + q_length == kv_length)
        if unfilled and padding is None:
            raise ValueError(
                f"a bidirectional mask over {kv_length} keys must come with an attention_mask when "
                "a static cache holds slots that are not filled yet, got None"
            )
        return rows_of_padding(
            pattern, batch_size, q_length, kv_length, padding, own=own, device=device
        )
    known = None if isinstance(q_offset, Tensor) else q_offset + q_length
    if attention_mask is not None and known is not None and attention_mask.shape[1] < known:
        raise ValueError(
            f"attention_mask must cover all {known} tokens, those in the cache included, "
            f"got shape {tuple(attention_mask.shape)}"
        )
    rows = rows_of_padding(
        pattern, batch_size, q_length, kv_length, padding, start=start, device=device
    )
    return replace(rows, positions_decide=attention_mask is None and q_length == kv_length)


# --- reading transformers' mask functions ---------------------------------------------------------


def read_pattern(mask_function: Callable) -> Pattern:
    """Recognise one of transformers' own mask functions.

    Raises:
        ValueError: it is none of those that packed rows express.
    """
    if mask_function is masking_utils.causal_mask_function:
        return Pattern(True, (-1, 0))
    if mask_function is masking_utils.bidirectional_mask_function:
        return Pattern(False, (-1, -1))
    parts = _closure(mask_function).get("mask_functions", ())
    if _name(mask_function) == "and_masks" and len(parts) == 2:
        overlay, base = parts
        cells, kind = _closure(overlay), _name(overlay)
        if kind == "sliding_window_overlay" and base is masking_utils.causal_mask_function:
            return Pattern(True, (_window(cells["sliding_window"]) - 1, 0))
        if (
            kind == "sliding_window_bidirectional_overlay"
            and base is masking_utils.bidirectional_mask_function
        ):
            return Pattern(False, (_window(cells["sliding_window"]),) * 2)
        if (
            kind == "packed_sequence_mask_function"
            and _name(base) == "remap_positions_for_packed_sequence"
        ):
            inner = read_pattern(_closure(base)["mask_function"])
            return inner._replace(documents=cells["packed_sequence_mask"])
    raise ValueError(
        f"mask {_describe(mask_function)} is none that packed rows express "
        f"(causal, bidirectional, sliding window, documents); {ELSEWHERE}"
    )


def _window(value: Any) -> int:
    if value < 1:
        raise ValueError(f"sliding_window must be >= 1, got {value}")
    return int(value)


def _closure(function: Callable) -> dict[str, Any]:
    cells = getattr(function, "__closure__", None)
    if not cells:
        return {}
    names = function.__code__.co_freevars
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}


def _name(function: Callable) -> str:
    """Name of the function of masking_utils that made (or is) this one, else its own full name."""
    name = getattr(function, "__qualname__", repr(function))
    if getattr(function, "__module__", None) != masking_utils.__name__:
        return f"{getattr(function, '__module__', '')}.{name}"
    return name.split(".")[0]


def _describe(function: Callable) -> str:
    cells = _closure(function)
    parts = [*cells.get("mask_functions", ()), *filter(callable, [cells.get("mask_function")])]
    inside = ", ".join(_describe(part) for part in parts)
    return f"{_name(function)}({inside})" if inside else _name(function)


# --- rows -----------------------------------------------------------------------------------------


def rows_of_documents(pattern: Pattern) -> RowMask:
    """Packed documents: every run of one number in ``documents`` (B, S) is a sequence."""
    documents = pattern.documents
    assert documents is not None
    batch, length = documents.shape
    first = torch.ones_like(documents[:, :1], dtype=torch.bool)  # no document spans two batch rows
    starts = torch.cat([first, documents.diff(dim=1) != 0], 1).flatten().nonzero().squeeze(1)
    cu = torch.nn.functional.pad(starts, (0, 1), value=batch * length).to(torch.int32)
    longest = int(cu.diff().max()) if starts.numel() else 0
    return RowMask(
        pattern.causal, pattern.window, cu, cu, longest, longest, None, None, batch, length, length
    )


@torch.compiler.disable(reason="the number of documents is a value in the data")
def split_at_restarts(rows: RowMask, position_ids: Any) -> RowMask:
    """The same visibility over the documents that restarting ``position_ids`` (B or 1, S) tell.

    Some models (gpt-oss) don't show their position ids to the mask function, and with a cache
    transformers doesn't look at them: documents would then see each other.
    """
    shapes = (rows.batch, rows.q_length), (1, rows.q_length)
    if not isinstance(position_ids, Tensor) or tuple(position_ids.shape) not in shapes:
        return rows
    for seen, result in rows.memo:
        if seen is position_ids:
            return result
    found = masking_utils.find_packed_sequence_indices(position_ids.expand(rows.batch, -1))
    pattern = Pattern(rows.causal, rows.window, found)
    result = rows if found is None else rows_of_documents(pattern)
    rows.memo.append((position_ids, result))
    return result


def rows_of_padding(
    pattern: Pattern,
    batch: int,
    q_length: int,
    kv_length: int,
    padding: Tensor | None,
    *,
    start: int | Tensor | None = None,
    own: bool = False,
    device: torch.device | str = "cpu",
) -> RowMask:
    """A padded batch: each of its rows is a sequence of its real tokens.

    Args:
        padding: bool (B, kv_length), true for real keys; None for all.
        start: causal masks: number of the first query's own key; keys past the last query's are
            not in use. None: bidirectional.
        own: bidirectional masks: the queries are the keys' own rows, so padding ones are left out.
    """
    if start is not None:
        end = start + q_length
        if not isinstance(end, Tensor) and end > kv_length:
            raise ValueError(f"the queries must end within the {kv_length} keys, got {end}")
        if isinstance(end, Tensor) or end < kv_length:
            # A static cache: slots past the last query hold nothing yet, and causality hides them.
            filled = torch.arange(kv_length, device=device) < end  # (kv_length,)
            padding = filled.expand(batch, -1) if padding is None else padding & filled
    window_hides = any(0 <= side < kv_length - 1 for side in pattern.window)
    if pattern.causal:
        window_hides = 0 <= pattern.window[0] < kv_length - 1
    elif window_hides and (q_length != kv_length or (padding is not None and not own)):
        raise ValueError(
            f"a bidirectional window {pattern.window} must belong to self-attention, "
            f"got {q_length} queries and {kv_length} keys that may be another sequence's; "
            f"{ELSEWHERE}"
        )
    if padding is not None and window_hides:
        _check_no_holes(padding, pattern.window)
    indices_k, cu_k, max_k = _real_rows(padding, batch, kv_length, device)
    if own:
        indices_q, cu_q, max_q = indices_k, cu_k, max_k
    else:
        real = None
        if start is not None and padding is not None:
            columns = torch.arange(q_length, device=padding.device) + start
            real = padding.index_select(1, columns)
        indices_q, cu_q, max_q = _real_rows(real, batch, q_length, device)
    return RowMask(
        pattern.causal,
        pattern.window,
        cu_q,
        cu_k,
        max_q,
        max_k,
        indices_q,
        indices_k,
        batch,
        q_length,
        kv_length,
    )


def _real_rows(
    real: Tensor | None, batch: int, length: int, device: torch.device | str
) -> tuple[Tensor | None, Tensor, int]:
    """Indices, cumulative lengths and longest of the true entries of ``real`` (B, length)."""
    if real is None or bool(real.all()):
        device = device if real is None else real.device
        cu = torch.arange(batch + 1, dtype=torch.int32, device=device) * length
        return None, cu, length
    lengths = real.sum(1)
    cu = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    return real.flatten().nonzero().squeeze(1), cu, int(lengths.max())


def _keys_of(padding: Tensor, kv_length: int, kv_offset: int) -> Tensor:
    """The columns of ``padding`` (B, positions) that stand for the keys, false past its end."""
    missing = kv_offset + kv_length - padding.shape[1]
    padding = torch.nn.functional.pad(padding, (0, max(missing, 0)))
    return padding[:, kv_offset : kv_offset + kv_length]


def _check_no_holes(padding: Tensor, window: tuple[int, int]) -> None:
    """Refuse padding between real tokens: a window counts it, packed rows don't."""
    before = torch.nn.functional.pad(padding[:, :-1], (1, 0))
    runs = (padding & ~before).sum(1)
    if bool((runs > 1).any()):
        at = int((runs > 1).nonzero()[0])
        raise ValueError(
            f"attention_mask must have no padding between real tokens under a sliding window "
            f"{window}, got some in row {at}; {ELSEWHERE}"
        )


def _may_cross_attend(config: Any) -> bool:
    if config is None:
        return True
    settings = {name: value for name, value in vars(config).items() if "cross" in name}
    flags = getattr(config, "is_encoder_decoder", False), getattr(config, "is_decoder", False)
    return any(flags) or any(settings.values())
