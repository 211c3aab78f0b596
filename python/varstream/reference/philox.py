"""Philox4x32-10 (Salmon et al., SC 2011) as tensor arithmetic: dropout that every back end replays
bit for bit.

The keep decision of score (sequence b, head h, query i, key j) depends on ``rng_state`` and those
four numbers only, i and j counted from the sequence's first key, so it doesn't change with tiling,
packing or chunk edges.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85


def philox4x32(counter: list[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Ten rounds over four int64 tensors holding 32-bit counters; returns four tensors of 32-bit
    words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap modulo 2**64, which leaves both 32-bit halves intact.
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return [c0, c1, c2, c3]


def keep_scale(
    rng_state: Tensor, dropout_p: float, sequence: int, heads: Tensor, rows: Tensor, keys: Tensor
) -> Tensor:
    """Dropout factors of a tile: 0 where dropped, 1 / (1 - p) where kept.

    Args:
        rng_state: int64 ``(2,)``, seed and offset.
        dropout_p: probability of dropping, in [0, 1).
        sequence: index of the sequence in the batch.
        heads: ``(Hq,)`` int64 head indices.
        rows: ``(n,)`` int64 query positions, aligned bottom-right to the keys in use.
        keys: ``(m,)`` int64, contiguous key positions.

    Returns:
        ``(Hq, n, m)`` float64.
    """
    seed, offset = (int(v) for v in rng_state.tolist())
    quads = torch.arange(int(keys[0]) // 4, int(keys[-1]) // 4 + 1, device=keys.device)
    shape = (len(heads), len(rows), len(quads))
    counter = [
        quads.expand(shape),
        (rows & _MASK)[None, :, None].expand(shape),
        heads[:, None, None].expand(shape),
        torch.full((1, 1, 1), (sequence ^ offset) & _MASK, device=keys.device).expand(shape),
    ]
    words = torch.stack(philox4x32(counter, (seed & _MASK, (seed >> 32) & _MASK)), dim=-1)
    skip = int(keys[0]) % 4
    bits = words.reshape(len(heads), len(rows), -1)[..., skip : skip + len(keys)]
    threshold = min(round(dropout_p * 2**32), _MASK)  # 32 bits hold it, whatever p below 1
    return (bits >= threshold).to(torch.float64) / (1.0 - dropout_p)
