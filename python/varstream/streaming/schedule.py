"""The chunks of one packed batch with their cumulative lengths on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from varstream.planner.choose import CPU_CHUNK
from varstream.planner.plan import check_chunk
from varstream.streaming.chunks import Chunk, plan_chunks

CUDA_CHUNK = 4096


def resolve_chunk_size(chunk_size: int | str, device: torch.device) -> int:
    """Rows of a layer chunk where nothing is known of the model; ``"auto"`` is 1024 on the CPU,
    4096 on CUDA, enough rows for full-speed GEMMs."""
    check_chunk("chunk_size", chunk_size)
    if isinstance(chunk_size, int):
        return chunk_size
    return CUDA_CHUNK if device.type == "cuda" else CPU_CHUNK


@dataclass(frozen=True)
class DeviceChunk:
    """A chunk whose cumulative lengths are on the device."""

    plan: Chunk
    cu_q: Tensor
    cu_k: Tensor

    @property
    def rows(self) -> slice:
        return slice(self.plan.begin, self.plan.end)

    @property
    def keys(self) -> slice:
        return slice(self.plan.key_begin, self.plan.end)

    def lengths(self) -> dict[str, Any]:
        """The length arguments of the attention ops."""
        return {
            "cu_seqlens_q": self.cu_q,
            "cu_seqlens_k": self.cu_k,
            "max_seqlen_q": self.plan.max_q,
            "max_seqlen_k": self.plan.max_k,
        }


@dataclass(frozen=True)
class Schedule:
    """The chunks of one packed batch, shared by all layers."""

    chunks: list[DeviceChunk]
    total: int

    @classmethod
    def make(cls, cu_seqlens: Sequence[int], chunk_size: int, device: torch.device) -> Schedule:
        """Plan chunks and put all their cumulative lengths on the device in one copy."""
        plans = plan_chunks(cu_seqlens, chunk_size)
        flat = [n for chunk in plans for n in (*chunk.cu_q, *chunk.cu_k)]
        lengths = torch.tensor(flat, dtype=torch.int32).to(device, non_blocking=True)
        chunks, at = [], 0
        for chunk in plans:
            entries = len(chunk.cu_q)
            cu_q, cu_k = lengths[at : at + 2 * entries].view(2, entries)
            chunks.append(DeviceChunk(chunk, cu_q, cu_k))
            at += 2 * entries
        return cls(chunks, cu_seqlens[-1])
