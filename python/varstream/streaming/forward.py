"""The forward that a streamed module has in place of its own, which it still holds."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch


class Forward:
    """Callable with the signature of the module's own forward, which trainers read.

    ``run`` is a module-level function ``run(forward, args, kwargs)``, so that deepcopy and pickle
    work.
    """

    def __init__(self, module: Any, run: Callable[[Forward, Any, Any], Any]) -> None:
        self.module, self.run = module, run
        self.own = module.__dict__.get("forward")  # set on the instance before

    @property
    def kind(self) -> Any:
        return type(self.module)

    @torch._disable_dynamo  # the loop over chunks stays outside compiled graphs
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, args, kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return _signature(self.kind)[1]

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward."""
        if self.own is not None:
            return self.own(*args, **kwargs)
        return self.kind.forward(self.module, *args, **kwargs)

    def named(self, args: Any, kwargs: Any) -> dict[str, Any]:
        """A call's arguments by the names that the module's own forward gives them."""
        signature, _ = _signature(self.kind)
        bound = signature.bind(self.module, *args, **kwargs).arguments
        given: dict[str, Any] = {}
        for name, value in list(bound.items())[1:]:
            if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
                given |= value
            else:
                given[name] = value
        return given

    def remove(self) -> None:
        """Give the module its own forward back."""
        del self.module.forward
        if self.own is not None:
            self.module.forward = self.own


@lru_cache(maxsize=64)
def _signature(kind: Any) -> tuple[inspect.Signature, inspect.Signature]:
    """Of a class's forward, with and without self."""
    signature = inspect.signature(kind.forward)
    bound = list(signature.parameters.values())[1:]
    return signature, signature.replace(parameters=bound)
