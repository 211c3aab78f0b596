"""The shapes that the head is measured on with a GPU, what it is compared with there, its bars."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

import varstream as vs

from . import peers
from .case import OURS, Bar, Peer, Shape, floor

TOLERANCE = 2e-2  # bfloat16 against float32
QUICK = {"rows": 304, "width": 32, "classes": 520}

# Time over the matrix products, on the device that the bars are stated for.
BARRED_DEVICE = "H100"
PER_TOKEN_OVER_GEMM = 1.08
FORWARD_OVER_GEMM = 1.12
# A chunk takes at most 1 GiB; the rest is for vectors over the rows and a chunk's rows of x.
CHUNK_GIB = 1.05


def sizes(rows: int, width: int, classes: int) -> dict[str, int]:
    return {"rows": rows, "width": width, "classes": classes}


MAIN = sizes(8192, 4096, 128256)
# By what the names of their cases end with; the first is plain.
SHAPES: Mapping[str, Shape] = {
    "": MAIN,
    **{f"_rows_{rows}": MAIN | {"rows": rows} for rows in (1024, 2048, 4096, 16384)},
    "_classes_256000": sizes(8192, 2304, 256000),
    "_classes_151936": sizes(8192, 4096, 151936),
    "_classes_32000": sizes(4096, 1024, 32000),
}
# The bars of the loss and its gradients over the three matrix products.
OVER_GEMM: Mapping[str, float] = {"": 1.08, "_classes_256000": 1.10}

_PLAIN = (
    Peer("dense"),
    Peer("dense_compiled", peers.cuda),
    Peer("checkpointed_chunks"),
)
_FUSED = (
    Peer("torch_chunked", peers.torch_chunked),
    Peer("liger", peers.liger),
    Peer("cut_cross_entropy", peers.cut_cross_entropy),
    Peer("cut_cross_entropy_default", peers.cut_cross_entropy),
)


def _bf16_logits(call: Callable[..., Any]) -> Peer:
    """Ours with a chunk's logits stored in bfloat16, which only the CUDA kernels do."""
    return Peer("bf16_logits", peers.every(peers.cuda, peers.takes(call, "logits_dtype")))


def loss_peers(quack: str | None = None) -> tuple[Peer, ...]:
    """Of a loss; ``quack`` is the reason why that package is left out."""
    return (
        _bf16_logits(vs.linear_cross_entropy),
        *_PLAIN,
        Peer("dense_bf16"),
        *_FUSED,
        Peer("quack", peers.quack if quack is None else peers.never(quack)),
        floor("gemm_floor"),
    )


def logprob_peers(entropy: bool) -> tuple[Peer, ...]:
    """Of log-probabilities; the losses among them have no entropy."""
    return (
        _bf16_logits(vs.token_logprobs),
        *_PLAIN,
        Peer("trl_chunked", peers.trl),
        *(() if entropy else _FUSED),
        floor("gemm_floor"),
    )


def divergence_peers() -> tuple[Peer, ...]:
    """Of a divergence between two heads."""
    return (
        *_PLAIN,
        Peer("trl_chunked", peers.trl_divergence),
        Peer("liger", peers.liger),
        floor("gemm_floor"),
    )


def gemm_bar(limit: float | None) -> tuple[Bar, ...]:
    """Our time over the matrix products' in the same rounds."""
    return () if limit is None else (Bar("time/gemm_floor", limit, device=BARRED_DEVICE),)


CHUNK_BAR = Bar("beyond_gradients_gib", CHUNK_GIB)


def figures(
    peaks: Mapping[str, int], leaves: Sequence[Tensor], rows: int, classes: int
) -> dict[str, float]:
    """Our peak memory beyond the gradients.

    ``beyond_gradients_gib`` counts a weight's gradient in float32, in which chunks are summed, the
    input's as it is returned; ``beyond_returned_gib`` and ``memory_over_logits`` (over all logits
    in bfloat16) count both as they are returned.
    """
    returned = sum(t.nbytes for t in leaves)
    summed = returned + sum(2 * t.numel() for t in leaves[1:])  # 4 bytes an element in place of 2
    return {
        "beyond_gradients_gib": (peaks[OURS] - summed) / 2**30,
        "beyond_returned_gib": (peaks[OURS] - returned) / 2**30,
        "memory_over_logits": (peaks[OURS] - returned) / (rows * classes * 2),
    }


def flops(products: str, h: Tensor, weight: Tensor) -> int:
    """Operations of so many products of h (N, d) and weight (V, d)."""
    return 2 * len(products) * h.numel() * weight.shape[0]
