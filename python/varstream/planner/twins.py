"""A model's layers run on shapes: twins of its modules on the meta device, the arguments that the
backbone gives its layers, and the trace of each kind of layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from varstream.planner.allocations import Allocations
from varstream.planner.trace import (
    BACKWARD,
    FORWARD,
    PROJECT,
    RECOMPUTE,
    Line,
    Trace,
    UntraceableError,
    upper,
)

N, C = 1_000_003, 10_007  # primes: rows of the batch and of a chunk


def on_meta(module: nn.Module, known: dict[int, Any] | None = None) -> Any:
    """The module with parameters and buffers on the meta device, without hooks and without a
    forward of its instance; what is shared stays shared, everything else is the original's."""
    known = {} if known is None else known
    if id(module) in known:
        return known[id(module)]
    twin = known[id(module)] = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    twin.__dict__.pop("forward", None)
    for name, value in module.__dict__.items():
        if name.endswith("_hooks") and isinstance(value, dict):
            twin.__dict__[name] = type(value)()
    for kind in ("_parameters", "_buffers"):
        tensors = module.__dict__[kind].items()
        twin.__dict__[kind] = {name: _shape_of(t, known) for name, t in tensors}
    children = module._modules.items()
    twin.__dict__["_modules"] = {
        name: None if child is None else on_meta(child, known) for name, child in children
    }
    return twin


def _shape_of(tensor: Tensor | None, known: dict[int, Any]) -> Any:
    if tensor is None:
        return None
    if id(tensor) not in known:
        meta = torch.empty_like(tensor, device="meta", requires_grad=False)
        if isinstance(tensor, nn.Parameter):
            meta = nn.Parameter(meta, requires_grad=tensor.requires_grad)
        known[id(tensor)] = meta
    return known[id(tensor)]


class LayerArguments(NamedTuple):
    """What the backbone gives a layer besides its input."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Twin:
    """A backbone on the meta device whose layers can be run by themselves."""

    def __init__(self, backbone: nn.Module) -> None:
        from varstream.streaming.backbone import routers_wanted

        self.backbone = on_meta(backbone)
        self.routers = routers_wanted(backbone, None)  # whose logits the config asks for
        self.layers, self.norm = parts_of(self.backbone)
        self.width = self.backbone.config.hidden_size
        self.dtype = self.backbone.get_input_embeddings().weight.dtype
        self._begun: dict[int, tuple[list[LayerArguments], float]] = {}
        self.looks_up = False  # whether the first layer's input comes straight from the embedding

    def arguments(self, n: int) -> list[LayerArguments]:
        """Of each layer, for a packed row of n tokens."""
        return self._begin(n)[0]

    @property
    def row_bytes(self) -> float:
        """Bytes a token that the backbone keeps besides its layers' inputs: rotary tables,
        positions, a dropout's mask."""
        return self._begin(N)[1] - self.width * self.dtype.itemsize

    def _begin(self, n: int) -> tuple[list[LayerArguments], float]:
        """The backbone's own forward without its layers: what they are given, and the bytes of a
        token that live."""
        if n not in self._begun:
            self._begun[n] = self._capture(n)
        return self._begun[n]

    def _capture(self, n: int) -> tuple[list[LayerArguments], float]:
        from varstream.streaming.embedding import looked_up
        from varstream.streaming.layer_call import implementation, register
        from varstream.streaming.routers import router_class

        given: list[LayerArguments] = []

        def forward(*args: Any, **kwargs: Any) -> Any:
            x, *rest = args or (kwargs.pop("hidden_states"),)
            if not given:
                self.looks_up = any(lookup.output is x for lookup in lookups)
            given.append(LayerArguments(tuple(rest), kwargs))
            return x

        places: dict[str, Any] = {"dtype": torch.int64, "device": "meta"}
        inputs: dict[str, Any] = {"use_cache": False}
        inputs |= {name: torch.empty(1, n, **places) for name in ("input_ids", "position_ids")}
        if router_class(self.backbone) is not None:
            inputs["output_router_logits"] = False
        replaced = self.layers + [m for m in (self.norm,) if m is not None]
        allocations = Allocations(n, C)
        allocations.ignore(self._tensors(inputs["input_ids"]))
        register()
        for module in replaced:
            module.forward = forward
        try:
            embedding = self.backbone.get_input_embeddings()
            with (
                implementation(self.backbone.config),
                looked_up(embedding) as lookups,
                allocations,
                torch.enable_grad(),
            ):
                output = type(self.backbone).forward(self.backbone, **inputs)
            live = allocations.live[1] + inputs["position_ids"].itemsize
            del output
        finally:
            for module in replaced:
                del module.forward
        return given[: len(self.layers)], live

    def _tensors(self, *more: Any) -> list[Any]:
        return [*self.backbone.parameters(), *self.backbone.buffers(), *more]

    def trace_layer(self, index: int) -> Trace:
        """A streamed layer whose input needs a gradient; of like layers one is run."""
        given = self.arguments(N)[index]
        key = _likeness(self.layers[index], given, self.dtype, self.routers)
        if key not in _traces:
            _traces[key] = self._trace_layer(index)
        return _traces[key]

    def _trace_layer(self, index: int) -> Trace:
        from varstream.streaming.layer_call import LayerBody, StreamCall
        from varstream.streaming.structure import attention_of

        layer = self.layers[index]
        attention = attention_of(layer)[1]

        def body_of(n: int, schedule: Any) -> tuple[Any, LayerArguments]:
            given = self.arguments(n)[index]
            call = StreamCall(schedule, n, False, self.routers)
            return LayerBody(layer, attention, given.args, given.kwargs, call), given

        return self._trace(body_of, layer, True)

    def trace_norm(self) -> Trace:
        """The final norm, streamed by rows."""
        assert self.norm is not None
        key = _likeness(self.norm, None, self.dtype, None)
        if key not in _traces:
            _traces[key] = self._trace_norm(self.norm)
        return _traces[key]

    def _trace_norm(self, norm: nn.Module) -> Trace:
        def body(part: Tensor, *_: Any) -> tuple[Tensor]:
            return (norm(part[None])[0],)

        return self._trace(lambda *_: (body, None), norm, False)

    def _trace(self, body_of: Any, module: nn.Module, attends: bool) -> Trace:
        from varstream.streaming.recompute import run_streamed

        params = [p for p in module.parameters() if p.requires_grad]

        def run(n: int, c: int, chunks: int) -> tuple[list[Line], list[Line], Any]:
            schedule = _schedule(c, chunks, n)
            x, dy = (torch.empty(n, self.width, dtype=self.dtype, device="meta") for _ in "xy")
            x.requires_grad_()
            body, given = body_of(n, schedule)
            allocations = Allocations(n, c)
            allocations.ignore(self._tensors(x, dy, *tree_iter(given)))
            marked = _Marked(body, allocations, chunks, attends)
            with allocations, torch.enable_grad():
                outputs = run_streamed(marked, x, schedule, params, attends)
                given_back = [dy, *(torch.empty_like(logits) for logits in outputs[1:])]
                forward, allocations.lines = allocations.lines, []
                held = list(allocations.live)
                torch.autograd.grad(outputs, [x, *params], given_back)
            backward = [line.above(held) for line in allocations.lines]
            return forward, backward, allocations.attention

        try:
            forward, later, attention = run(N, C, 2)
            _, single, _ = run(C, C, 1)
            return Trace(upper(forward), upper(single), upper(later), attention)
        except Exception as error:  # whatever a module does that needs values
            words = " ".join(str(error).split())[:200]
            raise UntraceableError(
                f"{type(module).__name__} can't be planned: it does what depends on values, as "
                f'experts_implementation="eager" does ({words})'
            ) from error


