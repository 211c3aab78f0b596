"""``vs.merge_attention``, and ``vs.varlen_attention_backward`` adding into its caller's buffers:
the two primitives under streaming, rings and shared prefixes."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

import varstream as vs

from .. import floors
from ..case import Case, Peer, Setup, Shape, floor


def _dense_merge(outs: list[Tensor], lses: list[Tensor]) -> list[Tensor]:
    """Weights exp(lse_i - logsumexp) on stacked parts, in plain PyTorch."""
    stacked, parts = torch.stack(outs), torch.stack(lses)  # (P, T, H, D), (P, H, T)
    lse = parts.logsumexp(0)
    weights = torch.exp(parts - lse).transpose(1, 2)[..., None]
    return [(stacked * weights).sum(0), lse]


def _build_merge(shape: Shape, device: torch.device, seed: int) -> Setup:
    draw = torch.Generator().manual_seed(seed)
    size = (shape["rows"], shape["heads"], shape["head_dim"])
    outs = [torch.randn(size, generator=draw).to(device) for _ in range(shape["parts"])]
    lses = [torch.randn(size[1], size[0], generator=draw).to(device) for _ in outs]
    wide = [t.double() for t in outs], [t.double() for t in lses]
    moved = (len(outs) + 1) * (outs[0].nbytes + lses[0].nbytes)
    return Setup(
        runs={
            "varstream": lambda: vs.merge_attention(outs, lses),
            "dense": lambda: _dense_merge(outs, lses),
            "float64": lambda: _dense_merge(*wide),
            "copy_floor": floors.copy(moved, device),
        },
        operand_bytes=moved,
    )


def _build_chunk(shape: Shape, device: torch.device, seed: int) -> Setup:
    """A chunk of queries at the end of a longer prefix, causal: one step of a streamed backward."""
    draw = torch.Generator().manual_seed(seed)
    chunk, keys, heads, width = (shape[n] for n in ("chunk", "keys", "heads", "head_dim"))

    def normal(rows: int) -> Tensor:
        return torch.randn(rows, heads, width, generator=draw).to(device)

    q, k, v, dout = normal(chunk), normal(keys), normal(keys), normal(chunk)
    cu_q, cu_k = (torch.tensor([0, n], dtype=torch.int32, device=device) for n in (chunk, keys))
    maxima = {"max_seqlen_q": chunk, "max_seqlen_k": keys, "causal": True}
    found: Any = vs.varlen_attention(q, k, v, cu_q, cu_k, return_lse=True, **maxima)
    out, lse = found
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    mask = torch.ones(chunk, keys, dtype=torch.bool, device=device).tril(keys - chunk)

    def reset() -> None:
        dk.zero_()
        dv.zero_()

    def ours() -> list[Tensor]:
        reset()
        dq = vs.varlen_attention_backward(
            dout, q, k, v, out, lse, cu_q, cu_k, dk=dk, dv=dv, **maxima
        )
        return [dq, dk, dv]

    def graph(dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (q, k, v)]
        batched = (t.transpose(0, 1)[None] for t in leaves)
        return leaves, sdpa(*batched, attn_mask=mask)[0].transpose(0, 1)

    leaves, formed = graph(q.dtype)

    def autograd() -> list[Tensor]:
        reset()
        dq, more_k, more_v = torch.autograd.grad(formed, leaves, dout, retain_graph=True)
        dk.add_(more_k)
        dv.add_(more_v)
        return [dq, dk, dv]

    def exact() -> list[Tensor]:
        wide, formed = graph(torch.float64)
        return list(torch.autograd.grad(formed, wide, dout.double()))

    pairs = chunk * (keys - chunk) + chunk * (chunk + 1) / 2
    product, scale = floors.gemm_rate(5 * 2 * pairs * heads * width, q.dtype, device)
    return Setup(
        runs={
            "varstream": ours,
            "autograd_sdpa": autograd,
            "float64": exact,
            "gemm_rate": product,
        },
        results={name: _copies for name in ("varstream", "autograd_sdpa")},
        scales={"gemm_rate": scale},
        operand_bytes=3 * q.nbytes + 4 * k.nbytes,
    )


def _copies(found: list[Tensor]) -> list[Tensor]:
    """The accumulators are written again by the next run."""
    return [t.clone() for t in found]


CASES = (
    Case(
        "merge/two_parts",
        "merge_attention",
        {"rows": 8192, "heads": 8, "head_dim": 64, "parts": 2},
        _build_merge,
        {"rows": 19, "heads": 2, "head_dim": 8},
        devices=("cpu", "cuda"),
        peers=(Peer("dense"), floor("copy_floor")),
        note="forward; floor: a copy of the bytes that must move",
    ),
    Case(
        "merge/eight_parts",
        "merge_attention",
        {"rows": 8192, "heads": 8, "head_dim": 64, "parts": 8},
        _build_merge,
        {"rows": 19, "heads": 2, "head_dim": 8},
        devices=("cpu", "cuda"),
        peers=(Peer("dense"), floor("copy_floor")),
        note="forward; floor: a copy of the bytes that must move",
    ),
    *(
        Case(
            f"attention_backward/{name}",
            "varlen_attention_backward",
            {"chunk": 512, "keys": keys, "heads": 8, "head_dim": 64},
            partial(_build_chunk),
            {"chunk": 7, "keys": 19, "heads": 2, "head_dim": 8},
            peers=(Peer("autograd_sdpa"), floor("gemm_rate")),
            note="adds into dk, dv; the peer's forward isn't timed",
        )
        for name, keys in (("first_chunk", 512), ("after_4k", 4096 + 512))
    ),
)
