"""``token_logprobs``: log-probabilities, entropy and statistics of a linear head's rows."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from varstream._checks import check_bool
from varstream.ops._head import check_head
from varstream.ops._token_logprobs import row_values
from varstream.ops._weight_grad import accumulating_values
from varstream.reference.token_logprobs import Wanted


class TokenStats(NamedTuple):
    """What ``token_logprobs`` returns with ``return_stats=True``; acc dtype unless said.

    The first three are differentiable. At ignored rows everything is 0, ``argmax`` -1 and
    ``is_top1`` False.
    """

    logp: Tensor  # like target, log p(target)
    entropy: Tensor  # (N,) -sum_c p_c log p_c
    lse: Tensor  # (N,) log-sum-exp of the logits
    log_sum_sq_probs: Tensor  # (N,) log sum_c p_c^2
    mean_logits: Tensor  # (N,) mean over the classes
    argmax: Tensor  # (N,) int64
    is_top1: Tensor  # like target, bool: the target is the argmax


def token_logprobs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    max_rows: int | None = None,
    logits_dtype: torch.dtype | None = None,
    weight_grad: Tensor | None = None,
    validate: bool = False,
    return_entropy: bool = False,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, Tensor] | TokenStats:
    """Log-probability of each row's targets under a linear head, without an ``(N, V)`` tensor.

    ``p = softmax(softcap(logit_scale * (input linear_weight^T + linear_bias)) / temperature)``.

    Args:
        input: ``(N, d)`` float64, float32, bfloat16 or float16; any strides, N may be 0.
        linear_weight: ``(V, d)`` in the dtype of ``input``.
        target: ``(N,)`` or ``(N, K)`` int64 or int32, classes in ``[0, V)`` or ``ignore_index``.
            K targets share the row's logits, which are formed once; duplicates are allowed.
        linear_bias: ``(V,)`` in the dtype of ``input``; ``-inf`` bans a class.
        logit_scale: factor on the linear layer's output.
        softcap: logits become ``softcap * tanh(logits / softcap)`` when positive.
        temperature: divisor of the logits, above 0.
        ignore_index: targets of this value have log-probability 0; a row without another target
            is never read and its results and gradients are 0.
        chunk_size: rows per chunk, by default as in ``linear_cross_entropy``; so are ``max_rows``,
            ``logits_dtype``, ``weight_grad`` and ``validate``.
        return_entropy: also return the entropy of p.
        return_stats: return everything in ``TokenStats``.

    Returns:
        ``log p[target]`` in the shape of ``target`` and float32 (float64 for float64 inputs),
        natural log; with ``return_entropy`` a tuple of it and the entropy ``-sum p log p``
        ``(N,)``; with ``return_stats`` a ``TokenStats``. Log-probabilities, entropy and LSE are
        differentiable once, with any upstream gradient; rows whose upstream gradients are 0 cost
        nothing in the backward.

    Raises:
        TypeError: an argument has the wrong type, or is inside a ``torch.func`` transform or dual.
        ValueError: a wrong shape, dtype, device, mixed dtypes, class probabilities as target, or a
            target outside ``[0, V)`` (checked on the CPU always).

    Cost: four matrix products, one forward and three backward, which rebuilds the logits chunk by
    chunk; one fewer where the weight is frozen, one fewer where the input is, one in all without
    gradients. Entropy and statistics take passes over blocks of rows that stay in the cache.

    Source: the entropy's gradient with respect to the logits is ``-p (log p + entropy)``, the
    LSE's is ``p``.
    """
    check_bool("return_entropy", return_entropy)
    check_bool("return_stats", return_stats)
    call = check_head(
        input,
        linear_weight,
        target,
        linear_bias=linear_bias,
        ignore_index=ignore_index,
        logit_scale=logit_scale,
        softcap=softcap,
        temperature=temperature,
        chunk_size=chunk_size,
        max_rows=max_rows,
        logits_dtype=logits_dtype,
        validate=validate,
    )
    values_of = partial(row_values, call)
    if weight_grad is not None:
        values_of = partial(accumulating_values, weight_grad, call)
    if not return_stats:
        values = values_of(None, Wanted(entropy=return_entropy))
        return (values.logp, values.entropy) if return_entropy else values.logp
    values = values_of(None, Wanted(True, True, True, True))
    row_argmax = values.argmax if target.dim() == 1 else values.argmax[:, None]
    mean_logp = values.class_sum.detach() / linear_weight.shape[0]
    return TokenStats(
        values.logp,
        values.entropy,
        values.lse,
        values.log_sum_sq,
        mean_logp + values.lse.detach(),
        values.argmax,
        (target == row_argmax) & (target != ignore_index),
    )
