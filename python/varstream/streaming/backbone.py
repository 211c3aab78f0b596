"""A streamed backbone: its own forward over packed rows, while its layers and its final norm run
chunk by chunk."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from varstream._checks import FLOATING, INTEGERS, check_tensor
from varstream.planner.choose import Job, choose
from varstream.planner.devices import device_of
from varstream.planner.knee import warn_once
from varstream.planner.memory import Step
from varstream.planner.plan import require_fit
from varstream.planner.shapes import describe_parts
from varstream.planner.trace import UntraceableError
from varstream.streaming.calls import asks_for_cache, refusal, streamable, without_cache
from varstream.streaming.embedding import looked_up
from varstream.streaming.forward import Forward
from varstream.streaming.layer_call import (
    LayerBody,
    StreamCall,
    current_call,
    implementation,
    in_call,
    register,
    seen,
    sees_input,
    trained,
)
from varstream.streaming.recompute import Body, run_streamed
from varstream.streaming.routers import router_class
from varstream.streaming.rows import Rows, check_sequence_index, make_rows
from varstream.streaming.schedule import Schedule, resolve_chunk_size
from varstream.streaming.structure import STATE, attention_of


@dataclass(frozen=True)
class State:
    """How a model is streamed; hangs on its streamed modules while they are."""

    chunk_size: int | str
    head_chunk_size: int | str
    memory_budget: int | None
    optimizer: str
    compiler: str | None


@dataclass(frozen=True)
class PackedHidden:
    """What a streamed backbone gives to its streamed model."""

    values: Tensor  # (n, d)
    rows: Rows
    head_chunk: int | None  # rows of a chunk of logits; None: the head's own rule
    router_logits: list[Tensor]  # (n, experts) each


def layer_forward(forward: Forward, args: Any, kwargs: Any) -> Any:
    """A layer called by a streamed backbone; any other call runs the layer's own forward."""
    call = current_call.get()
    if call is None:
        return forward.original(*args, **kwargs)
    layer = forward.module
    if args:
        x, *args = args
    else:
        x = kwargs.pop("hidden_states")
    body = LayerBody(layer, attention_of(layer)[1], args, kwargs, call)
    y, *logits = _run(call, layer, body, x)
    call.router_logits += logits
    return (y,) if body.in_tuple else y


def norm_forward(forward: Forward, args: Any, kwargs: Any) -> Any:
    """The norm after the last layer, by rows."""
    call = current_call.get()
    if call is None:
        return forward.original(*args, **kwargs)
    (x,) = args

    def body(part: Tensor, *_: Any) -> tuple[Tensor]:
        return (forward.original(part[None])[0],)

    (y,) = _run(call, forward.module, body, x, attends=False)
    return y


def _run(
    call: StreamCall, module: Any, body: Body, x: Tensor, attends: bool = True
) -> tuple[Tensor, ...]:
    """Stream the body over x (1, n, d); y comes as (1, n, d) too."""
    gives = x is call.output and not call.exposed and not sees_input(module)
    again = next((lookup for lookup in call.lookups if lookup.output is x), None)
    y, *rest = run_streamed(
        body, x.squeeze(0), call.schedule, trained(module), attends, call.flow, gives, again
    )
    call.output, call.exposed = y[None], seen(module)
    return call.output, *rest


def backbone_forward(forward: Forward, args: Any, kwargs: Any) -> Any:
    """The decoder's forward; returns what the model's own would, or ``PackedHidden`` to a streamed
    model."""
    backbone, given = forward.module, forward.named(args, kwargs)
    caller = given.pop("stream_model", None)
    cached, learns = asks_for_cache(given), torch.is_grad_enabled()
    if cached and learns and backbone.training:
        raise ValueError(
            "a streamed model makes and reads no cache while it is trained; pass use_cache=False, "
            "or call it in torch.no_grad() or after model.eval()"
        )
    if cached:
        return forward.original(**given)
    if not learns and caller is None:
        cacheless, shown = without_cache(backbone.config, given)
        if not (cacheless and streamable(backbone, given)):
            return forward.original(**shown)
    given.pop("use_cache", None), given.pop("past_key_values", None)
    return_dict = given.pop("return_dict", getattr(backbone.config, "return_dict", True))
    routers = routers_wanted(backbone, given.pop("output_router_logits", None))
    if reason := refusal(backbone.config, given):
        raise ValueError(reason)
    tokens, embeds, rows = _rows(given)
    chunk, head_chunk = _plan(backbone, caller, rows, embeds)
    lengths = rows.lengths if rows.total else [0, 1]  # one row that nobody sees, see _packed
    device = rows.positions.device
    schedule, compiler = Schedule.make(lengths, chunk, device), getattr(backbone, STATE).compiler
    call = StreamCall(schedule, lengths[-1], rows.gaps, routers, compiler)
    inputs = _packed(rows, tokens, embeds)
    if routers is not None:  # ours to record: transformers would keep every chunk's
        inputs["output_router_logits"] = False
    register()
    with implementation(backbone.config), looked_up(backbone.get_input_embeddings()) as lookups:
        call.lookups = lookups
        output = in_call(call, forward.original, **inputs, use_cache=False)
    hidden, logits = output.last_hidden_state.squeeze(0), call.finish()
    if not rows.total:
        hidden, logits = hidden[:0], [part[:0] for part in logits]
    if caller is not None:
        return PackedHidden(hidden, rows, head_chunk, logits)
    output.last_hidden_state = rows.unpack(hidden)
    if routers is not None:
        output.router_logits = tuple(rows.unpack(part).flatten(0, 1) for part in logits)
    return output.to_tuple() if return_dict is False else output


