"""Lengths of packed sequences, and what attention over them costs; plain numbers, no tensors."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence

# Documents of a training corpus: share of them, shortest and longest, spread log-uniformly within.
# 47 % are below 500 tokens, 71 % below 1024, 87 % below 2048.
CORPUS = ((0.47, 16, 500), (0.24, 500, 1024), (0.16, 1024, 2048), (0.13, 2048, 8192))


# Matrix products of attention: q k and p v; q k and dout v again, then dv, dq and dk.
FORWARD_PRODUCTS = 2
BACKWARD_PRODUCTS = 5


def dense(tokens: int, seqlen: int) -> tuple[int, ...]:
    """``tokens / seqlen`` sequences of one length.

    Raises:
        ValueError: tokens is no multiple of seqlen.
    """
    if tokens % seqlen:
        raise ValueError(f"tokens must be a multiple of seqlen {seqlen}, got {tokens}")
    return (seqlen,) * (tokens // seqlen)


def corpus(count: int, seed: int) -> list[int]:
    """Lengths of ``count`` documents drawn from ``CORPUS``."""
    draw = random.Random(seed)
    shares = [share for share, _, _ in CORPUS]
    found = []
    for _, low, high in draw.choices(CORPUS, shares, k=count):
        found.append(int(math.exp(draw.uniform(math.log(low), math.log(high)))))
    return found


def ragged(tokens: int, seed: int) -> tuple[int, ...]:
    """Documents of the corpus that fill a pack of ``tokens`` exactly; each is cut to a quarter of
    the pack, the last to what is left."""
    longest, shortest = max(1, tokens // 4), CORPUS[0][1]
    enough = tokens // shortest + 8  # documents, also where the cut goes below the shortest
    return _filled(tokens, (min(n, longest) for n in corpus(enough, seed)))


def short(tokens: int, seed: int, low: int = 8, high: int = 128) -> tuple[int, ...]:
    """Lengths spread evenly from ``low`` to ``high``, as sentences for an encoder; the last is cut
    so that they add up to ``tokens``."""
    draw = random.Random(seed)
    return _filled(tokens, (draw.randint(low, high) for _ in range(tokens // low + 1)))


def _filled(tokens: int, lengths: Iterable[int]) -> tuple[int, ...]:
    """The first of the lengths that add up to ``tokens``, the last one cut."""
    found, left = [], tokens
    for n in lengths:
        if left == 0:
            break
        found.append(min(n, left))
        left -= found[-1]
    if left:
        raise ValueError(f"too few lengths: {left} of {tokens} tokens are left over")
    return tuple(found)


def visible_pairs(lengths: Sequence[int], causal: bool) -> int:
    """Scores that the queries of sequences see, for one head."""
    return sum(n * (n + 1) // 2 if causal else n * n for n in lengths)


def chunk_pairs(chunk: int, prefix: int) -> int:
    """Scores that the last ``chunk`` queries of a causal sequence see, ``prefix`` keys before them
    and themselves, for one head."""
    return chunk * prefix + visible_pairs([chunk], causal=True)


def flops(products: int, pairs: int, heads: int, head_dim: int) -> int:
    """Operations of attention's matrix products over the visible scores, a multiplication and an
    addition for each score, head and element of the head dimension; the softmax isn't counted."""
    return 2 * products * pairs * heads * head_dim
