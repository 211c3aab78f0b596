"""Liger's fused linear cross-entropy, same names, arguments and meaning, on our head.

Where the two differ: auxiliary results come in the accumulation dtype (Liger rounds ``z_loss`` to
the input's), nothing is read back to the host, and with every target ignored all results are 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from varstream._checks import (
    FLOATING,
    INTEGERS,
    acc_dtype,
    check_bool,
    check_float,
    check_int,
    check_tensor,
)
from varstream.ops.linear_cross_entropy import linear_cross_entropy
from varstream.ops.token_logprobs import token_logprobs


@dataclass
class CrossEntropyOutput:
    """A loss and what was asked for beside it; results that weren't asked for are ``None``.

    Attributes:
        loss: scalar, or ``(N,)`` with ``reduction="none"``; the only differentiable one.
        z_loss: the z term contained in ``loss``, in its shape.
        token_accuracy: fraction of the valid targets that are the argmax of their row's logits, or
            0 and 1 per row ``(N,)`` with ``"none"``.
        predicted_tokens: that argmax ``(N,)`` int64, -1 at ignored rows.
    """

    loss: Tensor
    z_loss: Tensor | None = None
    token_accuracy: Tensor | None = None
    predicted_tokens: Tensor | None = None


def liger_fused_linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ce_weight: Tensor | None = None,
    ignore_index: int = -100,
    lse_square_scale: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    return_z_loss: bool = False,
    accum_dtype: torch.dtype | None = None,
    use_token_scaling: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
    chunk_mem_const: int = 1,
) -> Tensor | CrossEntropyOutput:
    """Cross-entropy of ``softcap(input weight^T + bias)`` without its ``(N, V)`` logits.

    Args:
        input: ``(N, d)`` hidden states.
        weight: ``(V, d)``.
        target: ``(N,)`` classes or ``ignore_index``.
        bias: ``(V,)``.
        ce_weight: class weights ``(V,)``, as in ``torch.nn.functional.cross_entropy``.
        ignore_index: rows with this target take no part.
        lse_square_scale: weight, not below 0, of ``logsumexp(logits)^2``, added per row; ``"mean"``
            divides it by the number of valid rows, also where class weights divide the rest.
        label_smoothing: in ``[0, 1]``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        softcap: bound of the logits, above 0, or ``None``.
        return_z_loss: also return the z term.
        accum_dtype: ``None`` or the accumulation dtype we use anyway, float32 (float64 for float64
            inputs).
        use_token_scaling: weigh each row, its z term included, by its detached p(target). Costs one
            more product with the weight.
        return_token_accuracy: also return the accuracy.
        return_predicted_tokens: also return each row's argmax.
        chunk_mem_const: a chunk's logits hold about this many times N d elements; 1 leaves the
            choice to us. Changes nothing but memory and speed.

    Returns:
        The loss in float32 (float64 for float64 inputs), or a ``CrossEntropyOutput`` when a
        ``return_*`` argument is set.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a wrong shape, dtype, device or value, such as an ``accum_dtype`` not ours.

    Source: Liger Kernel 0.8.5's function of this name. Token scaling is dynamic fine-tuning
    (arXiv 2508.05629); the z term is PaLM's (arXiv 2204.02311).
    """
    check_tensor("input", input, ndim=2, dtypes=FLOATING, layout="(N, d)")
    check_tensor("weight", weight, shape=(None, input.shape[1]), layout="(V, d)")
    check_tensor("target", target, shape=(input.shape[0],), dtypes=INTEGERS, layout="(N,)")
    for name, given in (("bias", bias), ("ce_weight", ce_weight)):
        if given is not None:
            check_tensor(name, given, shape=(weight.shape[0],), layout="(V,)")
    check_int("ignore_index", ignore_index)
    check_float("label_smoothing", label_smoothing, low=0.0, high=1.0)
    check_float("lse_square_scale", lse_square_scale, low=0.0)
    _check_accum_dtype(accum_dtype, input.dtype)
    check_bool("return_z_loss", return_z_loss)
    check_bool("return_token_accuracy", return_token_accuracy)
    check_bool("return_predicted_tokens", return_predicted_tokens)
    check_bool("use_token_scaling", use_token_scaling)
    head: dict[str, Any] = {
        "linear_bias": bias,
        "ignore_index": ignore_index,
        "softcap": _check_softcap(softcap),
        "chunk_size": _chunk_size(chunk_mem_const, input, weight),
    }
    options = {"weight": ce_weight, "reduction": reduction, "label_smoothing": label_smoothing}
    returned = return_z_loss, return_token_accuracy, return_predicted_tokens
    operands = input, weight, target
    return _evaluate(operands, head, options, lse_square_scale, use_token_scaling, returned)


class LigerFusedLinearCrossEntropyLoss(nn.Module):
    """``liger_fused_linear_cross_entropy`` as a module; the projection comes with each call.

    The arguments are the function's, checked when called.
    """

    def __init__(
        self,
        ce_weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ) -> None:
        super().__init__()
        self.ce_weight = ce_weight
        self.ignore_index = ignore_index
        self.lse_square_scale = lse_square_scale
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.softcap = softcap
        self.return_z_loss = return_z_loss
        self.accum_dtype = accum_dtype
        self.use_token_scaling = use_token_scaling
        self.return_token_accuracy = return_token_accuracy
        self.return_predicted_tokens = return_predicted_tokens

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor | CrossEntropyOutput:
        """lin_weight (V, d) **first**, _input (N, d), target (N,), bias (V,)."""
        return liger_fused_linear_cross_entropy(
            _input,
            lin_weight,
            target,
            bias,
            self.ce_weight,
            self.ignore_index,
            self.lse_square_scale,
            self.label_smoothing,
            self.reduction,
            self.softcap,
            self.return_z_loss,
            self.accum_dtype,
            self.use_token_scaling,
            self.return_token_accuracy,
            self.return_predicted_tokens,
        )


def LigerForCausalLMLoss(  # noqa: N802  # Liger's name
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor | None,
    hidden_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    final_logit_softcapping: float | None = None,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
    **kwargs: Any,
) -> Tensor | CrossEntropyOutput:
    """transformers' causal language model loss from hidden states.

    Args:
        hidden_states: ``(B, S, d)`` or ``(N, d)``.
        lm_head_weight: ``(V, d)``.
        labels: ``(B, S)``, or ``(N,)`` for one sequence; position s is trained on label s + 1. Not
            read when ``shift_labels`` is given.
        hidden_size: d.
        num_items_in_batch: divisor of the summed loss in place of the number of valid labels.
        ignore_index: labels that take no part.
        shift_labels: ``(B, S)`` labels that are shifted already.
        final_logit_softcapping: bound of the logits.
        return_token_accuracy: also return the accuracy.
        return_predicted_tokens: also return the argmax, flat ``(N,)``.
        **kwargs: arguments of ``liger_fused_linear_cross_entropy`` are passed on; a trainer's
            others are dropped, as Liger does.

    Returns:
        The loss, or a ``CrossEntropyOutput`` with two ``return_*`` results.

    Raises:
        TypeError, ValueError: as the function; or neither ``labels`` nor ``shift_labels`` is given,
            or there isn't one label per hidden state, or ``hidden_size`` isn't d.
    """
    rows = _rows(hidden_states, hidden_size)
    check_tensor("lm_head_weight", lm_head_weight, shape=(None, hidden_size), layout="(V, d)")
    check_int("ignore_index", ignore_index)
    if shift_labels is not None:
        shift_labels = _check_labels("shift_labels", shift_labels, rows.shape[0])
    elif labels is not None:
        labels = _check_labels("labels", labels, rows.shape[0])
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    else:
        raise ValueError("labels or shift_labels must be given, got None for both")
    result = liger_fused_linear_cross_entropy(
        rows,
        lm_head_weight,
        shift_labels.reshape(-1).to(hidden_states.device),
        ignore_index=ignore_index,
        reduction="mean" if num_items_in_batch is None else "sum",
        softcap=final_logit_softcapping,
        return_token_accuracy=return_token_accuracy,
        return_predicted_tokens=return_predicted_tokens,
        **{name: kwargs[name] for name in _PASSED_ON & kwargs.keys()},
    )
    if num_items_in_batch is None:
        return result
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(hidden_states.device)
    if isinstance(result, Tensor):
        return result / num_items_in_batch
    result.loss = result.loss / num_items_in_batch
    return result


# What the loss leaves to its keywords: everything but what it sets itself.
_PASSED_ON = {
    "bias",
    "ce_weight",
    "lse_square_scale",
    "label_smoothing",
    "accum_dtype",
    "use_token_scaling",
    "chunk_mem_const",
}


def _rows(hidden_states: Any, hidden_size: Any) -> Tensor:
    """Hidden states (..., d) as rows (N, d)."""
    layout = "(B, S, d) or (N, d)"
    check_tensor("hidden_states", hidden_states, dtypes=FLOATING)
    width = check_int("hidden_size", hidden_size, low=1)
    if hidden_states.dim() < 2:
        raise ValueError(
            f"hidden_states must have at least 2 dimensions {layout}, "
            f"got shape {tuple(hidden_states.shape)}"
        )
    if hidden_states.shape[-1] != width:
        raise ValueError(
            f"hidden_size must be the last size of hidden_states {layout}, "
            f"{hidden_states.shape[-1]}, got {hidden_size}"
        )
    return hidden_states.flatten(0, -2)


def _check_labels(name: str, labels: Any, rows: int) -> Tensor:
    check_tensor(name, labels, dtypes=INTEGERS)
    if labels.dim() == 0 or labels.numel() != rows:
        raise ValueError(
            f"{name} must have one label per hidden state (B, S), {rows}, "
            f"got shape {tuple(labels.shape)}"
        )
    return labels


def _check_accum_dtype(accum_dtype: Any, dtype: torch.dtype) -> None:
    ours = acc_dtype(dtype)
    if accum_dtype is not None and accum_dtype != ours:
        raise ValueError(
            f"accum_dtype must be None or {ours}, in which a head on {dtype} accumulates, "
            f"got {accum_dtype}"
        )


def _check_softcap(softcap: Any) -> float:
    """The head's word for it: 0 for none."""
    if softcap is None:
        return 0.0
    if not (value := check_float("softcap", softcap)) > 0.0:
        raise ValueError(f"softcap must be above 0 or None, got {softcap}")
    return value


