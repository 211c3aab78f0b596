"""``vs.varlen_attention`` forward on a GPU: equal lengths, ragged packs, short sequences, and the
kernel that lists the tiles.

FlashAttention-2, which the bars compare with, is its package where that is installed, and always
torch's copy of it: SDPA's flash backend over equal lengths, ``varlen_attn`` over packs. The floor
is a rate: the operations of the visible scores (4 each a head and element of the head dimension) at
the speed of a large matrix product measured in the same rounds. Nothing here has run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from .. import attention_ways as ways
from .. import floors, lengths, peers, timers
from ..case import OURS, Bar, Case, Peer, Setup, Shape, floor

BACKEND = torch.nn.attention.SDPBackend
TOLERANCE = 2e-2
# At least 90 % of FlashAttention-2's speed.
TIME_OVER_FLASH = 1 / 0.9
TOKENS = 16384
HIDDEN = 2048
SEED_OF_LENGTHS = 20  # one draw for all packs: it is the same case wherever it runs

Lengths = Callable[[Shape], tuple[int, ...]]
Way = Callable[[ways.Pack], Any]
WAYS: Mapping[str, Way] = {
    OURS: ways.ours,
    "float32": ways.float32,
    "sdpa_flash": partial(ways.dense_sdpa, BACKEND.FLASH_ATTENTION),
    "sdpa_cudnn": partial(ways.dense_sdpa, BACKEND.CUDNN_ATTENTION),
    "sdpa_efficient": partial(ways.dense_sdpa, BACKEND.EFFICIENT_ATTENTION),
    "padded_sdpa": partial(ways.padded_sdpa, None),
    "padded_cudnn": partial(ways.padded_sdpa, BACKEND.CUDNN_ATTENTION),
    "nested_sdpa": ways.nested_sdpa,
    "flex_attention": ways.flex_attention,
    "torch_varlen": ways.torch_varlen,
    "flash_attn": ways.flash_attn,
    "flash_attn_3": ways.flash_attn_3,
}


def _equal(shape: Shape) -> tuple[int, ...]:
    return lengths.dense(shape["tokens"], shape["seqlen"])


def _ragged(shape: Shape) -> tuple[int, ...]:
    return lengths.ragged(shape["tokens"], SEED_OF_LENGTHS)


def _short(shape: Shape) -> tuple[int, ...]:
    return lengths.short(shape["tokens"], SEED_OF_LENGTHS)


def _pack(
    lengths_of: Lengths, causal: bool, shape: Shape, device: torch.device, seed: int
) -> ways.Pack:
    heads = shape["heads"], shape["kv_heads"], shape["head_dim"]
    return ways.draw(lengths_of(shape), causal, *heads, torch.bfloat16, device, seed)


def _run(way: Way, pack: ways.Pack) -> Any:
    with torch.no_grad():
        return way(pack)


def _build(
    lengths_of: Lengths, causal: bool, shape: Shape, device: torch.device, seed: int
) -> Setup:
    p = _pack(lengths_of, causal, shape, device, seed)
    flops = lengths.forward_flops(p.lengths, causal, shape["heads"], shape["head_dim"])
    product, scale = floors.gemm_rate(flops, p.q.dtype, device)
    return Setup(
        runs={
            **{name: partial(_run, way, p) for name, way in WAYS.items()},
            "gemm_rate": product,
        },
        results={name: p.unpad for name in ("padded_sdpa", "padded_cudnn")},
        scales={"gemm_rate": scale},
        figures=lambda peaks, ours: {
            "sequences": len(p.lengths),
            "fill": sum(p.lengths) / (len(p.lengths) * p.longest),
        },
        flops=flops,
        operand_bytes=2 * p.q.nbytes + p.k.nbytes + p.v.nbytes,
    )


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


def _case(
    name: str,
    lengths_of: Lengths,
    shape: Shape,
    causal: bool,
    compared: tuple[Peer, ...],
    flash: str,
    note: str,
) -> Case:
    """``flash``: the run that is torch's copy of FlashAttention-2."""
    quick = {"tokens": 320, "heads": 4, "kv_heads": shape["kv_heads"] * 4 // shape["heads"] or 1}
    if "seqlen" in shape:
        quick["seqlen"] = 40
    return Case(
        f"attention_forward/{name}",
        "varlen_attention",
        shape,
        partial(_build, lengths_of, causal),
        {**quick, "head_dim": 16},
        dtype="bfloat16",
        devices=("cuda",),
        peers=(*compared, floor("gemm_rate")),
        bars=tuple(Bar(f"time/{run}", TIME_OVER_FLASH) for run in (flash, "flash_attn")),
        reference="float32",
        tolerance=TOLERANCE,
        note=f"{'causal, ' if causal else ''}forward; {note}; {flash} is FlashAttention-2",
    )


def _kind(causal: bool) -> str:
    return "causal" if causal else "full"


def _dense(seqlen: int, head_dim: int, causal: bool) -> Case:
    heads = HIDDEN // head_dim
    return _case(
        f"dense_{seqlen}_hd{head_dim}_{_kind(causal)}",
        _equal,
        _shape(TOKENS, heads, heads, head_dim) | {"seqlen": seqlen},
        causal,
        (*DENSE, *PACKED, FLEX if seqlen == 4096 else NO_FLEX),
        "sdpa_flash",
        f"{TOKENS // seqlen} sequences of one length",
    )


def _shape(tokens: int, heads: int, kv_heads: int, head_dim: int) -> dict[str, int]:
    return {"tokens": tokens, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}


HEADS = {"mha_hd64": (32, 32, 64), "mha_hd128": (16, 16, 128), "gqa_hd128": (64, 8, 128)}


def _packed(tokens: int, heads: str, causal: bool = True) -> Case:
    return _case(
        f"ragged_{tokens}_{heads}_{_kind(causal)}",
        _ragged,
        _shape(tokens, *HEADS[heads]),
        causal,
        (*PACKED, *PADDED, FLEX),
        "torch_varlen",
        "documents, 47 % below 500 tokens, 71 % below 1024, 87 % below 2048, cut to a quarter of "
        "the pack",
    )


def _sentences(heads: int) -> Case:
    return _case(
        f"short_{heads}_heads",
        _short,
        _shape(TOKENS, heads, heads, 64),
        False,
        (*PACKED, *PADDED, FLEX),
        "torch_varlen",
        "8 to 128 tokens a sequence, as in an encoder",
    )


# --- the tile schedule ----------------------------------------------------------------------------


def _build_schedule(lengths_of: Lengths, shape: Shape, device: torch.device, seed: int) -> Setup:
    p = _pack(lengths_of, True, shape, device, seed)
    run = partial(_run, ways.ours, p)

    def figures(peaks: Mapping[str, int], ours: Any) -> dict[str, float]:
        found = {"sequences": float(len(p.lengths))}
        if device.type == "cuda":
            names = {"schedule": "varlen::TileSchedule", "attention": "attention::Forward"}
            for figure, kernel in names.items():
                seconds = timers.kernel_seconds(run, kernel)
                if seconds is not None:
                    found[f"{figure}_us"] = seconds * 1e6
        return found

    return Setup(
        runs={OURS: run, "float32": partial(_run, ways.float32, p)},
        figures=figures,
        operand_bytes=4 * p.q.nbytes,
    )


def _schedule(name: str, lengths_of: Lengths, tokens: int, seqlen: int = 0) -> Case:
    shape = _shape(tokens, 1, 1, 64) | ({"seqlen": seqlen} if seqlen else {})
    return Case(
        f"tile_schedule/{name}",
        "varlen_attention",
        shape,
        partial(_build_schedule, lengths_of),
        {"tokens": 320, "head_dim": 16} | ({"seqlen": 320} if seqlen else {}),
        dtype="bfloat16",
        devices=("cuda",),
        reference="float32",
        tolerance=TOLERANCE,
        note="one head, causal; schedule_us and attention_us are the two kernels alone, by torch's "
        "profiler; the time is that of the whole call",
    )


CASES = (
    *(
        _dense(seqlen, head_dim, causal)
        for seqlen in (512, 1024, 2048, 4096, 8192, 16384)
        for head_dim in (64, 128)
        for causal in (True, False)
    ),
    *(_packed(1024 * k, heads) for k in (1, 4, 16, 32) for heads in HEADS),
    *(_packed(1024 * k, "gqa_hd128", causal) for k, causal in ((2, True), (8, True), (16, False))),
    *(_sentences(heads) for heads in (12, 16)),
    _schedule("sentences", _short, 1 << 19),
    _schedule("documents", _ragged, 1 << 18),
    _schedule("one_long", _equal, 1 << 17, 1 << 17),
)
