"""``parallel.token_logprobs``: log-probabilities of a head whose weight is spread over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from varstream._checks import check_bool
from varstream.ops._head import HeadCall
from varstream.ops.token_logprobs import TokenStats
from varstream.parallel._checks import agree, check_shard
from varstream.parallel._rows import row_values
from varstream.reference.token_logprobs import Wanted


def token_logprobs(
    input: Tensor,
    linear_weight_shard: Tensor,
    target: Tensor,
    *,
    group: Any = None,
    shard_sizes: Sequence[int] | None = None,
    linear_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    max_rows: int | None = None,
    logits_dtype: torch.dtype | None = None,
    return_entropy: bool = False,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, Tensor] | TokenStats:
    """``varstream.token_logprobs`` with the rows of the weight spread over the ranks of a group.

    Every rank calls it with the same arguments but the shard and its bias, gets the same results
    and runs the same backward.

    Args:
        input: ``(N, d)`` float64, float32, bfloat16 or float16, the same on every rank.
        linear_weight_shard: ``(V_r, d)`` in the dtype of ``input``: this rank's rows of the weight
            ``(V, d)``, at least one. Rank 0 of the group holds the first, and so on; the sizes may
            differ.
        target: ``(N,)`` or ``(N, K)`` int64 or int32, the same on every rank: classes in
            ``[0, V)`` of the whole head, or ``ignore_index``.
        group: a ``torch.distributed`` process group that holds this process; None is the default.
        shard_sizes: ``V_r`` of every rank in the group's order. Given, no sizes are exchanged and
            the ranks' arguments aren't compared.
        linear_bias: ``(V_r,)`` in the dtype of ``input``: this rank's entries of the bias.
        logit_scale, softcap, temperature, ignore_index, return_entropy, return_stats: as in
            ``varstream.token_logprobs``, the same on every rank.
        chunk_size: likewise; ``None`` chooses it for the largest shard.
        max_rows, logits_dtype: likewise.

    Returns:
        What ``varstream.token_logprobs`` returns for the whole weight, with the same dtypes, on
        every rank. In the backward ``input`` gets its whole gradient on every rank, the shard and
        its bias their own.

    Raises:
        TypeError: an argument has the wrong type, is a DTensor, or is inside a ``torch.func``
            transform or dual.
        ValueError: ``torch.distributed`` isn't initialised, this process isn't in ``group``, the
            cases of ``varstream.token_logprobs``, or arguments that differ between ranks or are
            refused on another rank.

    Cost: the products of ``varstream.token_logprobs``, each over ``V_r`` classes. Per chunk of C
    rows one gather of 2 + K float64 a row and rank (one more with entropy, four with statistics),
    on a GPU of 7 + K float32, in the backward again, and one sum of ``(C, d)`` over the ranks where
    ``input`` needs a gradient. The targets are read on the host once. ``torch.compile`` breaks its
    graph at the call.

    Source: the vocabulary-parallel cross-entropy of Megatron-LM (Shoeybi et al., 2019).
    """

    def check() -> tuple[HeadCall, tuple[Any, ...]]:
        check_bool("return_entropy", return_entropy)
        check_bool("return_stats", return_stats)
        call = check_shard(
            input,
            linear_weight_shard,
            target,
            linear_bias=linear_bias,
            ignore_index=ignore_index,
            logit_scale=logit_scale,
            softcap=softcap,
            temperature=temperature,
            chunk_size=chunk_size,
            max_rows=max_rows,
            logits_dtype=logits_dtype,
        )
        return call, (return_entropy, return_stats)

    shard = agree(group, shard_sizes, input, check)
    if not return_stats:
        values = row_values(shard, None, Wanted(entropy=return_entropy))
        return (values.logp, values.entropy) if return_entropy else values.logp
    values = row_values(shard, None, Wanted(True, True, True, True))
    row_argmax = values.argmax if target.dim() == 1 else values.argmax[:, None]
    mean_logp = values.class_sum.detach() / shard.shards.classes
    return TokenStats(
        values.logp,
        values.entropy,
        values.lse,
        values.log_sum_sq,
        mean_logp + values.lse.detach(),
        values.argmax,
        (target == row_argmax) & (target != ignore_index),
    )
