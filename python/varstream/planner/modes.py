"""What is trained of a model described by its config: everything, low-rank adapters, or parts.

The model is on the meta device, so marking and adding parameters costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from varstream.planner.shapes import ALL_LINEAR


class LowRank(nn.Module):
    """A frozen linear layer with an adapter ``(alpha / r) B A x``, shaped and computed as PEFT's:
    the input is cast to the adapter's dtype, the sum back to the layer's."""

    def __init__(self, base: nn.Module, rank: int, dtype: torch.dtype) -> None:
        super().__init__()
        weight = base.weight
        assert isinstance(weight, Tensor)
        inner, outer = weight.shape if _is_transposed(base) else weight.shape[::-1]
        self.base_layer = base
        made: dict[str, Any] = {"bias": False, "dtype": dtype, "device": weight.device}
        self.lora_A = nn.Linear(inner, rank, **made)
        self.lora_B = nn.Linear(rank, outer, **made)

    def forward(self, x: Tensor) -> Tensor:
        result = self.base_layer(x)
        wide = x.to(self.lora_A.weight.dtype)
        return (result + self.lora_B(self.lora_A(wide)) * 2.0).to(result.dtype)


def train_parts(model: nn.Module, parts: Sequence[str]) -> None:
    """Freeze all parameters but those whose names contain one of the parts.

    Raises:
        ValueError: a part is in no parameter's name.
    """
    names = dict(model.named_parameters(remove_duplicate=False))
    for part in parts:
        if not any(part in name for name in names):
            raise ValueError(f"trained names no parameter of the model: {part!r}")
    model.requires_grad_(False)
    for name, parameter in names.items():
        if any(part in name for part in parts):
            parameter.requires_grad_(True)


def add_adapters(
    model: nn.Module, head: Any, rank: int, targets: str | Sequence[str], dtype: torch.dtype
) -> None:
    """Freeze the model and put adapters on its linear layers named by ``targets``: names or ends of
    names, or ``"all-linear"``, all of them but the head.

    Raises:
        ValueError: a target names no linear layer.
    """
    model.requires_grad_(False)
    linear = {name: module for name, module in model.named_modules() if _is_linear(module)}
    if targets == ALL_LINEAR:
        chosen = [name for name, module in linear.items() if module is not head]
    else:
        wanted = [targets] if isinstance(targets, str) else list(targets)
        for target in wanted:
            if not any(_ends_with(name, target) for name in linear):
                known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
                raise ValueError(
                    f"lora_targets names no linear layer: {target!r}; the model has {known}"
                )
        chosen = [name for name in linear if any(_ends_with(name, t) for t in wanted)]
    for name in chosen:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LowRank(linear[name], rank, dtype))


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _is_transposed(module: nn.Module) -> bool:
    """transformers' Conv1D, whose weight is (inner, outer)."""
    return type(module).__name__ == "Conv1D"


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_transposed(module)
