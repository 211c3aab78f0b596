"""A GPT of your own, trained on packed documents with a streamed backward: `vs.stream_layer`.

    python examples/gpt_stream.py            # about half a minute on two cores
    python examples/gpt_stream.py --quick    # a few seconds

The model is plain PyTorch. Two things make it stream: a block is written as two functions, `kv`
and `rest`, and its forward hands them to `vs.stream_layer`. Rows are tokens of all documents end
to end, (n, d), never padded; `cu_seqlens` says where documents begin. Tokens are bytes; the text
is the standard library's own source, a function or class to a document.
"""

import argparse
import copy
import sysconfig
import time
from pathlib import Path

import torch
from torch import nn

import varstream as vs
from varstream import batching
from varstream.testing import peak_memory, worst_gradient

# --- the model ------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width, heads, kv_heads, chunk_size):
        super().__init__()
        self.head_dim, self.chunk_size = width // heads, chunk_size
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.out = nn.Linear(width, width), nn.Linear(width, width)
        # No bias on keys: it would move all of a query's scores alike, which softmax ignores.
        self.k = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.v = nn.Linear(width, kv_heads * self.head_dim)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def kv(self, x, pos):
        """Rows x (c, d) at positions pos (c,) to their keys and values (c, Hkv, D)."""
        h = self.norm1(x)
        return self._heads(self.k(h)), self._heads(self.v(h))

    def rest(self, x, pos, attend):
        """All else, row by row; attend maps queries (c, H, D) to attention's output (c, H, D)."""
        x = x + self.out(attend(self._heads(self.q(self.norm1(x)))).flatten(1))
        return x + self.mlp(self.norm2(x))

    def _heads(self, x):
        return x.unflatten(-1, (-1, self.head_dim))

    def forward(self, x, cu_seqlens, stream):
        if stream:  # keeps x alone for the backward, which runs chunk by chunk
            return vs.stream_layer(
                *(self.kv, self.rest, x, cu_seqlens),
                params=self.parameters(),  # what is left out here gets no gradient
                chunk_size=self.chunk_size,
            )
        k, v = self.kv(x, None)  # the same layer under plain autograd
        return self.rest(x, None, lambda q: vs.varlen_attention(q, k, v, cu_seqlens, causal=True))


class GPT(nn.Module):
    def __init__(
        self, width, layers, heads, kv_heads, context, vocab=256, tied=True, chunk_size="auto"
    ):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(
            Block(width, heads, kv_heads, chunk_size) for _ in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.02)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids, position_ids, cu_seqlens, targets, stream=True):
        """ids, position_ids, targets (n,), cu_seqlens (documents + 1,) to the mean loss."""
        x = self.tokens(ids) + self.positions(position_ids)
        for block in self.blocks:
            x = block(x, cu_seqlens, stream)
        return vs.linear_cross_entropy(self.norm(x), self.head.weight, targets)  # no logits


# --- the data -------------------------------------------------------------------------------------


def packed_rows(count, row_tokens, context):
    """`count` packed rows; a document is a top-level definition, its first `context` bytes."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [text for f in files for text in f.read_bytes().split(b"\n\n\n")]
    documents = [{"input_ids": list(text[:context])} for text in texts if text.strip()]
    lengths = [len(document["input_ids"]) for document in documents]
    packs = batching.best_fit_decreasing(lengths, capacity=row_tokens).shuffled(seed=0)
    collate = batching.PackedCollator()
    for i in range(count):
        batch = collate([documents[j] for j in packs.bins[i % len(packs.bins)]])
        # Each row predicts the next one; the label of a document's first token is -100 (ignored).
        targets = nn.functional.pad(batch["labels"][0, 1:], (0, 1), value=-100)
        yield batch["input_ids"][0], batch["position_ids"][0], batch["cu_seq_lens_q"], targets


# --- training -------------------------------------------------------------------------------------


def train(model, rows):
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step, row in enumerate(rows):
        began = time.perf_counter()
        loss = model(*row)
        loss.backward()  # nothing else to call
        optimizer.step()
        optimizer.zero_grad()
        speed = len(row[0]) / (time.perf_counter() - began)
        documents = len(row[2]) - 1
        print(
            f"step {step:3}  loss {loss.item():.3f}  {documents} documents, {speed:,.0f} tokens/s"
        )


def gradients(model, row, stream):
    model.zero_grad()
    model(*row, stream=stream).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def check(model, row):
    """Streamed against plain autograd: the worst relative gradient difference, in float64."""
    exact = copy.deepcopy(model).double()
    dense = gradients(exact, row, stream=False)
    name, error = worst_gradient(gradients(exact, row, stream=True).items(), dense)
    print(f"worst gradient difference, streamed against plain autograd: {error:.1e} ({name})")
    return error


def main(args=None):
    parser = argparse.ArgumentParser(description="Train a small GPT with a streamed backward.")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, a few seconds")
    parser.add_argument("--untied", action="store_true", help="a head of its own")
    options = parser.parse_args(args)
    torch.manual_seed(0)
    if options.quick:
        sizes = {"width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "context": 200}
        steps, row_tokens, chunk_size = 6, 512, 100
    else:
        sizes = {"width": 128, "layers": 4, "heads": 4, "kv_heads": 2, "context": 2048}
        steps, row_tokens, chunk_size = 24, 4096, 512
    model = GPT(**sizes, tied=not options.untied, chunk_size=chunk_size)
    train(model, packed_rows(steps, row_tokens, sizes["context"]))

    (row,) = packed_rows(1, row_tokens, sizes["context"])
    for words, stream in (("plain autograd", False), ("streamed", True)):
        peak = peak_memory(lambda stream=stream: gradients(model, row, stream))
        print(f"peak memory of one step's gradients, {words}: {peak / 2**20:.1f} MiB")
    return check(model, row)


if __name__ == "__main__":
    main()
