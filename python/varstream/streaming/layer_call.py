"""A decoder layer's own forward on a chunk of rows: its arguments cut to the chunk, its attention
taken over through transformers' registry of attention functions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from varstream.streaming.attend import Attend
from varstream.streaming.embedding import Lookup
from varstream.streaming.forward import Forward
from varstream.streaming.recompute import Flow
from varstream.streaming.routers import recorded
from varstream.streaming.schedule import DeviceChunk, Schedule
from varstream.streaming.structure import UnsupportedModelError

IMPLEMENTATION = "varstream_streamed"
# What a model may ask of an attention function and that a chunk's can't do.
_REFUSED = ("attention_bias", "head_mask", "position_bias", "s_aux", "sinks")


@dataclass
class StreamCall:
    """One forward of a streamed backbone: what its layers need besides their arguments."""

    schedule: Schedule
    total: int  # n
    gaps: bool  # some document has masked positions between its real ones
    routers: tuple[type, int] | None = None  # wanted: a router's class, its logits' place
    compiler: str | None = None  # torch.compile's backend for the layers, None: not compiled
    flow: Flow = field(default_factory=Flow)
    output: Tensor | None = None  # (1, n, d) of the streamed layer that ran last
    exposed: bool = True  # others may hold it, who could ask for its gradient
    lookups: list[Lookup] = field(default_factory=list)  # of tokens

    def finish(self) -> list[Tensor]:
        """The routers' logits, let go with the rest: the graph holds the call, and what the call
        held of the graph would never be freed."""
        logits, self.router_logits, self.output, self.lookups = self.router_logits, [], None, []
        return logits

    router_logits: list[Tensor] = field(default_factory=list)  # (n, experts) of each MoE layer


@dataclass
class _Slot:
    """The chunk that runs now."""

    attend: Attend
    gaps: bool
    calls: int = 0


current_call: ContextVar[StreamCall | None] = ContextVar("varstream_call", default=None)
_slot: ContextVar[_Slot | None] = ContextVar("varstream_slot", default=None)


@dataclass
class LayerBody:
    """A layer as the body of a streamed function; ``args`` and ``kwargs`` follow its input."""

    layer: Any
    attention: nn.Module
    args: Sequence[Any]
    kwargs: dict[str, Any]
    call: StreamCall
    in_tuple: bool = False  # whether the layer's output comes in a tuple

    def __call__(self, x: Tensor, chunk: DeviceChunk, attend: Attend) -> tuple[Tensor, ...]:
        """x (c, d) to the layer's output (c, d) and its routers' logits (c, experts)."""
        layer, call = self.layer, self.call
        args = [_rows_of(str(i + 1), a, chunk, call.total) for i, a in enumerate(self.args)]
        kwargs = {k: _rows_of(k, a, chunk, call.total) for k, a in self.kwargs.items()}
        slot = _Slot(attend, call.gaps)
        with ExitStack() as stack:
            stack.enter_context(_attending(self.attention, slot))
            stack.enter_context(_not_checkpointing(layer))
            if attend.projects and call.compiler is None:
                stack.enter_context(_without_queries(self.attention))
            logits = stack.enter_context(recorded(layer, call.routers))
            kind: Any = type(layer)
            forward = _own_forward(kind, call.compiler)
            y = forward(layer, x[None], *args, **kwargs)
        if isinstance(y, tuple) and len(y) == 1:
            self.in_tuple, (y,) = True, y
        if slot.calls != 1 or not isinstance(y, Tensor) or y.shape != (1, *x.shape):
            got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise UnsupportedModelError(
                f"{type(layer).__name__} called attention {slot.calls} times and returned {got}; "
                f"streaming understands one call and a tensor of shape {(1, *x.shape)}"
            )
        return y[0], *logits


@lru_cache(maxsize=64)
def _own_forward(kind: Any, compiler: str | None) -> Any:
    """A layer class's own forward, compiled on demand in graphs before and after the attention."""
    if compiler is None:
        return kind.forward
    return torch.compile(kind.forward, backend=compiler, dynamic=True)


def _rows_of(name: str, value: Any, chunk: DeviceChunk, total: int) -> Any:
    """An argument's rows of the chunk; what isn't a tensor, or a tuple of them, stays as it is."""
    if isinstance(value, tuple | list):
        return type(value)(_rows_of(name, part, chunk, total) for part in value)
    if not isinstance(value, Tensor):
        return value
    if value.requires_grad:
        raise UnsupportedModelError(
            f"the layer's argument {name} requires a gradient, which streaming would not form"
        )
    if value.dim() >= 2 and tuple(value.shape[:2]) == (1, total):
        return value[:, chunk.rows]
    if tuple(value.shape) == (total,):
        return value[chunk.rows]
    raise UnsupportedModelError(
        f"the layer's argument {name} of shape {tuple(value.shape)} has no row for each token"
    )


# --- attention ------------------------------------------------------------------------------------


