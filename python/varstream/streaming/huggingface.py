"""``vs.stream`` and ``vs.unstream``: a Hugging Face causal language model, in place.

Two forwards are replaced on the instances, the backbone's and the whole model's; weights,
configuration, ``generate`` and ``state_dict`` stay what they are. Without gradients or with a cache
the original forwards run untouched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from varstream._checks import FLOATING, INTEGERS, check_bool, check_int, check_tensor
from varstream.ops.linear_cross_entropy import linear_cross_entropy
from varstream.planner.choose import Job, choose
from varstream.planner.memory import Step
from varstream.planner.plan import check_chunk, check_optimizer, require_fit
from varstream.planner.shapes import describe_parts
from varstream.streaming.decoder import (
    DecoderLayer,
    Rotary,
    UnsupportedModelError,
    check_bypassed,
    check_supported,
)
from varstream.streaming.layer import run_streamed
from varstream.streaming.rows import (
    Rows,
    check_labels,
    check_sequence_index,
    documents_shown,
    make_rows,
    shift_labels,
)
from varstream.streaming.schedule import Schedule, resolve_chunk_size

IGNORE_INDEX = -100
_STATE = "_varstream"
# What transformers passes down to a decoder and that streaming has read or may ignore.
_KNOWN = {
    "num_items_in_batch",
    "shift_labels",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
    "seq_idx",
}
_REFUSED = ("output_attentions", "output_hidden_states", "output_router_logits")


@dataclass(frozen=True)
class State:
    """How a module is streamed; hangs on the backbone, its layers and the model while they are."""

    chunk_size: int | str
    head_chunk_size: int | str
    reverse: bool
    memory_budget: int | None
    optimizer: str


@dataclass(frozen=True)
class LayerCall:
    """What a streamed layer needs besides its input."""

    schedule: Schedule
    row_numbers: Tensor  # int64 (n,), which the rotary tables are indexed with
    rotary: Rotary


def stream(
    model: Any,
    chunk_size: int | str = "auto",
    head_chunk_size: int | str = "auto",
    offload: bool = False,
    memory_budget: int | None = None,
    *,
    reverse: bool = False,
    optimizer: str = "adamw",
) -> Any:
    """Make a Hugging Face causal language model stream its backward, in place.

    Training then keeps one input per layer and one chunk's activations, never the logits; padded
    batches are packed inside, packed rows are taken as they are, and losses and gradients stay
    those of the dense model. Use it as before: ``loss = model(...).loss; loss.backward()``. With
    ``labels`` the output has no logits (they are never formed). The backbone alone
    (``model.model``) streams too. Each document's last token predicts nothing.

    A padding position predicts nothing and is predicted by nothing, and a document's last token
    predicts nothing: the loss is that of the documents run one by one. (transformers' own loss on a
    padded batch differs where labels say so: with left padding it trains the first token from a
    padding row unless that label is -100.)

    Args:
        model: a ``LlamaForCausalLM``, ``Qwen2ForCausalLM`` or ``Qwen3ForCausalLM``.
        chunk_size: rows of a layer chunk, or ``"auto"``, planned for each call from its real
            tokens: on the CPU 1024, up to 4096 where more rows cost little memory; on CUDA 4096.
        head_chunk_size: rows of a chunk of logits, or ``"auto"``.
        offload: keeping layer inputs in host memory; must be False. On the CPU they are there
            already, on a GPU it is not available in this version.
        memory_budget: bytes that the whole job may take, as in ``vs.plan_memory``: weights,
            gradients, optimizer states and the step. Chunks left ``"auto"`` are then made as small
            as each call's tokens need. A backbone called alone is planned without the head. CPU
            only in this version.
        reverse: walk each layer's chunks last to first; the result is the same to rounding.
        optimizer: whose states the budget counts: ``"adamw"``, ``"sgd"`` (no momentum), ``"none"``.

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: a ValueError naming the part of the model that isn't understood;
            nothing was changed.
        TypeError, ValueError: an argument breaks its contract. A call whose predicted peak passes
            ``memory_budget`` with the smallest chunks raises a ValueError before it computes
            anything.

    Source: StreamBP (arXiv 2506.03077) over packed rows, with K and V formed once a layer.
    """
    check_chunk("chunk_size", chunk_size)
    check_chunk("head_chunk_size", head_chunk_size)
    check_optimizer(optimizer)
    if check_bool("offload", offload):
        raise ValueError(
            "offload=True is not available in this version of varstream: layer inputs stay on the "
            "model's device (on the CPU that is host memory already); pass False"
        )
    if memory_budget is not None:
        check_int("memory_budget", memory_budget, low=1)
    check_bool("reverse", reverse)
    state = State(chunk_size, head_chunk_size, reverse, memory_budget, optimizer)
    if hasattr(model, _STATE):
        unstream(model)
    check_supported(model)
    for module in _streamed_modules(model):
        setattr(module, _STATE, state)
        # A partial of a module-level function: survives deepcopy and pickle.
        module.forward = partial(_FORWARDS[_role(model, module)], module)
    return model


def unstream(model: Any) -> Any:
    """Undo ``stream``: give the model its own forwards back. Returns the same model.

    Raises:
        ValueError: the model is not streamed.
    """
    if not hasattr(model, _STATE) or not hasattr(model, "lm_head"):
        raise ValueError(f"{type(model).__name__} is not a streamed causal language model")
    modules = _streamed_modules(model)
    for module in modules:
        if getattr(module.forward, "func", None) not in _FORWARDS.values():
            raise ValueError(
                f"{type(module).__name__}.forward was replaced after vs.stream; undo that first"
            )
    for module in modules:
        del module.__dict__[_STATE], module.forward
    return model


def _streamed_modules(model: Any) -> list[Any]:
    """The modules whose forward is replaced: the model, its backbone, the backbone's layers."""
    return [model, model.model, *model.model.layers]


