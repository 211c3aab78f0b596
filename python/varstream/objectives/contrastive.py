"""Contrastive training of embeddings: each query picks its key among all keys of the batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from varstream._checks import (
    FLOATING,
    INTEGERS,
    acc_dtype,
    check_bool,
    check_int,
    check_positive,
    check_same_dtype,
    check_tensor,
    values_visible,
)
from varstream.objectives._ranks import Part, Ranks, agree
from varstream.ops._autocast import cast_for_autocast
from varstream.ops.linear_cross_entropy import linear_cross_entropy

IGNORE_INDEX = -100
SIMILARITIES = ("cosine", "dot")


def contrastive(
    queries: Tensor,
    keys: Tensor,
    *,
    temperature: float = 0.05,
    similarity: str = "cosine",
    positives: Tensor | None = None,
    symmetric: bool = False,
    gather: bool = False,
    group: Any = None,
    chunk_size: int | None = None,
) -> Tensor:
    """InfoNCE with in-batch negatives, the mean over queries of
    ``-log softmax_k(sim(q_i, k) / temperature)`` at the query's own key.

    It is a chunked cross-entropy with the keys as the weight: no ``(Q, K)`` tensor exists.

    Args:
        queries: ``(Q, d)`` embeddings; float64, float32, bfloat16 or float16.
        keys: ``(K, d)`` in the dtype of ``queries``. By default key i belongs to query i, so K is
            at least Q; keys after the first Q are further (hard) negatives, for all queries.
        temperature: divisor of the similarities, above 0. One that is learned is written as
            ``contrastive(queries * scale, keys, similarity="dot", temperature=1.0)`` over rows of
            length 1.
        similarity: ``"cosine"``, a row of zeros being similar to nothing (0, without gradient), or
            ``"dot"``.
        positives: ``(Q,)`` int64 or int32, each query's key among these ``keys``, or -100: the
            query takes no part but is a negative of the other direction. On a GPU values aren't
            looked at; one outside ``[0, K)`` makes the loss NaN.
        symmetric: the mean of this loss and of the other direction, in which the keys of the
            queries look for their query among all queries (further negatives play no part there).
        gather: take the keys (and with ``symmetric`` the queries) of all ranks of ``group`` as
            candidates. ``positives`` still count this rank's keys.
        group: the process group of ``gather``; None is the default one.
        chunk_size: rows of a chunk, as in ``vs.linear_cross_entropy``.

    Returns:
        Scalar in float32 (float64 for float64 embeddings); 0 without queries that take part. It can
        be differentiated once. With ``gather`` it is this rank's sum over its queries, times the
        number of ranks, over the queries of all ranks: the mean over ranks, of losses and of
        gradients, as DistributedDataParallel takes it, is what one process gets for the batches
        of all ranks put together, also where their sizes differ.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a wrong shape, dtype, device or value (of ``positives`` on the CPU), a ``group``
            without ``gather``, arguments that differ between ranks or are refused on another.

    Cost: three products of ``Q K d``, six with ``symmetric``. ``gather`` exchanges nine integers,
    which are read on the host, gathers the rows once, and in the backward sums the gradient of all
    of them, ``(sum K, d)`` in the accumulation dtype, over the ranks. Each rank must run it.

    Source: InfoNCE (arXiv 1807.03748); with ``symmetric`` the loss of CLIP (arXiv 2103.00020).
    sentence-transformers: ``MultipleNegativesRankingLoss`` with ``scale = 1 / temperature``.
    """
    temperature = check_positive("temperature", temperature)
    if similarity not in SIMILARITIES:
        raise ValueError(f"similarity must be 'cosine' or 'dot', got {similarity!r}")
    check_bool("symmetric", symmetric)
    if chunk_size is not None:
        check_int("chunk_size", chunk_size, low=1)
    if not check_bool("gather", gather) and group is not None:
        raise ValueError("group needs gather=True, got a group with gather=False")

    def check() -> Part:
        return _part(queries, keys, positives, similarity == "cosine")

    ranks = None
    if gather:
        part, ranks = agree(group, queries, check, (temperature, similarity, symmetric))
    else:
        part = check()
    if (sum(ranks.keys) if ranks else part.keys.shape[0]) < 1:
        raise ValueError("keys must have at least one row (K, d), got none")
    loss = _direction(
        part.queries, part.keys, part.positives, ranks, False, temperature, chunk_size
    )
    if not symmetric or (sum(ranks.queries) if ranks else part.queries.shape[0]) == 0:
        return loss
    other = _direction(*_reversed(part), ranks, True, temperature, chunk_size)
    return (loss + other) / 2


def _part(queries: Any, keys: Any, positives: Any, cosine: bool) -> Part:
    """Check the tensors; the rows come out as the head takes them."""
    check_tensor("queries", queries, ndim=2, dtypes=FLOATING, layout="(Q, d)")
    check_tensor("keys", keys, ndim=2, dtypes=FLOATING, device=queries.device, layout="(K, d)")
    check_tensor("keys", keys, shape=(None, queries.shape[1]), layout="(K, d)")
    count, among = queries.shape[0], keys.shape[0]
    if positives is None:
        if among < count:
            raise ValueError(
                f"keys must have a row for each of the {count} queries, or positives must be "
                f"given, got {among} rows"
            )
        positives, taking_part = torch.arange(count, device=queries.device), count
    else:
        check_tensor("positives", positives, shape=(count,), dtypes=INTEGERS, layout="(Q,)")
        check_tensor("positives", positives, device=queries.device)
        if values_visible(positives):
            odd = positives[(positives != IGNORE_INDEX) & ((positives < 0) | (positives >= among))]
            if odd.numel():
                raise ValueError(
                    f"positives must be in [0, K) = [0, {among}) or {IGNORE_INDEX}, "
                    f"got {int(odd[0])}"
                )
        positives, taking_part = positives.long(), (positives != IGNORE_INDEX).sum()
    if cosine:
        queries, keys = _unit(queries), _unit(keys)
    queries, keys = cast_for_autocast(queries, keys)
    check_same_dtype(queries=queries, keys=keys)
    return Part(queries, keys, positives, taking_part)


def _unit(x: Tensor) -> Tensor:
    """Rows of length 1, zeros for zeros; the length is taken in acc dtype."""
    wide = x.to(acc_dtype(x.dtype))
    length = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
    nothing = length == 0
    return torch.where(nothing, 0.0, wide / torch.where(nothing, 1.0, length)).to(x.dtype)


def _reversed(part: Part) -> tuple[Tensor, Tensor, Tensor]:
    """The other direction: keys of queries (Q, d), the queries among which they choose, targets."""
    own = torch.arange(part.queries.shape[0], device=part.queries.device)
    inside = (part.positives >= 0) & (part.positives < part.keys.shape[0])
    if part.keys.shape[0] == 0:  # no queries either, on this rank
        return part.keys, part.queries, own
    target = torch.where(inside, own, torch.where(part.positives == IGNORE_INDEX, -100, -1))
    return part.keys[torch.where(inside, part.positives, 0)], part.queries, target


def _direction(
    rows: Tensor,
    candidates: Tensor,
    target: Tensor,
    ranks: Ranks | None,
    reverse: bool,
    temperature: float,
    chunk_size: int | None,
) -> Tensor:
    """Cross-entropy of ``rows`` (Q, d) over ``candidates``, those of all ranks if there are any."""
    normalizer = None
    if ranks is not None:
        sizes = ranks.queries if reverse else ranks.keys
        inside = (target >= 0) & (target < candidates.shape[0])
        # What is out of range here must not become another rank's row: -1 is refused or NaN.
        outside = torch.where(target == IGNORE_INDEX, IGNORE_INDEX, -1)
        target = torch.where(inside, target + ranks.start(sizes), outside)
        candidates = ranks.gather(candidates, sizes)
        normalizer = ranks.paired / len(sizes)
    loss = linear_cross_entropy(
        rows,
        candidates,
        target,
        temperature=temperature,
        ignore_index=IGNORE_INDEX,
        normalizer=normalizer,
        chunk_size=chunk_size,
    )
    assert isinstance(loss, Tensor)
    return loss
