"""The packs that attention is measured on with a GPU, forward and backward: equal lengths, ragged
packs, short sequences; the peers of each and its bars.

FlashAttention-2, which the bars compare with, is its package where that is installed, and always
torch's copy of it: SDPA's flash backend over equal lengths, ``varlen_attn`` over packs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import attention_ways as ways
from . import lengths, peers
from .case import Bar, Peer, Shape

DTYPE = torch.bfloat16
TOLERANCE = 2e-2
# At least 90 % of FlashAttention-2's speed.
TIME_OVER_FLASH = 1 / 0.9
TOKENS = 16384
HIDDEN = 2048
SEED_OF_LENGTHS = 20  # one draw for all packs: it is the same case wherever it runs

Lengths = Callable[[Shape], tuple[int, ...]]


def equal(shape: Shape) -> tuple[int, ...]:
    """``tokens / seqlen`` sequences of ``seqlen``."""
    return lengths.dense(shape["tokens"], shape["seqlen"])


def ragged(shape: Shape) -> tuple[int, ...]:
    """Documents of a corpus that fill ``tokens``."""
    return lengths.ragged(shape["tokens"], SEED_OF_LENGTHS)


def short(shape: Shape) -> tuple[int, ...]:
    """Sentences that fill ``tokens``."""
    return lengths.short(shape["tokens"], SEED_OF_LENGTHS)


@dataclass(frozen=True)
class Packing:
    """A pack by its lengths and sizes, and what is compared on it.

    Attributes:
        name: what the names of its cases end with.
        flash: the peer that is torch's copy of FlashAttention-2.
        note: what its lengths are.
    """

    name: str
    lengths_of: Lengths
    shape: Shape
    causal: bool
    compared: tuple[Peer, ...] = ()
    flash: str = ""
    note: str = ""

    @property
    def quick(self) -> dict[str, int]:
        heads, kv_heads = self.shape["heads"], self.shape["kv_heads"]
        seqlen = {"seqlen": 40} if "seqlen" in self.shape else {}
        few = {"heads": 4, "kv_heads": kv_heads * 4 // heads or 1}
        return {"tokens": 320, **seqlen, **few, "head_dim": 16}

    @property
    def bars(self) -> tuple[Bar, ...]:
        return flash_bars(self.flash)

    def draw(self, shape: Shape, device: torch.device, seed: int) -> ways.Pack:
        heads = shape["heads"], shape["kv_heads"], shape["head_dim"]
        return ways.draw(self.lengths_of(shape), self.causal, *heads, DTYPE, device, seed)

    def flops(self, products: int, shape: Shape) -> int:
        """Operations of so many matrix products over the visible scores."""
        pairs = lengths.visible_pairs(self.lengths_of(shape), self.causal)
        return lengths.flops(products, pairs, shape["heads"], shape["head_dim"])


def flash_bars(flash: str) -> tuple[Bar, ...]:
    """90 % of the speed of a run and of FlashAttention-2's package."""
    return tuple(Bar(f"time/{run}", TIME_OVER_FLASH) for run in (flash, "flash_attn"))


def figures(p: ways.Pack) -> dict[str, float]:
    """Sequences, and the part of a padded batch that is tokens."""
    return {"sequences": len(p.lengths), "fill": sum(p.lengths) / (len(p.lengths) * p.longest)}


DENSE = (
    Peer("sdpa_flash", peers.cuda),
    Peer("sdpa_cudnn", peers.cudnn),
    Peer("sdpa_efficient", peers.cuda),
)
PADDED = (
    Peer("padded_sdpa", peers.cuda),
    Peer("padded_cudnn", peers.cudnn),
    Peer("nested_sdpa", peers.cuda),
)
PACKED = (
    Peer("torch_varlen", peers.varlen_attn),
    Peer("flash_attn", peers.flash_attn),
    Peer("flash_attn_3", peers.flash_attn_3),
)
FLEX = Peer("flex_attention", peers.cuda)
NO_FLEX = Peer("flex_attention", peers.never("compiling takes a while: see dense_4096 and packs"))

HEADS = {"mha_hd64": (32, 32, 64), "mha_hd128": (16, 16, 128), "gqa_hd128": (64, 8, 128)}


def sizes(tokens: int, heads: int, kv_heads: int, head_dim: int) -> dict[str, int]:
    return {"tokens": tokens, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}


def kind(causal: bool) -> str:
    return "causal" if causal else "full"


def dense(seqlen: int, head_dim: int, causal: bool) -> Packing:
    """16k tokens in sequences of one length, as many heads as make 2048 columns."""
    heads = HIDDEN // head_dim
    return Packing(
        f"dense_{seqlen}_hd{head_dim}_{kind(causal)}",
        equal,
        sizes(TOKENS, heads, heads, head_dim) | {"seqlen": seqlen},
        causal,
        (*DENSE, *PACKED, FLEX if seqlen == 4096 else NO_FLEX),
        "sdpa_flash",
        f"{TOKENS // seqlen} sequences of one length",
    )


def packed(tokens: int, heads: str, causal: bool = True) -> Packing:
    """A ragged pack of documents."""
    return Packing(
        f"ragged_{tokens}_{heads}_{kind(causal)}",
        ragged,
        sizes(tokens, *HEADS[heads]),
        causal,
        (*PACKED, *PADDED, FLEX),
        "torch_varlen",
        "documents, 47 % below 500 tokens, 71 % below 1024, 87 % below 2048, cut to a quarter of "
        "the pack",
    )


def sentences(heads: int) -> Packing:
    """An encoder's short sequences."""
    return Packing(
        f"short_{heads}_heads",
        short,
        sizes(TOKENS, heads, heads, 64),
        False,
        (*PACKED, *PADDED, FLEX),
        "torch_varlen",
        "8 to 128 tokens a sequence, as in an encoder",
    )


GRID = (
    *(
        dense(seqlen, head_dim, causal)
        for seqlen in (512, 1024, 2048, 4096, 8192, 16384)
        for head_dim in (64, 128)
        for causal in (True, False)
    ),
    *(packed(1024 * k, heads) for k in (1, 4, 16, 32) for heads in HEADS),
    *(packed(1024 * k, "gqa_hd128", causal) for k, causal in ((2, True), (8, True), (16, False))),
    *(sentences(heads) for heads in (12, 16)),
)
