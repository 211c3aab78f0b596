"""Distillation: the divergence of a student's next-token distribution from a teacher's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from varstream._checks import check_bool, check_int
from varstream.objectives._segments import Normalizer, average
from varstream.ops._head import AUTO_CHUNK, check_reduction
from varstream.ops.linear_distillation import DistillationCall, check_distillation, divergences


def distillation(
    input: Tensor,
    linear_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    mask: Tensor | None = None,
    *,
    linear_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    beta: float = 0.0,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    teacher_logit_scale: float = 1.0,
    teacher_softcap: float = 0.0,
    token_weight: Tensor | None = None,
    normalizer: Normalizer = None,
    reduction: str = "mean",
    chunk_size: int | None = None,
    max_rows: int | None = None,
) -> Tensor:
    """Generalised Jensen-Shannon divergence between two linear heads, without an ``(N, V)`` tensor.

    With p the student's and q the teacher's distribution of a row and
    ``m = (1 - beta) p + beta q``, the row's loss is ``beta KL(q || m) + (1 - beta) KL(p || m)`` for
    ``0 < beta < 1``, ``KL(q || p)`` (forward) at 0 and ``KL(p || q)`` (reverse) at 1; in nats.
    ``p = softmax(softcap(logit_scale * (input linear_weight^T + linear_bias)) / temperature)``, and
    q likewise from the teacher's arguments.

    Args:
        input: ``(N, d)`` student's hidden states; float64, float32, bfloat16 or float16.
        linear_weight: ``(V, d)`` in the dtype of ``input``.
        teacher_input: ``(N, e)`` teacher's hidden states at the same tokens, floating; float64
            exactly if ``input`` is.
        teacher_weight: ``(V, e)`` in the dtype of ``teacher_input``. The teacher is a constant: its
            tensors may require gradients but get none.
        mask: ``(N,)`` bool, rows that take part, all by default; others are never read, add 0 and
            have zero gradients.
        linear_bias: ``(V,)`` in the dtype of ``input``.
        teacher_bias: ``(V,)`` in the dtype of ``teacher_input``.
        beta: 0 to 1.
        temperature: divisor of both heads' logits, above 0; its square doesn't multiply the loss.
        logit_scale: factor on the student's linear layer.
        softcap: bound of the student's logits, 0 for none.
        teacher_logit_scale: factor on the teacher's linear layer.
        teacher_softcap: bound of the teacher's logits, 0 for none.
        token_weight: ``(N,)`` floating, factors of the rows' losses, any sign, no gradient; they
            don't change the divisor of ``"mean"``.
        normalizer: divisor of ``"mean"`` in place of the number of rows that take part, such as a
            count over all micro-batches and ranks: a number or a tensor of one element.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        chunk_size: rows per chunk. There are two ``(chunk_size, V)`` buffers, student's and
            teacher's, so the default is half that of ``vs.linear_cross_entropy``: 256 on the CPU,
            on a GPU the fastest by a model; fewer where the two would pass 256 MiB or 1 GiB.
        max_rows: the caller's bound on the rows in ``mask``, as in ``vs.linear_cross_entropy``.

    Returns:
        Scalar, or ``(N,)`` for ``"none"``, in float32 (float64 for float64 inputs). Without rows
        that take part it is 0 and all gradients are zeros. It can be differentiated once.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a wrong shape, dtype, device or value, or ``normalizer`` without ``"mean"``.

    Cost in matrix products: ``"mean"`` and ``"sum"`` form the gradient in the forward, three of
    ``N V d`` as in a plain head and one of ``N V e``, four in all; ``"none"`` rebuilds both heads'
    logits in the backward, which serves any upstream gradient, four of ``N V d`` and two of
    ``N V e``, six in all.

    Source: generalised knowledge distillation (GKD), arXiv 2306.13649. TRL: the experimental
    ``GKDTrainer``'s ``generalized_jsd_loss``, whose ``reduction="batchmean"`` is ``"mean"`` here.
    """
    check_reduction(reduction, normalizer)
    call = check_distillation(
        DistillationCall(
            input,
            linear_weight,
            linear_bias,
            teacher_input,
            teacher_weight,
            teacher_bias,
            mask,
            token_weight,
            beta,
            temperature,
            logit_scale,
            softcap,
            teacher_logit_scale,
            teacher_softcap,
            AUTO_CHUNK if chunk_size is None else check_int("chunk_size", chunk_size, low=1),
            max_rows,
        )
    )
    losses, loss_sum, count = divergences(call, summed=reduction != "none")
    if reduction == "none":
        return losses if call.token_weight is None else losses * _factors(call, losses)
    return loss_sum if reduction == "sum" else average(loss_sum, count, normalizer)


def kl(
    input: Tensor,
    linear_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    mask: Tensor | None = None,
    *,
    reverse: bool = False,
    **options: Any,
) -> Tensor:
    """``KL(teacher || student)`` or, with ``reverse``, ``KL(student || teacher)``.

    Other arguments, result and errors as in ``distillation``, whose ``beta`` is 0 or 1 here.
    """
    beta = 1.0 if check_bool("reverse", reverse) else 0.0
    operands = input, linear_weight, teacher_input, teacher_weight, mask
    return distillation(*operands, beta=beta, **options)


def jsd(
    input: Tensor,
    linear_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    mask: Tensor | None = None,
    *,
    beta: float = 0.5,
    **options: Any,
) -> Tensor:
    """Jensen-Shannon divergence with mixture weight ``beta`` of the teacher, symmetric at 0.5.

    Other arguments, result and errors as in ``distillation``.
    """
    operands = input, linear_weight, teacher_input, teacher_weight, mask
    return distillation(*operands, beta=beta, **options)


def _factors(call: DistillationCall, losses: Tensor) -> Tensor:
    """Row weights (N,) in the losses' dtype, 0 where the mask leaves a row out."""
    assert call.token_weight is not None
    weight = call.token_weight.to(losses.dtype)
    return weight if call.mask is None else torch.where(call.mask, weight, 0.0)
