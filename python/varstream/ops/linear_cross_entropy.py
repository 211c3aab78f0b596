"""``linear_cross_entropy``: the public call."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor

from varstream._checks import check_bool, check_float
from varstream.ops._cross_entropy_reductions import CrossEntropyMetrics, Driver, reduce_loss
from varstream.ops._cross_entropy_terms import terms_of
from varstream.ops._head import check_constant, check_head, check_reduction
from varstream.ops._head_options import chunk_size_from_options
from varstream.ops._linear_cross_entropy import loss_sum
from varstream.ops._token_logprobs import row_values
from varstream.ops._weight_grad import accumulating_sum, accumulating_values


@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = ...,
    weight: Tensor | None = ...,
    reduction: str = ...,
    ignore_index: int | None = ...,
    label_smoothing: float = ...,
    logit_scale: float = ...,
    softcap: float = ...,
    temperature: float = ...,
    z_loss: float = ...,
    token_weight: Tensor | None = ...,
    normalizer: int | float | Tensor | None = ...,
    options: Any = ...,
    chunk_size: int | None = ...,
    max_rows: int | None = ...,
    logits_dtype: torch.dtype | None = ...,
    weight_grad: Tensor | None = ...,
    validate: bool = ...,
    return_metrics: Literal[False] = ...,
) -> Tensor: ...


@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = ...,
    weight: Tensor | None = ...,
    reduction: str = ...,
    ignore_index: int | None = ...,
    label_smoothing: float = ...,
    logit_scale: float = ...,
    softcap: float = ...,
    temperature: float = ...,
    z_loss: float = ...,
    token_weight: Tensor | None = ...,
    normalizer: int | float | Tensor | None = ...,
    options: Any = ...,
    chunk_size: int | None = ...,
    max_rows: int | None = ...,
    logits_dtype: torch.dtype | None = ...,
    weight_grad: Tensor | None = ...,
    validate: bool = ...,
    return_metrics: Literal[True],
) -> tuple[Tensor, CrossEntropyMetrics]: ...


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
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
    weight_grad: Tensor | None = None,
    validate: bool = False,
    return_metrics: bool = False,
) -> Tensor | tuple[Tensor, CrossEntropyMetrics]:
    """Cross-entropy of a linear layer's output, computed in chunks of rows: no ``(N, V)`` tensor.

    ``logits = softcap(logit_scale * (input linear_weight^T + linear_bias)) / temperature`` with
    ``softcap(z) = softcap * tanh(z / softcap)`` when positive, ``p = softmax(logits)``. With class
    weights ``w``, smoothing ``eps`` and V classes the loss of a valid target y is

        l = token_weight * ((1 - eps) w_y (-log p_y) + eps / V sum_c w_c (-log p_c))

    and every row with a valid target adds ``z_loss * logsumexp(logits)^2`` once.

    Args:
        input: ``(N, d)`` float64, float32, bfloat16 or float16; any strides, N may be 0.
        linear_weight: ``(V, d)`` in the dtype of ``input``.
        target: ``(N,)`` or ``(N, K)`` int64 or int32, classes in ``[0, V)`` or ``ignore_index``.
            K targets share the row's logits, which are formed once; duplicates are allowed.
        linear_bias: ``(V,)`` in the dtype of ``input``; ``-inf`` bans a class.
        weight: class weights ``(V,)``, floating; no gradient goes to them.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        ignore_index: targets of this value take no part. Rows without another target are never
            read, add nothing to the loss and have zero gradients. ``None`` means -100 as in torch.
        label_smoothing: eps in [0, 1]. A class with logit ``-inf`` makes the loss infinite, as in
            torch, unless its class weight is 0; the gradients stay finite.
        logit_scale: factor on the linear layer's output.
        softcap: bound of the logits, 0 for none.
        temperature: divisor of the logits, above 0.
        z_loss: factor of the squared log-sum-exp, not negative.
        token_weight: factors of the targets' losses in the shape of ``target``, floating, any sign;
            no gradient goes to them and they change no divisor. Rows whose weights are 0 are
            skipped where neither ``z_loss`` nor metrics need them.
        normalizer: divisor of the ``"mean"`` of the losses in place of torch's, such as a count
            over several micro-batches or ranks: a number, or a tensor of one element on any
            device, which is not read on the host; no gradient goes to it.
        options: a ``torch.nn.LinearCrossEntropyOptions``: ``batch_chunk_size`` is the chunk size,
            ``allow_retain_graph`` is always so; ``acc_policy`` other than "auto" or "accurate", an
            ``acc_dtype`` other than the accumulation dtype and a ``chunking_method`` are refused.
        chunk_size: rows per chunk. ``None``: on the CPU 512, fewer (down to 64) where a chunk's
            logits would pass 256 MiB; on a GPU what ``varstream.cross_entropy.chunk_rule`` finds
            best, at most 4096 rows and 1 GiB. The result doesn't depend on it beyond rounding.
        max_rows: the caller's bound on the rows with a valid target. A GPU then walks that many
            rows and copies nothing to the host; without it the walk ends with the last of them:
            before the second chunk the host waits for their number, while the GPU works on the
            first. Where more rows have one, the loss is NaN on a GPU and an error on the CPU.
        logits_dtype: how the CUDA kernels store a chunk's logits: float32, the default, or the
            dtype of ``input``, which halves the chunk and rounds each logit as a plain head does.
        weight_grad: a ``(V, d)`` buffer, float32 (float64) or in the dtype of ``linear_weight``,
            that the backward adds the weight's gradient to, such as its ``.grad`` or
            ``main_grad``; one in a low-precision dtype is rounded once a chunk. Autograd then gives
            the weight none and no other ``(V, d)`` tensor is made, the backward forms the logits
            again, and reducing the buffer over ranks is the caller's.
        validate: check the targets on a GPU too (a device-to-host copy; float64 there always is).
            Unchecked, a target outside ``[0, V)`` makes its loss NaN.
        return_metrics: return ``(loss, CrossEntropyMetrics)``.

    Returns:
        The loss in float32 (float64 for float64 inputs). ``"mean"``: ``sum(l) / D + z_loss *
        sum(lse^2) / rows`` with D the sum of ``w_y`` over valid targets (their number without class
        weights) and ``rows`` the number of rows with a valid target; as in torch it is NaN where
        that sum of weights is 0. ``"sum"``: no divisors. ``"none"``: the shape of ``target``; the z
        term of a row stands at its first valid target. With every target ignored the loss is 0 and
        all gradients are zeros. Gradients of tensors that don't require them are not computed. It
        can be differentiated once.

    Raises:
        TypeError: an argument has the wrong type, or is inside a ``torch.func`` transform or dual.
        ValueError: a wrong shape, dtype, device, mixed dtypes, class probabilities as target, a
            target outside ``[0, V)`` (checked on the CPU always), class or token weights that
            require gradients, an ``ignore_index`` that the dtype of ``target`` can't hold, an
            option that isn't honoured, a ``logits_dtype`` that the kernels at work don't store,
            or a ``normalizer`` without ``reduction="mean"``.

    Cost: ``"mean"`` and ``"sum"`` form the gradient in the forward pass, three matrix products as
    in a plain head; ``"none"`` recomputes the logits in the backward, four. A frozen weight or
    input saves its product. On the CPU class weights, token weights, smoothing, z-loss and several
    targets take no pass over the logits; a softcap takes some over blocks of rows that stay in the
    cache, with smoothing two more. On a GPU one kernel a chunk does all of it.

    Source: class weights and smoothing as ``torch.nn.functional.cross_entropy``; the z term of
    PaLM (Chowdhery et al., 2022).
    """
    check_reduction(reduction, normalizer)
    call = check_head(
        input,
        linear_weight,
        target,
        linear_bias=linear_bias,
        ignore_index=-100 if ignore_index is None else ignore_index,
        logit_scale=logit_scale,
        softcap=softcap,
        temperature=temperature,
        chunk_size=chunk_size,
        max_rows=max_rows,
        logits_dtype=logits_dtype,
        validate=validate,
    )
    chunk_size = chunk_size_from_options(options, chunk_size, call.input.dtype)
    if chunk_size is not None:
        call = call._replace(chunk_size=chunk_size)
    check_bool("return_metrics", return_metrics)
    terms = terms_of(
        call,
        check_constant("weight", weight, call, call.linear_weight.shape[:1], "(V,)"),
        check_constant("token_weight", token_weight, call, target.shape, "like target"),
        check_float("label_smoothing", label_smoothing, low=0.0, high=1.0),
        check_float("z_loss", z_loss, low=0.0),
    )
    driver = Driver(partial(loss_sum, call), partial(row_values, call))
    if weight_grad is not None:
        driver = Driver(
            partial(accumulating_sum, weight_grad, call),
            partial(accumulating_values, weight_grad, call),
        )
    loss, metrics = reduce_loss(
        driver,
        target,
        terms,
        reduction,
        normalizer,
        return_metrics,
    )
    return loss if metrics is None else (loss, metrics)
