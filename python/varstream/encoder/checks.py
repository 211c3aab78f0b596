"""Checks of a model's parts: what is bypassed on packed rows must do nothing of its own.

A model is checked part by part before it is touched, and its layers again at each call, so that a
part that was exchanged or hooked meanwhile is refused rather than left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from varstream.ops.attention_call import MAX_HEAD_DIM
from varstream.streaming import UnsupportedModelError

ATTENTION = ("eager", "sdpa", "flash_attention", "flex_attention", "varstream")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def check_stock(name: str, module: nn.Module, kind: str) -> None:
    """Refuse a class of somebody else's, or a forward set on the instance."""
    if not type(module).__module__.startswith(f"transformers.models.{kind}."):
        raise UnsupportedModelError(
            f"{name} is a {type(module).__module__}.{type(module).__qualname__}, "
            f"not a class of transformers.models.{kind}"
        )
    _check_forward(name, module)


def check_bypassed(name: str, module: nn.Module, kind: str) -> None:
    """Refuse a container whose own forward, which is bypassed, is not the stock one."""
    check_stock(name, module, kind)
    check_hooks(name, module)


def check_hooks(name: str, module: nn.Module) -> None:
    """Refuse hooks on a module that is bypassed: they would never fire.

    transformers' own recorders of hidden states and attentions stay on a model once either has been
    asked for; they do nothing unless it is asked for again, which a padding-free model refuses.
    """
    for hooks in _HOOKS:
        for hook in module.__dict__[hooks].values():
            if getattr(hook, "__name__", "") != "output_capturing_hook":
                raise UnsupportedModelError(
                    f"{name} has hooks, which would not fire on a padding-free model"
                )


def check_config(config: Any, refused: tuple[str, ...]) -> None:
    """Refuse the options ``refused`` where they are set, and attention that can't be replaced."""
    for name in refused:
        if value := getattr(config, name, False):
            raise UnsupportedModelError(
                f"config.{name} is {value!r}; vs.padding_free runs plain bidirectional encoders"
            )
    implementation = getattr(config, "_attn_implementation", None) or "eager"
    if not implementation.startswith(ATTENTION):
        raise UnsupportedModelError(
            f"attention implementation {implementation!r} isn't one that vs.padding_free replaces "
            "exactly"
        )


def check_children(module: nn.Module, known: tuple[str, ...], prefix: str = "") -> None:
    """Refuse parts that the stock class doesn't have."""
    for name, _ in module.named_children():
        if name not in known:
            raise UnsupportedModelError(
                f"{prefix}{name} is a part that vs.padding_free doesn't understand"
            )


def check_head_dim(name: str, head_dim: int) -> None:
    if head_dim > MAX_HEAD_DIM:
        raise UnsupportedModelError(f"{name} has heads of {head_dim}, more than {MAX_HEAD_DIM}")


def _check_forward(name: str, module: nn.Module) -> None:
    if "forward" in module.__dict__:
        raise UnsupportedModelError(
            f"{name} has a forward set on the instance; call vs.padding_free first and wrap "
            "afterwards"
        )


class Reader:
    """Reads the parts of one layer, and at the end refuses what nobody read.

    Layers call these parts, or only their weights, in the place of the modules between.
    """

    def __init__(self, name: str, layer: nn.Module, kind: str) -> None:
        self.name = name
        self.layer = layer
        self.kind = kind
        self._left = dict(layer.named_modules())
        self._read: list[str] = []

    def module(self, path: str) -> Any:
        """A container, whose own forward is bypassed; None when it isn't there."""
        return self._left.get(path)

    def part(self, path: str, *types: type[nn.Module]) -> Any:
        """One of the layer's innermost modules, of exactly one of these types.

        Raises:
            UnsupportedModelError: it is missing, of another type, hooked, or has its own forward.
        """
        name, module = f"{self.name}.{path}", self._left.pop(path, None)
        if type(module) not in types:
            got = "missing" if module is None else f"a {type(module).__name__}"
            raise UnsupportedModelError(f"{name} is {got}, not a plain nn.{types[0].__name__}")
        assert module is not None
        _check_forward(name, module)
        check_hooks(name, module)
        self._read.append(path)
        return module

    def linear(self, path: str) -> nn.Linear:
        return self.part(path, nn.Linear)

    def norm(self, path: str) -> nn.LayerNorm:
        return self.part(path, nn.LayerNorm)

    def dropout(self, path: str | None) -> nn.Dropout | None:
        return None if path is None else self.part(path, nn.Dropout)

    def activation(self, path: str) -> Callable[[Tensor], Tensor]:
        """The activation; transformers' and torch's own are known to be elementwise."""
        owner, _, attribute = path.rpartition(".")
        for inner in [p for p in self._left if p == path or p.startswith(f"{path}.")]:
            del self._left[inner]
        self._read.append(path)
        found = getattr(self.layer.get_submodule(owner), attribute)
        check_activation(f"{self.name}.{path}", found)
        return found

    def close(self) -> None:
        """Refuse modules that are neither read nor a stock container of what was read.

        Raises:
            UnsupportedModelError: names the first.
        """
        for path, module in self._left.items():
            if not path:
                continue  # the layer itself is called, so its hooks fire
            if not any(known.startswith(f"{path}.") for known in self._read):
                raise UnsupportedModelError(
                    f"{self.name}.{path} is a part that vs.padding_free doesn't understand"
                )
            check_bypassed(f"{self.name}.{path}", module, self.kind)


def check_activation(name: str, activation: Any) -> None:
    """Refuse an activation that isn't transformers' or torch's own, or that has hooks."""
    module = getattr(type(activation), "__module__", "")
    if isinstance(activation, nn.Module):
        if not module.startswith(("transformers.activations", "torch.nn.modules.activation")):
            raise UnsupportedModelError(
                f"{name} is a {module}.{type(activation).__qualname__}, "
                "not an activation of transformers or torch"
            )
        _check_forward(name, activation)
        if any(activation.__dict__[hooks] for hooks in _HOOKS):
            raise UnsupportedModelError(
                f"{name} has hooks, which would not fire on a padding-free model"
            )
    elif getattr(activation, "__module__", None) not in ("torch.nn.functional", "torch._C._nn"):
        raise UnsupportedModelError(
            f"{name} is {activation!r}, not an activation of transformers or torch"
        )
