"""Logits that are computed when somebody asks for them, and the model output that carries them.

Training needs the loss only, but code between a model and its user walks over the outputs: mixed
precision casts every one of them, evaluation collects them and often drops them. So ``items()`` and
``values()`` give a tensor without memory that knows its shape and dtype, survives a cast to
float32, and is computed by the first operation that reads it; attribute, key, index and tuple give
ordinary logits.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map_only
from transformers.modeling_outputs import CausalLMOutputWithPast, MoeCausalLMOutputWithPast


@dataclass
class Projection:
    """What the logits of one forward are made of: ``softcap(logit_scale * (hidden W^T + b))``.

    hidden (..., d), weight (V, d), bias (V,) or None; ``dtype`` is the one the projection runs in
    (autocast's, where it was on) and ``grad`` whether that forward recorded gradients.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float
    dtype: torch.dtype
    grad: bool

    def __post_init__(self) -> None:
        self.versions = self._versions()
        self.values: Tensor | None = None  # computed once, without a graph

    def compute(self) -> Tensor:
        """The logits (..., V), with a graph where the forward had one."""
        if not self.grad:
            return self.without_graph()
        self._check_unchanged()
        with torch.enable_grad():
            return self.of(self.hidden, self.weight, self.bias)

    def without_graph(self) -> Tensor:
        """The logits as plain values, computed once."""
        if self.values is None:
            self._check_unchanged()
            with torch.no_grad():
                self.values = self.of(self.hidden, self.weight, self.bias)
        return self.values

    def detached(self, needs: tuple[bool, ...]) -> list[Tensor | None]:
        """hidden, weight and bias as leaves, those that need it with a gradient."""
        self._check_unchanged()
        operands = self.hidden, self.weight, self.bias
        return [
            None if t is None else t.detach().requires_grad_(need)
            for t, need in zip(operands, needs, strict=True)
        ]

    def of(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The formula, with the casts spelled out: it may run where autocast is off."""
        with torch.autocast(hidden.device.type, enabled=False):
            operands = (t if t is None else t.to(self.dtype) for t in (hidden, weight, bias))
            logits = nn.functional.linear(*operands)  # type: ignore[arg-type]
            if self.logit_scale != 1.0:
                logits = logits * self.logit_scale
            if self.softcap > 0.0:
                logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def _versions(self) -> list[int]:
        operands = (self.hidden, self.weight, self.bias)
        return [t._version for t in operands if t is not None and not t.is_inference()]

    def _check_unchanged(self) -> None:
        gone = self.weight.untyped_storage().nbytes() == 0
        if gone or self._versions() != self.versions:
            raise RuntimeError(
                "output.logits was first read after lm_head.weight (or the hidden states) had been "
                f"{'freed' if gone else 'changed in place'}; read it before the optimizer steps"
            )


def projection_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype in which a head projects hidden: autocast's, where it is on."""
    kind = hidden.device.type
    if hidden.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return hidden.dtype
    return torch.get_autocast_dtype(kind)


class _Project(torch.autograd.Function):
    """The edge from lazy logits back to the head, for operations that autograd sees."""

    @staticmethod
    def forward(
        ctx: Any, projection: Projection, hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        # Not save_for_backward: activation offloading would carry off a weight nobody may ask for.
        ctx.projection = projection
        return LazyLogits(projection, projection.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        needs = ctx.needs_input_grad[1:]
        operands = ctx.projection.detached(needs)
        with torch.enable_grad():
            logits = ctx.projection.of(*operands)
        leaves = [t for t, need in zip(operands, needs, strict=True) if need]
        found = iter(torch.autograd.grad(logits, leaves, grad))
        return None, *(next(found) if need else None for need in needs)


class LazyLogits(Tensor):
    """Logits ``(..., V)`` without storage; whatever reads their values computes them."""

    projection: Projection

    @staticmethod
    def __new__(cls, projection: Projection, dtype: torch.dtype) -> LazyLogits:
        shape = (*projection.hidden.shape[:-1], projection.weight.shape[0])
        device = projection.hidden.device
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        self.projection = projection
        return self

    @staticmethod
    def make(projection: Projection) -> Tensor:
        """Lazy logits with their edge in the graph."""
        return _Project.apply(projection, projection.hidden, projection.weight, projection.bias)

    def compute(self) -> Tensor:
        """Ordinary logits, with a graph where the forward had one."""
        return self.projection.compute().to(self.dtype)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LazyLogits(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs == {"dtype": torch.float32}:
            return LazyLogits(args[0].projection, torch.float32)
        args, kwargs = tree_map_only(
            LazyLogits, lambda t: t.projection.without_graph().to(t.dtype), (args, kwargs)
        )
        return func(*args, **kwargs)


def _on_computed(name: str) -> Any:
    """A method that reads memory directly, past the dispatcher."""

    def method(self: LazyLogits, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.compute(), name)(*args, **kwargs)

    return method


for _name in (
    "numpy",
    "tolist",
    "data_ptr",
    "storage",
    "untyped_storage",
    "share_memory_",
    "__array__",
    "__dlpack__",
    "__reduce_ex__",
    "__deepcopy__",
):
    setattr(LazyLogits, _name, _on_computed(_name))


class _Lazy:
    """What an output with lazy ``logits`` overrides of the class of transformers after it.

    ``output.logits``, ``output["logits"]``, ``output[1]``, ``to_tuple()`` and pickling compute the
    logits; ``items()`` and ``values()`` hand on a ``LazyLogits``. Under gradients the logits are
    differentiable as the model's own are. They are those of the forward: reading them first after
    the weights have changed is refused.
    """

    plain: ClassVar[type]

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if type(value) is LazyLogits:
            value = value.compute()
            setattr(self, name, value)
        return value

    def __getitem__(self, key: Any) -> Any:
        output: Any = self
        if isinstance(key, str):
            if key not in output:
                raise KeyError(key)
            return getattr(self, key)
        names = list(output.keys())[key]
        return self[names] if isinstance(names, str) else tuple(self[name] for name in names)

    def get(self, key: Any, default: Any = None) -> Any:
        """As a dict's, with computed logits."""
        try:
            return self[key]
        except KeyError:
            return default

    def __reduce__(self) -> Any:
        """Pickles and copies as transformers' own class, logits computed."""
        values = (getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]
        return self.plain, tuple(values)


@dataclass(repr=False, eq=False)
class LazyCausalLMOutput(_Lazy, CausalLMOutputWithPast):
    """transformers' output of a causal language model, ``logits`` computed when asked for."""

    plain = CausalLMOutputWithPast


@dataclass(repr=False, eq=False)
class LazyMoeCausalLMOutput(_Lazy, MoeCausalLMOutputWithPast):
    """The same of a mixture of experts."""

    plain = MoeCausalLMOutputWithPast
