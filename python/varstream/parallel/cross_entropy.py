"""``parallel.linear_cross_entropy``: the loss of a head whose weight is spread over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from varstream._checks import check_bool, check_float
from varstream.ops._cross_entropy_reductions import CrossEntropyMetrics, Driver, reduce_loss
from varstream.ops._cross_entropy_terms import terms_of
from varstream.ops._head import HeadCall, check_constant, check_reduction
from varstream.ops._head_options import chunk_size_from_options
from varstream.parallel._checks import agree, check_shard
from varstream.parallel._loss import loss_sum
from varstream.parallel._rows import row_values


def linear_cross_entropy(
    input: Tensor,
    linear_weight_shard: Tensor,
    target: Tensor,
    *,
    group: Any = None,
    shard_sizes: Sequence[int] | None = None,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    temperature: float = 1.0,
    z_loss: float = 0.0,
    token_weight: Tensor | None = None,
    normalizer: int | float | Tensor | None = None,
    options: Any = None,
    chunk_size: int | None = None,
    max_rows: int | None = None,
    logits_dtype: torch.dtype | None = None,
    return_metrics: bool = False,
) -> Tensor | tuple[Tensor, CrossEntropyMetrics]:
    """``varstream.linear_cross_entropy`` with the rows of the weight spread over a group's ranks.

    Every rank calls it with the same arguments but the shard and its bias, gets the same loss and
    runs the same backward.

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
        weight: class weights ``(V,)`` of the whole head, the same on every rank.
        reduction, ignore_index, label_smoothing, logit_scale, softcap, temperature: as in
            ``varstream.linear_cross_entropy``, the same on every rank.
        z_loss, token_weight, normalizer, options, return_metrics: likewise.
        chunk_size: likewise; ``None`` chooses it for the largest shard.
        max_rows, logits_dtype: likewise.

    Returns:
        What ``varstream.linear_cross_entropy`` returns for the whole weight, with the same dtypes,
        on every rank. In the backward ``input`` gets its whole gradient on every rank, the shard
        and its bias their own. It can be differentiated once.

    Raises:
        TypeError: an argument has the wrong type, is a DTensor, or is inside a ``torch.func``
            transform or dual.
        ValueError: ``torch.distributed`` isn't initialised, this process isn't in ``group``, the
            cases of ``varstream.linear_cross_entropy``, or arguments that differ between ranks or
            are refused on another rank.

    Cost: the products of ``varstream.linear_cross_entropy``, each over ``V_r`` classes. Per chunk
    of C rows one gather of 2 + K float64 a row and rank (one more with smoothing, one with
    metrics), on a GPU of 7 + K float32, and one sum of ``(C, d)`` over the ranks in the
    accumulation dtype where ``input`` needs a gradient. ``"mean"`` and ``"sum"`` communicate in the
    forward only; ``"none"`` gathers again in the backward and sums there. The targets are read on
    the host once. ``torch.compile`` breaks its graph at the call.

    Source: the vocabulary-parallel cross-entropy of Megatron-LM (Shoeybi et al., 2019).
    """

    def check() -> tuple[HeadCall, tuple[Any, ...]]:
        check_reduction(reduction, normalizer)
        check_bool("return_metrics", return_metrics)
        eps = check_float("label_smoothing", label_smoothing, low=0.0, high=1.0)
        z_factor = check_float("z_loss", z_loss, low=0.0)
        call = check_shard(
            input,
            linear_weight_shard,
            target,
            linear_bias=linear_bias,
            ignore_index=-100 if ignore_index is None else ignore_index,
            logit_scale=logit_scale,
            softcap=softcap,
            temperature=temperature,
            chunk_size=chunk_size,
            max_rows=max_rows,
            logits_dtype=logits_dtype,
        )
        check_constant("token_weight", token_weight, call, target.shape, "like target")
        rows = chunk_size_from_options(options, chunk_size, call.input.dtype)
        call = call if rows is None else call._replace(chunk_size=rows)
        given = (weight is not None, token_weight is not None)
        return call, (reduction, eps, z_factor, return_metrics, *given)

    shard = agree(group, shard_sizes, input, check)
    whole = shard.whole()
    check_constant("weight", weight, whole, whole.linear_weight.shape[:1], "(V,)")
    terms = terms_of(whole, weight, token_weight, float(label_smoothing), float(z_loss))
    loss, metrics = reduce_loss(
        Driver(partial(loss_sum, shard), partial(row_values, shard)),
        target,
        terms,
        reduction,
        normalizer,
        return_metrics,
    )
    return loss if metrics is None else (loss, metrics)
