"""Modules around ``linear_cross_entropy`` and ``token_logprobs``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from varstream._checks import check_tensor
from varstream.ops._head import check_reduction
from varstream.ops.linear_cross_entropy import CrossEntropyMetrics, linear_cross_entropy
from varstream.ops.token_logprobs import TokenStats, token_logprobs

Loss = Tensor | tuple[Tensor, CrossEntropyMetrics]

# Keywords that are ours, with their defaults: shown by repr where they differ.
_OURS: dict[str, Any] = {
    "logit_scale": 1.0,
    "softcap": 0.0,
    "temperature": 1.0,
    "z_loss": 0.0,
    "chunk_size": None,
    "logits_dtype": None,
    "validate": False,
    "return_metrics": False,
}


class _CrossEntropy(nn.Module):
    """The keywords of ``linear_cross_entropy`` that are fixed at construction."""

    weight: Tensor | None

    def __init__(self, weight: Tensor | None, reduction: str, keywords: dict[str, Any]) -> None:
        super().__init__()
        check_reduction(reduction)
        if weight is not None:
            check_tensor("weight", weight, ndim=1, layout="(V,)")
        self.register_buffer("weight", weight)
        self.reduction = reduction
        for name, value in keywords.items():
            setattr(self, name, value)
        self._keywords = tuple(keywords)

    def _loss(self, input: Tensor, linear_weight: Tensor, target: Tensor, **given: Any) -> Loss:
        """``given``: the keywords that come with each call."""
        return linear_cross_entropy(
            input,
            linear_weight,
            target,
            weight=self.weight,
            reduction=self.reduction,
            **given,
            **{name: getattr(self, name) for name in self._keywords},
        )

    def extra_repr(self) -> str:
        shown = ["reduction", "ignore_index", "label_smoothing", "options"]
        shown += [name for name, default in _OURS.items() if getattr(self, name) != default]
        return ", ".join(f"{name}={getattr(self, name)}" for name in shown)


class LinearCrossEntropy(_CrossEntropy):
    """``linear_cross_entropy`` with its options fixed; the weight comes with each call.

    For a head that lives elsewhere, such as one tied to an embedding. The arguments are those of
    ``linear_cross_entropy``, except that ``weight`` (V,), the class weights, is a buffer. What
    belongs to a batch comes with the call: ``max_rows`` and ``weight_grad`` too.

    Raises:
        TypeError, ValueError: as ``linear_cross_entropy``, for most arguments at the first call.
    """

    def __init__(
        self,
        *,
        weight: Tensor | None = None,
        reduction: str = "mean",
        ignore_index: int | None = -100,
        label_smoothing: float = 0.0,
        logit_scale: float = 1.0,
        softcap: float = 0.0,
        temperature: float = 1.0,
        z_loss: float = 0.0,
        options: Any = None,
        chunk_size: int | None = None,
        logits_dtype: torch.dtype | None = None,
        validate: bool = False,
        return_metrics: bool = False,
    ) -> None:
        keywords = {
            "ignore_index": ignore_index,
            "label_smoothing": label_smoothing,
            "logit_scale": logit_scale,
            "softcap": softcap,
            "temperature": temperature,
            "z_loss": z_loss,
            "options": options,
            "chunk_size": chunk_size,
            "logits_dtype": logits_dtype,
            "validate": validate,
            "return_metrics": return_metrics,
        }
        super().__init__(weight, reduction, keywords)

    def forward(
        self,
        input: Tensor,
        linear_weight: Tensor,
        target: Tensor,
        *,
        linear_bias: Tensor | None = None,
        token_weight: Tensor | None = None,
        normalizer: int | float | Tensor | None = None,
        max_rows: int | None = None,
        weight_grad: Tensor | None = None,
    ) -> Loss:
        """The loss of ``input`` (N, d) under ``linear_weight`` (V, d); see the function."""
        return self._loss(
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            token_weight=token_weight,
            normalizer=normalizer,
            max_rows=max_rows,
            weight_grad=weight_grad,
        )


class LinearCrossEntropyLoss(_CrossEntropy):
    """A linear layer and its cross-entropy: ``torch.nn.LinearCrossEntropyLoss`` and more.

    Parameters are named as in torch's module (``linear.weight`` (num_classes, in_features),
    ``linear.bias``, and the buffer ``weight``), so state dicts interchange.

    Args:
        in_features: width d of the input.
        num_classes: number of classes V.
        out_features: must be ``()``: torch's K-dimensional losses are not supported.
        bias: whether the linear layer has one.
        device, dtype: of the linear layer's parameters.
        reduction: this and the keywords up to ``return_metrics`` as in ``linear_cross_entropy``.

    Raises:
        TypeError, ValueError: as ``linear_cross_entropy``, for most arguments at the first call;
            an ``out_features`` that isn't ``()`` or a ``weight`` of the wrong shape at once.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = -100,
        label_smoothing: float = 0.0,
        options: Any = None,
        logit_scale: float = 1.0,
        softcap: float = 0.0,
        temperature: float = 1.0,
        z_loss: float = 0.0,
        chunk_size: int | None = None,
        logits_dtype: torch.dtype | None = None,
        validate: bool = False,
        return_metrics: bool = False,
    ) -> None:
        if tuple(out_features) != ():
            raise ValueError(
                f"out_features must be (): K-dimensional losses are not supported, "
                f"got {out_features}"
            )
        if weight is not None:
            check_tensor("weight", weight, shape=(num_classes,), layout="(num_classes,)")
        keywords = {
            "ignore_index": ignore_index,
            "label_smoothing": label_smoothing,
            "logit_scale": logit_scale,
            "softcap": softcap,
            "temperature": temperature,
            "z_loss": z_loss,
            "options": options,
            "chunk_size": chunk_size,
            "logits_dtype": logits_dtype,
            "validate": validate,
            "return_metrics": return_metrics,
        }
        super().__init__(weight, reduction, keywords)
        self.num_classes = num_classes
        self.out_features = tuple(out_features)
        self.linear = nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        token_weight: Tensor | None = None,
        normalizer: int | float | Tensor | None = None,
        max_rows: int | None = None,
        weight_grad: Tensor | None = None,
    ) -> Loss:
        """The loss of ``input`` (N, in_features) for ``target`` (N,) or (N, K).

        With ``weight_grad`` (num_classes, in_features), such as ``linear.weight.grad``, the
        backward adds the weight's gradient there.
        """
        return self._loss(
            input,
            self.linear.weight,
            target,
            linear_bias=self.linear.bias,
            token_weight=token_weight,
            normalizer=normalizer,
            max_rows=max_rows,
            weight_grad=weight_grad,
        )

    def extra_repr(self) -> str:
        own = {
            "in_features": self.linear.in_features,
            "num_classes": self.num_classes,
            "out_features": self.out_features,
            "bias": self.linear.bias is not None,
        }
        return ", ".join(f"{name}={value}" for name, value in own.items()) + (
            ", " + super().extra_repr()
        )


