"""TRL's trainers on our head: SFT, DPO, GRPO, KTO and RLOO, unchanged.

Since 1.16 these trainers take every log-probability from one function, the module global
``trl.trainer.utils._ChunkedLogProbFunction``, which ``add_fused_lm_head`` calls with the hidden
states and the head's weight. ``install`` puts ``vs.token_logprobs`` in its place.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any

import torch
from torch import Tensor

from varstream.ops.token_logprobs import token_logprobs

_MODULE = "trl.trainer.utils"
_NAME = "_ChunkedLogProbFunction"
_USER = "add_fused_lm_head"
_PARAMETERS = (
    "ctx",
    "hidden",
    "weight",
    "bias",
    "targets",
    "temperature",
    "chunk_size",
    "final_logit_softcapping",
    "logit_scale",
    "outputs",
)
_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
_LogProbs = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class UnsupportedTRLError(ValueError):
    """The installed TRL isn't laid out as this hook knows it; nothing was replaced."""


class LogProbs:
    """What stands in for TRL's autograd function; only ``apply`` is ever called."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = _OUTPUTS,
    ) -> _LogProbs:
        """TRL's function of this signature.

        Args:
            hidden: ``(N, d)``.
            weight: ``(V, d)``, any float dtype: it is cast to the one of ``hidden``.
            bias: ``(V,)`` or ``None``.
            targets: ``(N,)`` classes.
            temperature: divisor of the logits.
            chunk_size: TRL's tile of the vocabulary; ours are tiles of rows, chosen by ourselves.
            final_logit_softcapping: bound of the logits, ``None`` for none.
            logit_scale: factor on the projection, before the bound.
            outputs: names among ``entropy``, ``log_sum_sq_probs``, ``mean_logits`` and ``is_top1``;
                ``log_probs`` always comes.

        Returns:
            log-probabilities ``(N,)``, then the four outputs in that order, ``None`` where not
            asked for. The first two are differentiable. float32 (float64 for float64 ``hidden``).

        Raises:
            ValueError: an output we don't know, or a weight that DeepSpeed ZeRO-3 partitions
                between forward and backward.
        """
        if unknown := set(outputs) - {"log_probs", *_OUTPUTS}:
            raise ValueError(f"outputs must be among {', '.join(_OUTPUTS)}, got {min(unknown)!r}")
        if hasattr(weight, "ds_id") and torch.is_grad_enabled():
            raise ValueError(
                "weight is partitioned by DeepSpeed ZeRO-3, which takes it back before our "
                "backward reads it; call varstream.integrations.trl.uninstall() to train with it"
            )
        wanted = [name for name in _OUTPUTS if name in outputs]
        if not torch.is_autocast_enabled(hidden.device.type):
            weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        result: Any = token_logprobs(
            hidden,
            weight,
            targets,
            linear_bias=bias,
            logit_scale=float(logit_scale),
            softcap=final_logit_softcapping or 0.0,
            temperature=float(temperature),
            return_entropy=wanted == ["entropy"],
            return_stats=bool(set(wanted) - {"entropy"}),
        )
        if not wanted:
            return result, None, None, None, None
        if wanted == ["entropy"]:
            return *result, None, None, None
        entropy, squares, mean, top = (
            getattr(result, name) if name in wanted else None for name in _OUTPUTS
        )
        return result.logp, entropy, squares, mean, top


def install() -> None:
    """Make TRL's trainers take their log-probabilities from ``vs.token_logprobs``.

    Holds for the process, for trainers that exist already too, and may be called again. Context
    parallelism, PEFT, packing and padding are TRL's business as before.

    Raises:
        ImportError: TRL isn't installed.
        UnsupportedTRLError: a ValueError naming the version and what is missing or different, or
            another library's replacement; nothing was replaced.
    """
    module = _trl_utils()
    if getattr(module, _NAME, None) is not LogProbs:
        _check_layout(module)
        setattr(module, _NAME, LogProbs)


def uninstall() -> None:
    """Give TRL its own function back; without a previous ``install`` nothing happens.

    Raises:
        ImportError: TRL isn't installed.
    """
    module = _trl_utils()
    if getattr(module, _NAME, None) is LogProbs:
        setattr(module, _NAME, _original())


@contextmanager
def installed() -> Iterator[None]:
    """``install`` for the body of a ``with``; what was there before comes back at its end.

    Raises:
        ImportError, UnsupportedTRLError: as ``install``.
    """
    module = _trl_utils()
    before = getattr(module, _NAME, None)
    install()
    try:
        yield
    finally:
        setattr(module, _NAME, before)


# --- what must be there ---------------------------------------------------------------------------


def _trl_utils() -> Any:
    try:
        return importlib.import_module(_MODULE)
    except ImportError as error:
        raise ImportError(
            f"varstream.integrations.trl needs TRL: pip install trl ({error})"
        ) from None


def _original() -> Any:
    """TRL's own function, from where it is defined."""
    try:
        return importlib.import_module("trl.kernels").ChunkedLogProbFunction
    except (ImportError, AttributeError):
        _refuse("trl.kernels.ChunkedLogProbFunction is missing")


def _check_layout(module: Any) -> None:
    original = _original()
    current = getattr(module, _NAME, None)
    if current is None:
        _refuse(f"{_MODULE}.{_NAME} is missing")
    if current is not original:
        _refuse(f"{_MODULE}.{_NAME} has been replaced by {current!r}")
    parameters = tuple(inspect.signature(original.forward).parameters)
    if parameters != _PARAMETERS:
        _refuse(f"{_NAME}.forward takes ({', '.join(parameters)})")
    if not _uses(getattr(getattr(module, _USER, None), "__code__", None)):
        _refuse(f"{_MODULE}.{_USER} doesn't call {_NAME}")
    kernel = importlib.import_module(original.__module__)
    if getattr(kernel, "OPTIONAL_OUTPUTS", None) != _OUTPUTS:
        _refuse(f"{_NAME} computes {getattr(kernel, 'OPTIONAL_OUTPUTS', None)}")


def _uses(code: CodeType | None) -> bool:
    """Whether a function's code, or a function defined in it, reads the global."""
    if code is None:
        return False
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return _NAME in code.co_names or any(_uses(constant) for constant in inner)


def _refuse(reason: str) -> Any:
    import trl

    raise UnsupportedTRLError(
        f"TRL {trl.__version__} isn't laid out as this hook knows it (1.16): {reason}"
    )
