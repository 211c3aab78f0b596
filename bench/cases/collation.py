"""``batching.PackedCollator`` and ``batching.prefill``: documents from Python lists to one packed
row, and a padded batch of prompts to one."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from varstream import batching

from .. import peers
from ..case import Case, Peer, Setup, Shape
from .batching import LENGTHS, documents

VOCAB = 32000


def _tokens(shape: Shape, seed: int) -> list[Tensor]:
    """Documents (length,) of random tokens."""
    draw = torch.Generator().manual_seed(seed)
    lengths = documents(shape, seed)
    return list(torch.randint(VOCAB, (sum(lengths),), generator=draw).split(lengths))


def _concatenated(parts: list[Tensor]) -> list[Tensor]:
    """Tokens, positions (1, total) and starts (B+1,), a document after the other."""
    positions = torch.cat([torch.arange(len(part)) for part in parts])
    starts = torch.tensor([0, *accumulate(map(len, parts))], dtype=torch.int32)
    return [torch.cat(parts)[None], positions[None], starts]


def _columns(batch: dict[str, Any]) -> list[Tensor]:
    names = ("input_ids", "position_ids", "cu_seq_lens_q", "labels")
    return [batch[name] for name in names] + [torch.tensor(batch["max_length_q"])]


def _build_collator(shape: Shape, device: torch.device, seed: int) -> Setup:
    examples = [{"input_ids": tokens.tolist()} for tokens in _tokens(shape, seed)]

    def loop() -> list[Tensor]:
        parts = [torch.tensor(example["input_ids"]) for example in examples]
        labels = [part.clone() for part in parts]
        for part in labels:
            part[0] = -100
        longest = torch.tensor(max(map(len, parts)))
        return [*_concatenated(parts), torch.cat(labels)[None], longest]

    def flattening() -> dict[str, Any]:
        from transformers import DataCollatorWithFlattening

        found: dict[str, Any] = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(examples)
        return found

    collator = batching.PackedCollator()
    return Setup(
        runs={"varstream": lambda: collator(examples), "loop": loop, "transformers": flattening},
        results={"varstream": _columns, "transformers": _columns},
    )


def _build_prefill(shape: Shape, device: torch.device, seed: int) -> Setup:
    prompts = _tokens(shape, seed)
    ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_side="left")
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    mask = torch.arange(ids.shape[1]) >= ids.shape[1] - lengths[:, None]

    def loop() -> list[Tensor]:
        found = _concatenated([row[real] for row, real in zip(ids, mask, strict=True)])
        return [*found, found[2][1:] - 1]

    def columns(found: batching.Prefill) -> list[Tensor]:
        (row,) = found.rows
        assert row.input_ids is not None
        return [row.input_ids, row.position_ids, row.cu_seqlens, row.last]

    return Setup(
        runs={"varstream": lambda: batching.prefill(ids, mask), "loop": loop},
        results={"varstream": columns},
    )


CASES = (
    Case(
        "collation/packed_collator",
        "batching.PackedCollator",
        {"documents": 512, **LENGTHS["sft"]},
        _build_collator,
        {"documents": 7},
        dtype="int64",
        peers=(Peer("loop"), Peer("transformers", peers.module("transformers"))),
        reference="loop",
        tolerance=0.0,
        note="Python lists to one row; transformers: DataCollatorWithFlattening",
    ),
    Case(
        "collation/prefill",
        "batching.prefill",
        {"documents": 512, **LENGTHS["sft"]},
        _build_prefill,
        {"documents": 7},
        dtype="int64",
        peers=(Peer("loop"),),
        reference="loop",
        tolerance=0.0,
        note="a left-padded batch to one row in the given order",
    ),
)
