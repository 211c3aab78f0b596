"""Benchmark of the streaming backward on the CPU: ``python -m bench.streaming``.

One training step (forward and backward) of a 4-layer Llama on one long document: the Hugging Face
model with gradient checkpointing and the same chunked cross-entropy, against the streamed model.
Gradients are compared before anything is timed; a step takes about a minute.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import varstream as vs
from bench import timing
from varstream.testing import peak_memory, worst_gradient

TOLERANCE = 1e-4  # float32 gradients of two float32 computations
BARS = {"memory_over_checkpointing": 0.42, "over_checkpointing": 1.0}


def make_model(tokens: int) -> Any:
    """4 layers, d = 512, 8 heads, vocabulary 16,000, random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16000,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=tokens,
    )
    return LlamaForCausalLM(config).train()


class Steps:
    """The two ways to run one step on the same weights and document."""

    def __init__(self, tokens: int, chunk_size: int | str) -> None:
        self.dense = make_model(tokens)
        self.streamed = vs.stream(copy.deepcopy(self.dense), chunk_size=chunk_size)
        self.dense.gradient_checkpointing_enable()
        self.ids = torch.randint(16000, (1, tokens))

    def checkpointing(self) -> None:
        """Hugging Face's layers checkpointed, our chunked head."""
        self.dense.zero_grad(set_to_none=True)
        hidden = self.dense.model(self.ids, use_cache=False).last_hidden_state[0]
        vs.linear_cross_entropy(hidden[:-1], self.dense.lm_head.weight, self.ids[0, 1:]).backward()

    def streaming(self) -> None:
        """The streamed model."""
        self.streamed.zero_grad(set_to_none=True)
        self.streamed(self.ids, labels=self.ids).loss.backward()


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--chunk-size", default="auto")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-store", action="store_true", help="only print")
    options = parser.parse_args()
    chunk = options.chunk_size if options.chunk_size == "auto" else int(options.chunk_size)
    report: dict[str, Any] = {
        "environment": timing.environment(),
        "rounds": options.rounds,
        "tokens": options.tokens,
        "chunk_size": chunk,
        "model": "Llama, 4 layers, d 512, 8 heads, f 1376, V 16000, float32",
    }
    steps = Steps(options.tokens, chunk)
    runs = {"checkpointing": steps.checkpointing, "streaming": steps.streaming}
    peaks = report["peak_bytes"] = {name: peak_memory(run) for name, run in runs.items()}
    expected = {name: p.grad for name, p in steps.dense.named_parameters()}
    streamed = ((name, p.grad) for name, p in steps.streamed.named_parameters())
    name, error = worst_gradient(streamed, expected)
    report["worst_gradient"] = {"parameter": name, "relative_error": error}
    if not error <= TOLERANCE:
        raise SystemExit(f"gradient of {name} is {error:.1e} off checkpointing's: not timed")
    memory = peaks["streaming"] / peaks["checkpointing"]
    print({name: f"{size / 2**20:.0f} MiB" for name, size in peaks.items()}, f"ratio {memory:.3f}")
    seconds = timing.paired(runs, options.rounds)
    report["seconds"] = {name: timing.summary(values) for name, values in seconds.items()}
    report["over_checkpointing"] = timing.ratio(seconds, "streaming", "checkpointing")
    reached = {
        "memory_over_checkpointing": memory,
        "over_checkpointing": report["over_checkpointing"]["median"],
    }
    report["bars"] = timing.against(BARS.items(), reached)
    timing.print_bars(report["bars"])
    report["environment"]["load_1_minute_after"] = timing.environment()["load_1_minute"]
    if not options.no_store:
        print(f"written: {timing.store('streaming', report)}")


if __name__ == "__main__":
    main()
