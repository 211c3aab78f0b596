"""Shapes of many families for the planner's tests, and what a step of them is measured to take."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM

import varstream as vs
from varstream.testing import peak_memory

BF16 = torch.bfloat16


def sizes(d: int, f: int, layers: int, heads: int, kv_heads: int, vocab: int) -> dict[str, int]:
    return {
        "hidden_size": d,
        "intermediate_size": f,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": 8192,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def build(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_config(config, dtype=dtype).train()


def packed(lengths: list[int], vocab: int) -> dict[str, torch.Tensor]:
    """One row of documents with position ids."""
    ids = torch.randint(vocab, (1, sum(lengths)))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    labels = ids.masked_fill(positions == 0, -100)
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


def padded(lengths: list[int], width: int, vocab: int) -> dict[str, torch.Tensor]:
    """A batch with a document and padding in each row."""
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(vocab, mask.shape)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def measure(model: Any, batch: dict[str, Any], chunk_size: Any = "auto", **options: Any) -> int:
    """Measured peak of one streamed step."""
    vs.stream(model, chunk_size=chunk_size, **options)
    return peak_memory(lambda: model(**batch).loss.backward())