class TokenLogProbs(nn.Module):
    """``token_logprobs`` with its options fixed; the weight comes with each call."""

    def __init__(
        self,
        *,
        logit_scale: float = 1.0,
        softcap: float = 0.0,
        temperature: float = 1.0,
        ignore_index: int = -100,
        chunk_size: int | None = None,
        logits_dtype: torch.dtype | None = None,
        validate: bool = False,
        return_entropy: bool = False,
        return_stats: bool = False,
    ) -> None:
        super().__init__()
        self.logit_scale = logit_scale
        self.softcap = softcap
        self.temperature = temperature
        self.ignore_index = ignore_index
        self.chunk_size = chunk_size
        self.logits_dtype = logits_dtype
        self.validate = validate
        self.return_entropy = return_entropy
        self.return_stats = return_stats

    def forward(
        self,
        input: Tensor,
        linear_weight: Tensor,
        target: Tensor,
        *,
        linear_bias: Tensor | None = None,
        max_rows: int | None = None,
        weight_grad: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor] | TokenStats:
        """Log-probabilities of ``target`` under ``linear_weight`` (V, d); see the function."""
        return token_logprobs(
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            temperature=self.temperature,
            ignore_index=self.ignore_index,
            chunk_size=self.chunk_size,
            max_rows=max_rows,
            logits_dtype=self.logits_dtype,
            weight_grad=weight_grad,
            validate=self.validate,
            return_entropy=self.return_entropy,
            return_stats=self.return_stats,
        )

    def extra_repr(self) -> str:
        names = ["logit_scale", "softcap", "temperature", "ignore_index", "chunk_size"]
        names += ["logits_dtype", "validate", "return_entropy", "return_stats"]
        shown = {name: getattr(self, name) for name in names}
        return ", ".join(f"{name}={value}" for name, value in shown.items())
