"""float64 twins of Hugging Face models, whose own arithmetic is exact to rounding.

A Hugging Face "float64" model casts its norms, rotary tables, routers and loss to float32 and is
exact to about 6e-8 only; its twin computes everything in float64, so exactness can be tested to
rounding.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from varstream._random_state import random_state_kept

IMPLEMENTATION = "varstream_float64"
_LOWER = (torch.float32, torch.bfloat16, torch.float16)
_CASTS = (Tensor.float, Tensor.bfloat16, Tensor.half)
# Tensors that models pass on to attention functions and that change no score.
_HARMLESS = {
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "num_items_in_batch",
    "position_ids",
    "seq_idx",
    "shift_labels",
}


def float64_twin(model: Any) -> Any:
    """Return a float64 copy of a Hugging Face causal language model.

    Norms, rotary tables, routers, attention and the loss compute in float64: casts to a lower
    dtype inside the parts of its layers become casts to float64. The load balancing loss of a
    mixture of experts is a function of the model's module; ``exact_routers`` takes its casts out.

    Raises:
        ValueError: a part of the model still computes in a lower dtype, or its attention takes
            what the twin doesn't know; the message names it.
    """
    twin = copy.deepcopy(model).to(torch.float64)
    _register()
    twin.config._attn_implementation = IMPLEMENTATION
    twin.config._experts_implementation = "eager"  # the grouped product knows no float64
    _take_out_casts(twin, inside=False)
    wrapped = twin.get_base_model() if hasattr(twin, "get_base_model") else twin
    wrapped.loss_function = causal_lm_loss
    _check_exact(twin)
    return twin


def _take_out_casts(module: nn.Module, inside: bool) -> None:
    """Give transformers' parts of a layer forwards without casts. Attention modules get hooks: a
    forward on the instance is what ``vs.stream`` refuses there. What holds one keeps its own."""
    if _is_attention(module):
        module.register_forward_pre_hook(_enter)
        module.register_forward_hook(_leave, always_call=True)
        inside = True
    home = type(module).__module__.startswith("transformers.")
    if home and not inside and not any(_is_attention(part) for part in module.modules()):
        module.forward = partial(_without_casts, module)
        inside = True
    for child in module.children():
        _take_out_casts(child, inside)


def _is_attention(module: nn.Module) -> bool:
    return any(kind.__name__.endswith("Attention") for kind in type(module).__mro__)


def _without_casts(self: Any, *args: Any, **kwargs: Any) -> Any:
    with _Float64():
        return type(self).forward(self, *args, **kwargs)


def _enter(*_: Any) -> None:
    mode = _Float64()
    mode.__enter__()
    _entered.append(mode)


def _leave(*_: Any) -> None:
    _entered.pop().__exit__(None, None, None)


_entered: list[TorchFunctionMode] = []


class _Float64(TorchFunctionMode):
    """Casts to lower dtypes become casts to float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _CASTS:
            func = Tensor.double
        kwargs = {name: _raised(value) for name, value in (kwargs or {}).items()}
        return func(*map(_raised, args), **kwargs)


def _raised(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in _LOWER else value


# --- what is left ---------------------------------------------------------------------------------


@torch.no_grad()
def _check_exact(twin: Any) -> None:
    """Run two tokens and see whether anything in float64 is cast to less."""
    running: list[str] = []

    def enter(name: str) -> Any:
        return lambda *_: running.append(name)

    def leave(*_: Any) -> None:
        running.pop()

    handles = []
    for name, module in twin.named_modules():
        handles.append(module.register_forward_pre_hook(enter(name or type(module).__name__)))
        handles.append(module.register_forward_hook(leave, always_call=True))
    device = next(twin.parameters()).device
    ids = torch.zeros(1, 2, dtype=torch.int64, device=device)
    watch = _Watch(running)
    try:
        with random_state_kept([device]), exact_routers(twin), watch:
            twin(input_ids=ids, labels=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if watch.found is not None:
        raise ValueError(
            f"{watch.found} computes in a lower dtype by itself; its float64 twin isn't exact"
        )


class _Watch(TorchDispatchMode):
    """Finds the first cast of a float64 tensor to a lower dtype, by the module that runs."""

    def __init__(self, running: list[str]) -> None:
        super().__init__()
        self.running = running
        self.found: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        cast = func is torch.ops.aten._to_copy.default and args[0].dtype == torch.float64
        if cast and out.dtype in _LOWER and self.found is None:
            self.found = self.running[-1] if self.running else "the model"
        return out


# --- attention ------------------------------------------------------------------------------------


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, eager_mask)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor]:
    """The classes' eager attention without its cast."""
    unknown = [n for n, x in others.items() if isinstance(x, Tensor) and n not in _HARMLESS]
    if unknown:
        raise ValueError(f"{type(module).__name__} uses {unknown[0]}, unknown to a float64 twin")
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        scores = scores + attention_mask
    if s_aux is not None:  # sinks (Hq,): one more column, without a value
        sinks = s_aux.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], -1)
    weights = scores.softmax(-1)[..., : key.shape[2]]
    weights = nn.functional.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


# --- losses ---------------------------------------------------------------------------------------


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """transformers' causal language model loss without its cast to float32."""
    if shift_labels is None:
        assert labels is not None
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = nn.functional.cross_entropy(
        logits.view(-1, vocab_size),
        shift_labels.reshape(-1),
        ignore_index=ignore_index,
        reduction=reduction,
    )
    return loss if num_items_in_batch is None else loss / num_items_in_batch


causal_lm_loss.is_causal_lm_loss = True  # type: ignore[attr-defined]  # vs.stream may fuse it


def load_balancing_loss(
    gate_logits: tuple[Tensor, ...],
    num_experts: int,
    top_k: int = 2,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """transformers' load balancing loss without its casts: experts times the sum over them of the
    share of rows that chose each and of its mean probability, over all layers.

    Args:
        gate_logits: ``(rows, num_experts)`` of each layer.
        num_experts: how many there are.
        top_k: how many each row chooses.
        attention_mask: ``(B, S)``, rows = B S; rows at zeros don't count.

    Source: Switch Transformer (arXiv 2101.03961), equations 4 to 6.
    """
    logits = torch.stack(gate_logits)
    real = torch.ones(logits.shape[1]) if attention_mask is None else attention_mask.flatten()
    weight = real.to(logits)[:, None] / (real.sum() * len(gate_logits))
    probabilities = logits.softmax(-1)
    chosen = nn.functional.one_hot(probabilities.topk(top_k, dim=-1).indices, num_experts).sum(2)
    shares, means = ((t * weight).sum((0, 1)) for t in (chosen, probabilities))
    return num_experts * (shares * means).sum()


@contextmanager
def exact_routers(model: Any) -> Iterator[None]:
    """Within, models of this class have ``load_balancing_loss`` for their router loss."""
    wrapped = model.get_base_model() if hasattr(model, "get_base_model") else model
    home: Any = sys.modules[type(wrapped).__module__]
    before = getattr(home, "load_balancing_loss_func", None)
    if before is None:
        yield
        return
    home.load_balancing_loss_func = load_balancing_loss
    try:
        yield
    finally:
        home.load_balancing_loss_func = before