def _chunk_size(chunk_mem_const: Any, input: Tensor, weight: Tensor) -> int | None:
    """Rows of a chunk whose (rows, V) logits hold ``chunk_mem_const`` N d elements."""
    budget = check_int("chunk_mem_const", chunk_mem_const, low=1)
    return None if budget == 1 else max(1, budget * input.numel() // max(1, weight.shape[0]))


def _evaluate(
    operands: tuple[Tensor, Tensor, Tensor],
    head: dict[str, Any],
    options: dict[str, Any],
    lse_square_scale: float,
    use_token_scaling: bool,
    returned: tuple[bool, bool, bool],
) -> Tensor | CrossEntropyOutput:
    """The loss and what is ``returned`` beside it: z term, accuracy, predictions."""
    target, reduction = operands[2], options["reduction"]
    valid = target != head["ignore_index"]
    scaling = _target_probabilities(operands, valid, head) if use_token_scaling else None
    # The head weighs no z term and returns it summed; anything else takes a pass of its own.
    z_apart = scaling is not None and lse_square_scale != 0.0
    z_rows = None
    if z_apart or (returned[0] and reduction == "none"):
        z_rows = _z_rows(operands, valid, head, lse_square_scale, scaling)
    z_loss = None if z_rows is None else _reduce(z_rows, valid, reduction)
    options = head | options | {"token_weight": scaling}
    options["z_loss"] = 0.0 if z_apart else lse_square_scale
    if not any(returned):
        loss = linear_cross_entropy(*operands, **options)
        return loss if z_loss is None else loss + z_loss
    loss, metrics = linear_cross_entropy(*operands, **options, return_metrics=True)
    if z_loss is None:
        z_loss = metrics.z_loss
    elif z_apart:
        loss = loss + z_loss
    accuracy = metrics.accuracy
    if reduction == "none":
        accuracy = ((metrics.argmax == target) & valid).to(loss.dtype)
    return CrossEntropyOutput(
        loss,
        z_loss.detach() if returned[0] else None,
        accuracy if returned[1] else None,
        metrics.argmax if returned[2] else None,
    )


def _target_probabilities(
    operands: tuple[Tensor, ...], valid: Tensor, head: dict[str, Any]
) -> Tensor:
    """p(target) (N,) without a graph, 0 at ignored rows."""
    with torch.no_grad():
        logp: Any = token_logprobs(*operands, **head)
    return torch.where(valid, logp.exp(), 0.0)


def _z_rows(
    operands: tuple[Tensor, ...],
    valid: Tensor,
    head: dict[str, Any],
    scale: float,
    weight: Tensor | None,
) -> Tensor:
    """``weight * scale * lse^2`` (N,), differentiable when weighted: nobody else adds it then."""
    with torch.set_grad_enabled(weight is not None and torch.is_grad_enabled()):
        stats: Any = token_logprobs(*operands, **head, return_stats=True)
        z = torch.where(valid, scale * stats.lse.square(), 0.0)
    return z if weight is None else weight * z


def _reduce(rows: Tensor, valid: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return rows
    return rows.sum() / valid.sum().clamp(min=1) if reduction == "mean" else rows.sum()