_traces: dict[Any, Trace] = {}  # of every kind of layer seen


def _likeness(module: nn.Module, given: Any, dtype: torch.dtype, routers: Any) -> tuple[Any, ...]:
    """Equal for modules that allocate alike: classes, parameters, settings, arguments.

    Other floating settings than a dropout's, such as an attention's scale, change no allocation.
    """
    parts: list[Any] = [dtype, routers, torch.are_deterministic_algorithms_enabled()]
    parts += [(t.shape[2:], t.dtype) for t in tree_iter(given) if isinstance(t, Tensor)]
    for name, inner in module.named_modules():
        settings = [
            (key, value)
            for key, value in vars(inner).items()
            if key not in _OF_ONE
            and isinstance(value, bool | int | str)
            or (isinstance(value, float) and (key == "p" or "drop" in key))
        ]
        parts.append((name, type(inner), tuple(settings)))
        experts = getattr(inner, "config", None)
        parts.append(getattr(experts, "_experts_implementation", None))
        for key, p in inner._parameters.items():
            if p is not None:
                parts.append((key, tuple(p.shape), p.dtype, p.requires_grad))
    return tuple(parts)


_OF_ONE = ("layer_idx", "layer_id")  # settings that number layers


class _Marked:
    """A body that says which phase it runs in."""

    def __init__(self, body: Any, allocations: Allocations, chunks: int, attends: bool) -> None:
        self.body, self.allocations = body, allocations
        projections = [PROJECT] * chunks if attends else []
        self.phases = iter([FORWARD] * chunks + projections + [RECOMPUTE] * chunks)

    def __call__(self, *args: Any) -> Any:
        phase = self.allocations.phase = next(self.phases)
        outputs = self.body(*args)
        if phase == RECOMPUTE:
            self.allocations.phase = BACKWARD
        return outputs


def _schedule(c: int, chunks: int, n: int) -> Any:
    """So many times the first c rows, one document."""
    from varstream.streaming.chunks import Chunk
    from varstream.streaming.schedule import DeviceChunk, Schedule

    lengths = torch.empty(2, dtype=torch.int32, device="meta")
    plan = Chunk(0, c, 0, [0, c], [0, c], c, c)
    return Schedule([DeviceChunk(plan, lengths, lengths)] * chunks, n)


def parts_of(backbone: Any) -> tuple[list[Any], nn.Module | None]:
    """The layers and the norm after them, as ``streaming.structure.find_parts`` finds them."""
    children = list(backbone.children())
    layers = next(child for child in children if isinstance(child, nn.ModuleList))
    norms = [child for child in children if type(child).__name__.endswith("Norm")]
    return list(layers)[: backbone.config.num_hidden_layers], norms[0] if norms else None
