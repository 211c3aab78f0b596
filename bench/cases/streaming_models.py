"""Training steps of Qwen3 and Llama shapes over one row of tokens: streamed, against layers
checkpointed with transformers' own loss and against the strongest without streaming.

On the CPU widths and classes are a fraction of the real ones and there are four layers; the GPU's
cases have the real sizes with random weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from .. import lengths, peers
from ..case import Bar, Case, Peer, Setup, Shape
from . import streaming_baselines as ways

Sizes = dict[str, int]

REAL: dict[str, Sizes] = {
    "qwen3_4b": {"width": 2560, "inner": 9728, "layers": 36, "classes": 151936, "tied": 1},
    "qwen3_8b": {"width": 4096, "inner": 12288, "layers": 36, "classes": 151936, "tied": 0},
    "llama_8b": {"width": 4096, "inner": 14336, "layers": 32, "classes": 128256, "tied": 0},
}
HEADS = {"heads": 32, "kv_heads": 8, "head_dim": 128}  # of all three
FRACTION = {"qwen3_4b": 4, "qwen3_8b": 8, "llama_8b": 8}
TINY = {
    **{"width": 32, "inner": 48, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8},
    **{"classes": 97, "tokens": 45, "chunk": 16, "head_chunk": 16},
}
DOCUMENTS = ("packed", "single")
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
RANK = {"cpu": 8, "cuda": 32}  # of LoRA's factors; StreamBP's is 32
CHUNK = {"cpu": 512, "cuda": 4096}  # rows of a chunk, and of a tile of the MLP
HEAD_CHUNK = {"cpu": 256, "cuda": 1024}
CPU_TOKENS = (4096, 8192, 16384, 32768)
GPU_TOKENS = {"full": (8, 16, 32, 64), "lora": (8, 16, 32, 64, 128)}  # in 1024

# What must hold at 16k tokens on the CPU.
BARRED = 16384
BARS = (Bar("memory/checkpointing", 1 / 6), Bar("memory/tiled", 0.5), Bar("time/tiled", 1.0))
TOLERANCE = {"cpu": 1e-4, "cuda": 0.2}  # float32; bfloat16 against bfloat16
# All logits, two more of their size in the loss and their gradient, in float32.
LOGIT_BYTES = 4 * 4


def scaled(name: str) -> Sizes:
    """Widths and classes divided by one number, four layers; 4 queries to a key head, as before."""
    by, real = FRACTION[name], REAL[name]
    sizes = {key: real[key] // by for key in ("width", "inner", "classes")}
    heads = {"heads": 8, "kv_heads": 2, "head_dim": 4 * HEADS["head_dim"] // by}
    return {**sizes, "layers": 4, "tied": real["tied"], **heads}


def _config(name: str, shape: Shape) -> Any:
    from transformers import LlamaConfig, Qwen3Config

    kind: Any = Qwen3Config if name.startswith("qwen3") else LlamaConfig
    return kind(
        vocab_size=shape["classes"],
        hidden_size=shape["width"],
        intermediate_size=shape["inner"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        head_dim=shape["head_dim"],
        max_position_embeddings=shape["tokens"],
        tie_word_embeddings=bool(shape["tied"]),
    )


def _build(
    name: str, packed: bool, kind: str, shape: Shape, device: torch.device, seed: int
) -> Setup:
    dtype = DTYPE[kind]
    tokens, chunk, head_chunk = (shape[key] for key in ("tokens", "chunk", "head_chunk"))
    documents = lengths.ragged(tokens, seed) if packed else (tokens,)
    row = ways.Row.draw(documents, shape["classes"], device, seed)
    model = ways.language_model(_config(name, shape), dtype, device, seed)
    if rank := shape["rank"]:
        model = ways.with_adapters(model, rank, seed)
    runs = {
        "varstream": ways.streamed(model, chunk, head_chunk),
        "checkpointing": ways.checkpointing(model, packed),
        "tiled": ways.tiled(model, chunk, head_chunk),
    }
    if kind == "cuda":
        runs["offloaded"] = ways.tiled(model, chunk, head_chunk, offload=True)
    inputs = shape["layers"] * tokens * shape["width"] * dtype.itemsize

    def figures(peaks: Mapping[str, int], ours: Any) -> dict[str, float]:
        found = {"documents": float(len(documents))}
        return found | ({"layer_inputs_of_peak": inputs / peaks["varstream"]} if peaks else {})

    # A GPU has no room for a second set of gradients beside those that are compared with it.
    on_host = {"tiled": lambda found: [t.cpu() for t in found]} if device.type == "cuda" else {}
    return Setup(
        runs={run: partial(way, row) for run, way in runs.items()},
        results=on_host,
        figures=figures,
    )


def _cases(kind: str, name: str, mode: str, documents: str) -> list[Case]:
    """All lengths of one shape, with one ``build``."""
    sizes = scaled(name) if kind == "cpu" else {**REAL[name], **HEADS}
    rank = RANK[kind] if mode == "lora" else 0
    needs = peers.every(peers.transformers, peers.module("peft")) if rank else peers.transformers
    build = partial(_build, name, documents == "packed", kind)
    tokens = CPU_TOKENS if kind == "cpu" else [n * 1024 for n in GPU_TOKENS[mode]]
    what = "LoRA on every projection" if rank else "all parameters trained"
    scale = f"widths and classes 1/{FRACTION[name]}, 4 layers; " if kind == "cpu" else ""
    chunks = {"chunk": CHUNK[kind], "head_chunk": HEAD_CHUNK[kind]}
    cases = []
    for n in tokens:
        all_logits = peers.memory(LOGIT_BYTES * n * sizes["classes"])
        offloaded = [] if kind == "cpu" else [Peer("offloaded", peers.cuda)]
        if n == 128 * 1024 and documents == "single":
            offloaded = [Peer("offloaded", peers.never("a minute and more for a step"))]
        cases.append(
            Case(
                f"{'stream' if kind == 'cpu' else 'stream_gpu'}"
                f"/{name}_{mode}_{documents}_{n // 1024}k",
                "stream",
                {**sizes, "tokens": n, "rank": rank, **chunks},
                build,
                {**TINY, "rank": 2 if rank else 0},
                dtype=str(DTYPE[kind]).removeprefix("torch."),
                devices=(kind,),
                peers=(Peer("checkpointing", all_logits), Peer("tiled"), *offloaded),
                bars=BARS if kind == "cpu" and n == BARRED else (),
                reference="tiled",
                tolerance=TOLERANCE[kind],
                needs=needs,
                slow=n > CPU_TOKENS[0],
                note=f"{scale}{what}; peaks are above the weights",
            )
        )
    return cases


CASES = tuple(
    case
    for kind in ("cpu", "cuda")
    for name in REAL
    for mode in ("full", "lora")
    for documents in DOCUMENTS
    for case in _cases(kind, name, mode, documents)
)