def register() -> None:
    """Make our attention function known to transformers. It has no mask function: models make no
    mask for it then."""
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, _attention)


@contextmanager
def implementation(config: Any, name: str = IMPLEMENTATION) -> Iterator[None]:
    """Within, models with this configuration take their attention from us."""
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


@contextmanager
def _attending(attention: Any, slot: _Slot) -> Iterator[None]:
    token = _slot.set(slot)
    try:
        with implementation(attention.config):
            yield
    finally:
        _slot.reset(token)


@contextmanager
def _not_checkpointing(layer: Any) -> Iterator[None]:
    """A chunk is recomputed already; the layer's own flag would run it once more."""
    before = layer.__dict__.get("gradient_checkpointing")
    layer.gradient_checkpointing = False
    try:
        yield
    finally:
        if before is None:
            del layer.gradient_checkpointing
        else:
            layer.gradient_checkpointing = before


@contextmanager
def _without_queries(attention: Any) -> Iterator[None]:
    """Within, a query projection of its own gives zeros for one head, where nothing would notice:
    only K and V are wanted."""
    q_proj, width = getattr(attention, "q_proj", None), getattr(attention, "head_dim", None)
    if q_proj is None or width is None or "forward" in q_proj.__dict__ or _noticed(q_proj):
        yield
        return
    norm = getattr(getattr(attention, "q_norm", None), "weight", None)
    if norm is not None:
        width = norm.numel()  # a head's, or of all heads together
    q_proj.forward = lambda x: x.new_zeros(*x.shape[:-1], width)  # some clip it in place
    try:
        yield
    finally:
        del q_proj.forward


def _noticed(module: nn.Module) -> bool:
    """Whether somebody would notice that a module didn't run: its hooks, or the generators."""
    return any(
        m._forward_hooks or m._forward_pre_hooks or (isinstance(m, nn.Dropout) and m.training)
        for m in module.modules()
    )


def refuse_extras(name: str, asked: dict[str, Any]) -> None:
    """Refuse what else an attention module hands to the attention function."""
    for extra in _REFUSED:
        if asked.get(extra) is not None:
            raise UnsupportedModelError(f"{name} uses {extra}, as streaming can't")


@torch._disable_dynamo  # a compiled layer ends here and begins anew behind
def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query (1, Hq, c, D), key and value (1, Hkv, c, D) of the chunk's own rows; the keys before
    them are the layer's."""
    slot = _slot.get()
    if slot is None:
        raise RuntimeError(f"{IMPLEMENTATION} runs inside a streamed layer only")
    slot.calls += 1
    refuse_extras(type(module).__name__, kwargs)
    if is_causal is False or attention_mask is not None:
        raise UnsupportedModelError(
            f"{type(module).__name__} has a mask of its own or isn't causal, as streaming can't"
        )
    if sliding_window is not None and slot.gaps:
        raise ValueError(
            "attention_mask has masked positions inside a document, which a sliding window counts "
            "as keys; a streamed model can't honour both"
        )
    slot.attend.put(key[0].transpose(0, 1), value[0].transpose(0, 1))
    out = slot.attend(
        query[0].transpose(0, 1),
        {
            "softmax_scale": scaling,
            "window": _window(sliding_window),
            "softcap": softcap or 0.0,
            "dropout_p": dropout,
        },
    )
    return out[None], None


def _window(sliding_window: int | None) -> tuple[int, int]:
    """Hugging Face counts the row itself in its window."""
    if sliding_window is not None and sliding_window < 1:
        raise UnsupportedModelError(
            f"sliding_window is {sliding_window}; it must be None or at least 1"
        )
    return (-1, -1) if sliding_window is None else (sliding_window - 1, 0)


def seen(module: nn.Module) -> bool:
    """Whether hooks see the module's output, and could keep it or ask for its gradient."""
    everywhere = nn.modules.module
    return bool(
        module._forward_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or everywhere._global_forward_hooks
        or everywhere._global_backward_hooks
        or everywhere._global_backward_pre_hooks
        or _wrapped(module)
    )


def sees_input(module: nn.Module) -> bool:
    """The same of its input."""
    pre_hooks = module._forward_pre_hooks or nn.modules.module._global_forward_pre_hooks
    return bool(pre_hooks or _wrapped(module))


def _wrapped(module: nn.Module) -> bool:
    """Whether a streamed module's forward was wrapped afterwards."""
    return not isinstance(module.__dict__.get("forward"), Forward)


def trained(module: nn.Module) -> list[Tensor]:
    """The module's parameters whose gradients are wanted."""
    return [p for p in module.parameters() if p.requires_grad]


def in_call(call: StreamCall, function: Any, *args: Any, **kwargs: Any) -> Any:
    """Run the function while ``call`` is the current one."""
    token = current_call.set(call)
    try:
        return function(*args, **kwargs)
    finally:
        current_call.reset(token)