def routers_wanted(backbone: Any, asked: bool | None) -> tuple[type, int] | None:
    """The routers whose logits a call wants."""
    asked = getattr(backbone.config, "output_router_logits", False) if asked is None else asked
    if not asked:
        return None
    kind = router_class(backbone)
    if kind is None:
        raise ValueError(f"output_router_logits=True, but {type(backbone).__name__} has no routers")
    return kind


def _rows(given: dict[str, Any]) -> tuple[Tensor | None, Tensor | None, Rows]:
    """Token ids (B, S) or embeddings (B, S, d), and the rows they are packed into."""
    tokens, embeds = given.get("input_ids"), given.get("inputs_embeds")
    if (tokens is None) == (embeds is None):
        raise ValueError("exactly one of input_ids and inputs_embeds must be given")
    if embeds is None:
        source = check_tensor("input_ids", tokens, ndim=2, dtypes=INTEGERS, layout="(B, S)")
    else:
        source = check_tensor("inputs_embeds", embeds, ndim=3, dtypes=FLOATING, layout="(B, S, d)")
    cu, cu_k = given.get("cu_seq_lens_q"), given.get("cu_seq_lens_k")
    for name, lengths in (("cu_seq_lens_q", cu), ("cu_seq_lens_k", cu_k)):
        if lengths is not None:
            check_tensor(name, lengths, ndim=1, layout="(B+1,)")
    if (cu is None) != (cu_k is None) or not (cu is cu_k or torch.equal(cu, cu_k)):  # type: ignore[arg-type]
        raise ValueError("cu_seq_lens_q and cu_seq_lens_k must be given together and be equal")
    batch, seqlen = source.shape[:2]
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    rows = make_rows(batch, seqlen, source.device, mask, positions, cu)
    if given.get("seq_idx") is not None:
        check_sequence_index(given["seq_idx"], rows)
    return tokens, embeds, rows


def _packed(rows: Rows, tokens: Tensor | None, embeds: Tensor | None) -> dict[str, Any]:
    """Inputs of the backbone's own forward, a batch of one row.

    Without a real token there is one of no document, so that every parameter still gets its
    gradient, zero, and joins what other ranks do.
    """
    if rows.total:
        inputs = {"position_ids": rows.positions[None]}
        if embeds is not None:
            return inputs | {"inputs_embeds": rows.pack(embeds)[None]}
        assert tokens is not None
        return inputs | {"input_ids": rows.pack(tokens)[None]}
    device = rows.positions.device
    inputs = {"position_ids": torch.zeros(1, 1, dtype=torch.int64, device=device)}
    if embeds is not None:
        return inputs | {"inputs_embeds": embeds.new_zeros(1, 1, embeds.shape[2])}
    return inputs | {"input_ids": torch.zeros(1, 1, dtype=torch.int64, device=device)}


def _plan(backbone: Any, model: Any, rows: Rows, embeds: Tensor | None) -> tuple[int, int | None]:
    """Rows of a layer chunk and of a head chunk (None: the head's own rule) for this batch.

    ``model`` is None where the backbone was called alone: its head is not in the plan then.
    """
    device, state = rows.positions.device, getattr(backbone, STATE)
    head_rows = None
    if isinstance(state.head_chunk_size, int):
        head_rows = min(state.head_chunk_size, max(1, rows.total))  # the operator takes an int64
    if state.memory_budget is None and (state.chunk_size != "auto" or device.type == "meta"):
        return resolve_chunk_size(state.chunk_size, device), head_rows
    bound = state.memory_budget is not None and torch.is_grad_enabled()  # it is for training
    try:
        with torch.inference_mode(False):  # it traces a backward
            head = None if model is None else model.get_output_embeddings()
            shape = describe_parts(backbone, head)
    except UntraceableError:
        if bound:
            raise
        return resolve_chunk_size(state.chunk_size, device), head_rows
    if embeds is not None:  # kept: there is nothing to look up
        shape = replace(shape, looks_up=False, input_gradient=embeds.requires_grad)
    longest = max((b - a for a, b in zip(rows.lengths, rows.lengths[1:], strict=False)), default=0)
    step = Step(
        max(1, rows.total),
        max(1, longest),
        torch.get_num_threads(),
        accumulate=any(p.grad is not None for p in (model or backbone).parameters()),
        padded=0 if rows.indices is None else rows.batch * rows.seqlen,
        device=device_of(device),
    )
    job = Job(
        shape, step, state.optimizer, state.chunk_size, state.head_chunk_size, state.memory_budget
    )
    choice = require_fit(job) if bound else choose(job)
    warn_once(choice.below_knee)
    return choice.chunk, head_rows or (choice.head_chunk if shape.vocab else None)
