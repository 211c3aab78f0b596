"""``vs.varlen_attention_backward`` on a GPU as streaming calls it: a chunk of queries against a
long prefix, and the chunks of a sequence one after the other against one call.

dK and dV of our call are added into float32 buffers. ``torch_varlen``, ``flash_attn`` and
``flash_attn_3`` return theirs in bfloat16; ``torch_varlen_added`` adds them into such buffers, as a
loop over chunks has to. Operations and floor as in ``attention_backward``. Nothing here has run on
a GPU yet.
"""

from __future__ import annotations

from functools import partial

import torch

from .. import attention_grid as grid
from .. import attention_ways as ways
from .. import floors, lengths, peers
from ..attention_gradients import Accumulated, Added, Gradients, Run, Streamed, reference
from ..case import OURS, Bar, Case, Peer, Setup, Shape, floor

# All chunks over the same work in one call.
TIME_OVER_ONE_CALL = 1.05


def _flops(shape: Shape) -> int:
    """Operations of the visible scores of a case: a chunk behind a prefix, or a whole sequence."""
    if "prefix" in shape:
        pairs = lengths.chunk_pairs(shape["chunk"], shape["prefix"])
    else:
        pairs = lengths.visible_pairs([shape["tokens"]], causal=True)
    products = lengths.BACKWARD_PRODUCTS
    return lengths.flops(products, pairs, shape["heads"], shape["head_dim"])


def _draw(shape: Shape, device: torch.device, seed: int) -> ways.Pack:
    heads = shape["heads"], shape["kv_heads"], shape["head_dim"]
    rows, prefix = (shape["chunk"], shape["prefix"]) if "prefix" in shape else (shape["tokens"], 0)
    return ways.draw((rows,), True, *heads, grid.DTYPE, device, seed, prefix)


def _setup(shape: Shape, p: ways.Pack, runs: dict[str, Run], streamed: tuple[str, ...]) -> Setup:
    flops = _flops(shape)
    product, scale = floors.gemm_rate(flops, p.q.dtype, p.q.device)
    backwards = {name: Gradients(ways.WAYS[name], p) for name in FLASH}
    return Setup(
        runs={**runs, **backwards, "float32": partial(reference, p), "gemm_rate": product},
        results=dict.fromkeys(streamed, Streamed.whole),
        scales={"gemm_rate": scale},
        flops=flops,
        operand_bytes=3 * p.q.nbytes + 3 * p.k.nbytes + 3 * p.v.nbytes,  # buffers: twice the keys
    )


def _build_chunk(shape: Shape, device: torch.device, seed: int) -> Setup:
    p = _draw(shape, device, seed)
    added = Added(ways.torch_varlen, p)
    return _setup(shape, p, {OURS: Accumulated(p), "torch_varlen_added": added}, ())


def _build_sum(shape: Shape, device: torch.device, seed: int) -> Setup:
    p, size = _draw(shape, device, seed), shape["chunk"]
    runs: dict[str, Run] = {
        OURS: Streamed(p, size),
        "one_call": Accumulated(p),
        "torch_varlen_chunks": Streamed(p, size, ways.torch_varlen),
    }
    return _setup(shape, p, runs, (OURS, "torch_varlen_chunks"))


FLASH = tuple(peer.name for peer in grid.PACKED)


def _sizes(heads: str) -> dict[str, int]:
    query_heads, kv_heads, head_dim = grid.HEADS[heads]
    return {"heads": query_heads, "kv_heads": kv_heads, "head_dim": head_dim}


def _quick(shape: Shape) -> dict[str, int]:
    few = {"heads": 4, "kv_heads": shape["kv_heads"] * 4 // shape["heads"] or 1, "head_dim": 16}
    rows = {"prefix": 70} if "prefix" in shape else {"tokens": 150}
    return {"chunk": 40, **rows, **few}


def _chunk(chunk: int, prefix: int, heads: str) -> Case:
    shape = {"chunk": chunk, "prefix": prefix, **_sizes(heads)}
    return Case(
        f"attention_chunks/chunk_{chunk}_prefix_{prefix}_{heads}",
        "varlen_attention_backward",
        shape,
        _build_chunk,
        _quick(shape),
        dtype="bfloat16",
        devices=("cuda",),
        peers=(*grid.PACKED, Peer("torch_varlen_added", peers.varlen_attn), floor("gemm_rate")),
        bars=grid.flash_bars("torch_varlen"),
        reference="float32",
        tolerance=grid.TOLERANCE,
        note="causal; a chunk's backward, dK and dV of the prefix added into float32 buffers; "
        "torch_varlen is FlashAttention-2",
    )


def _sum(tokens: int, chunk: int, heads: str) -> Case:
    shape = {"tokens": tokens, "chunk": chunk, **_sizes(heads)}
    return Case(
        f"attention_chunks/sum_{tokens}_by_{chunk}_{heads}",
        "varlen_attention_backward",
        shape,
        _build_sum,
        _quick(shape),
        dtype="bfloat16",
        devices=("cuda",),
        peers=(
            Peer("one_call"),
            *grid.PACKED,
            Peer("torch_varlen_chunks", peers.varlen_attn),
            floor("gemm_rate"),
        ),
        bars=(Bar("time/one_call", TIME_OVER_ONE_CALL),),
        reference="float32",
        tolerance=grid.TOLERANCE,
        note="causal; the backward of one sequence in chunks, into the same buffers; one_call is "
        "ours over all of it, torch_varlen too",
    )


CASES = (
    *(_chunk(c, p, "gqa_hd128") for p in (8192, 16384, 32768, 65536) for c in (1024, 2048)),
    *(_chunk(c, 16384, heads) for c in (1024, 2048) for heads in ("mha_hd64", "mha_hd128")),
    *(_sum(16384, chunk, heads) for chunk in (1024, 2048) for heads in grid.HEADS),
    _sum(32768, 2048, "gqa_hd128"),
)