def _role(model: Any, module: Any) -> str:
    return "model" if module is model else "backbone" if module is model.model else "layer"


# --- the replaced forwards ------------------------------------------------------------------------


def _layer_forward(
    self: Any, *args: Any, stream_call: LayerCall | None = None, **kwargs: Any
) -> Any:
    """A layer called by a streamed backbone; any other call runs the layer's own forward."""
    if stream_call is None:
        return type(self).forward(self, *args, **kwargs)
    check_bypassed("self_attn", self.self_attn)
    parts = DecoderLayer(self, stream_call.rotary)
    params = [p for p in self.parameters() if p.requires_grad]
    return run_streamed(
        parts.kv,
        parts.rest,
        args[0],
        stream_call.row_numbers,
        stream_call.schedule,
        params,
        parts.attention(),
    )


@torch._disable_dynamo  # the loop over chunks stays outside compiled graphs
def _backbone_forward(
    self: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,
    use_cache: bool | None = None,
    **kwargs: Any,
) -> Any:
    """The decoder's forward; returns what the model's own would, or the packed rows to a streamed
    model."""
    state: State = getattr(self, _STATE)
    if not torch.is_grad_enabled() or use_cache or past_key_values is not None:
        if use_cache is None and past_key_values is None:
            attention_mask, position_ids, packed = documents_shown(
                attention_mask, position_ids, kwargs.get("cu_seq_lens_q")
            )
            # With a cache, which is transformers' default, documents would see each other.
            use_cache = False if packed else None
        return type(self).forward(
            self,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
    caller = kwargs.pop("stream_model", None)  # a streamed model, which takes packed rows
    return_dict = kwargs.pop("return_dict", getattr(self.config, "return_dict", True))
    _check_kwargs(self, kwargs)
    rows = _rows(input_ids, inputs_embeds, attention_mask, position_ids, kwargs)
    if rows.gaps and any(getattr(layer.self_attn, "sliding_window", None) for layer in self.layers):
        raise ValueError(
            "attention_mask has masked positions inside a document, which a sliding window counts "
            "as keys; a streamed model can't honour both"
        )
    chunk, head_chunk = _plan(self, caller, rows, state, inputs_embeds)
    if inputs_embeds is not None:
        x = rows.pack(inputs_embeds)
    else:
        assert input_ids is not None
        x = self.embed_tokens(rows.pack(input_ids))
    x = _decode(self, x, rows, chunk, state.reverse)
    if caller is not None:
        return x, rows, head_chunk
    from transformers.modeling_outputs import BaseModelOutputWithPast

    output = BaseModelOutputWithPast(last_hidden_state=rows.unpack(x))
    return output.to_tuple() if return_dict is False else output


def _plan(
    backbone: Any, model: Any, rows: Rows, state: State, inputs_embeds: Tensor | None
) -> tuple[int, int | None]:
    """Rows of a layer chunk and of a head chunk (None: the head's own rule) for this batch.

    ``model`` is None where the backbone was called alone: its head is not in the plan then.
    """
    device = rows.positions.device
    head_rows = None
    if isinstance(state.head_chunk_size, int):
        head_rows = min(state.head_chunk_size, max(1, rows.total))  # the operator takes an int64
    if state.memory_budget is None and (state.chunk_size != "auto" or device.type != "cpu"):
        return resolve_chunk_size(state.chunk_size, device), head_rows
    if device.type != "cpu":
        raise ValueError(
            f"memory_budget must be None on {device}: this version predicts CPU memory only"
        )
    shape = describe_parts(backbone, None if model is None else model.lm_head)
    if inputs_embeds is not None and inputs_embeds.requires_grad:
        shape = replace(shape, input_gradient=True)
    longest = max((b - a for a, b in zip(rows.lengths, rows.lengths[1:], strict=False)), default=0)
    step = Step(
        max(1, rows.total),
        max(1, longest),
        torch.get_num_threads(),
        any(p.grad is not None for p in (model or backbone).parameters()),
        state.reverse,
        0 if rows.indices is None else rows.batch * rows.seqlen,
    )
    job = Job(
        shape, step, state.optimizer, state.chunk_size, state.head_chunk_size, state.memory_budget
    )
    choice = choose(job) if job.budget is None else require_fit(job)
    return choice.chunk, head_rows or (choice.head_chunk if shape.vocab else None)


def _decode(backbone: Any, x: Tensor, rows: Rows, chunk_size: int, reverse: bool) -> Tensor:
    """All layers and the final norm over packed rows x (n, d)."""
    schedule = Schedule.make(rows.lengths, chunk_size, x.device, reverse)
    cos, sin = backbone.rotary_emb(x[None], rows.positions[None])  # (1, n, D)
    numbers = torch.arange(rows.total, device=x.device)
    call = LayerCall(schedule, numbers, Rotary(cos[0], sin[0]))
    for layer in backbone.layers[: backbone.config.num_hidden_layers]:
        x = layer(x, stream_call=call)
    norm = backbone.norm
    params = [p for p in norm.parameters() if p.requires_grad]
    return run_streamed(None, lambda part, *_: norm(part), x, numbers, schedule, params, {})


def _rows(
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    kwargs: dict[str, Any],
) -> Rows:
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("exactly one of input_ids and inputs_embeds must be given")
    if inputs_embeds is None:
        given = check_tensor("input_ids", input_ids, ndim=2, dtypes=INTEGERS, layout="(B, S)")
    else:
        given = check_tensor(
            "inputs_embeds", inputs_embeds, ndim=3, dtypes=FLOATING, layout="(B, S, d)"
        )
    cu, cu_k = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    for name, lengths in (("cu_seq_lens_q", cu), ("cu_seq_lens_k", cu_k)):
        if lengths is not None:
            check_tensor(name, lengths, ndim=1, layout="(B+1,)")
    if (cu is None) != (cu_k is None) or not (cu is cu_k or torch.equal(cu, cu_k)):  # type: ignore[arg-type]
        raise ValueError("cu_seq_lens_q and cu_seq_lens_k must be given together and be equal")
    batch, seqlen = given.shape[:2]
    rows = make_rows(batch, seqlen, given.device, attention_mask, position_ids, cu)
    if kwargs.get("seq_idx") is not None:
        check_sequence_index(kwargs["seq_idx"], rows)
    return rows


def _check_kwargs(module: Any, kwargs: dict[str, Any]) -> None:
    for name in _REFUSED:
        value = kwargs.pop(name, None)
        if value or (value is None and getattr(module.config, name, False)):
            raise ValueError(
                f"{name}=True is not available on a streamed model; call vs.unstream first"
            )
    if kwargs.pop("is_causal", None) is False:
        raise ValueError("is_causal=False is not available on a streamed model")
    unknown = sorted(
        name for name, value in kwargs.items() if name not in _KNOWN and value is not None
    )
    if unknown:
        raise ValueError(f"a streamed model can't honour the argument {unknown[0]}")


def _model_forward(
    self: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,
    labels: Tensor | None = None,
    use_cache: bool | None = None,
    logits_to_keep: int | Tensor = 0,
    **kwargs: Any,
) -> Any:
    """The whole model's forward; with labels the loss comes straight from packed rows, without
    logits."""
    inputs = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        "past_key_values": past_key_values,
        "inputs_embeds": inputs_embeds,
        "use_cache": use_cache,
    }
    targets = kwargs.get("shift_labels")
    if (
        not torch.is_grad_enabled()
        or use_cache
        or past_key_values is not None
        or (labels is None and targets is None)
    ):
        return type(self).forward(
            self, **inputs, labels=labels, logits_to_keep=logits_to_keep, **kwargs
        )
    _check_loss(self)
    check_bypassed("lm_head", self.lm_head)
    return_dict = kwargs.pop("return_dict", getattr(self.config, "return_dict", True))
    hidden, rows, head_chunk = self.model(**inputs, **kwargs, stream_model=self)
    if targets is None:
        assert labels is not None
        check_labels("labels", labels, rows, hidden.device)
        targets = shift_labels(labels, rows, IGNORE_INDEX)
    else:
        check_labels("shift_labels", targets, rows, hidden.device)
        targets = rows.pack(targets)
    loss = linear_cross_entropy(
        hidden,
        self.lm_head.weight,
        targets,
        linear_bias=self.lm_head.bias,
        ignore_index=IGNORE_INDEX,
        normalizer=kwargs.get("num_items_in_batch"),
        chunk_size=head_chunk,
    )
    from transformers.modeling_outputs import CausalLMOutputWithPast

    output = CausalLMOutputWithPast(loss=loss)
    return output.to_tuple() if return_dict is False else output


def _check_loss(model: Any) -> None:
    """Only the plain causal language model loss is fused; another must not be replaced silently."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    function = model.loss_function
    name = getattr(function, "__name__", repr(function))
    if function is not ForCausalLMLoss and not getattr(function, "is_causal_lm_loss", False):
        raise UnsupportedModelError(
            f"model.loss_function is {name}; a streamed model fuses ForCausalLMLoss only. "
            "Call it without labels to get logits."
        )


_FORWARDS: dict[str, Callable[..., Any]]
_FORWARDS = {"model": _model_forward, "backbone": _backbone_forward, "layer": _layer_forward}
