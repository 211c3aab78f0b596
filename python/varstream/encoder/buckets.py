"""Which table row each distance has in MPNet and DeBERTa, for ``relative_attention``.

Entry ``M - 1 + t`` of a result is the row of distance t = j - i, key minus query.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from varstream._checks import check_int


def mpnet_buckets(
    longest: int,
    num_buckets: int = 32,
    max_distance: int = 128,
    device: torch.device | None = None,
) -> Tensor:
    """Rows of MPNet's and bidirectional T5's tables.

    Half of the rows are for keys before the query, half for those after it; in each half, half are
    exact distances and the rest logarithmic up to ``max_distance``.

    Args:
        longest: M, the longest length.
        num_buckets: rows of the table, a positive multiple of 4.
        max_distance: from here on all distances share a row; above a quarter of ``num_buckets``.
        device: of the result.

    Returns:
        int64 ``(2 M - 1,)``; ``(1,)`` for M = 0.
    """
    check_int("longest", longest, low=0)
    if check_int("num_buckets", num_buckets, low=4) % 4:
        raise ValueError(f"num_buckets must be a multiple of 4, got {num_buckets}")
    half = num_buckets // 2
    exact = half // 2
    check_int("max_distance", max_distance, low=exact + 1)
    distance = _distances(longest, device)
    away = distance.abs()
    # In float32, as the models' own code does it, so that borders fall alike.
    far = away.float().clamp_(min=1.0) / exact
    steps = far.log() / math.log(max_distance / exact) * (half - exact)
    logarithmic = (exact + steps.to(torch.int64)).clamp_(max=half - 1)
    return torch.where(away < exact, away, logarithmic) + half * (distance > 0)


def deberta_buckets(
    longest: int,
    position_buckets: int,
    max_relative_positions: int,
    device: torch.device | None = None,
) -> Tensor:
    """Rows of DeBERTa's relative embeddings, for both of its terms.

    Without buckets (DeBERTa, and v2 with ``position_buckets`` below 1) a row is the distance i - j
    plus ``max_relative_positions``; with them distances from half a bucket count on are
    logarithmic. The table has twice as many rows as there are positions, or buckets.

    Args:
        longest: M, the longest length.
        position_buckets: the configuration's; below 1 for none.
        max_relative_positions: likewise; where that is below 1, ``max_position_embeddings``.
        device: of the result.

    Returns:
        int64 ``(2 M - 1,)``; ``(1,)`` for M = 0.
    """
    check_int("longest", longest, low=0)
    check_int("position_buckets", position_buckets)
    check_int("max_relative_positions", max_relative_positions, low=1)
    back = -_distances(longest, device)  # i - j
    span = max_relative_positions
    if position_buckets > 0:
        span, middle = position_buckets, position_buckets // 2
        if middle < 2 or max_relative_positions - 1 <= middle:
            raise ValueError(
                "position_buckets must be at least 4 and below 2 * (max_relative_positions - 1) = "
                f"{2 * (max_relative_positions - 1)}, got {position_buckets}"
            )
        away = back.abs()
        # In float32, as the models' own code does it, so that borders fall alike.
        ratio = torch.tensor((max_relative_positions - 1) / middle, device=device)
        far = away.clamp(min=middle - 1) / middle
        steps = (far.log() / ratio.log() * (middle - 1)).ceil() + middle
        back = torch.where(away <= middle, back, back.sign() * steps.to(torch.int64))
    return (back + span).clamp_(0, 2 * span - 1)


def _distances(longest: int, device: torch.device | None) -> Tensor:
    """j - i from -(M-1) to M-1, int64."""
    last = max(longest - 1, 0)
    return torch.arange(-last, last + 1, device=device)
