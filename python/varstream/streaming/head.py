"""A streamed causal language model: with labels its loss comes straight from packed rows, without
logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from varstream._random_state import random_state_kept
from varstream.ops.linear_cross_entropy import linear_cross_entropy
from varstream.streaming.backbone import PackedHidden, routers_wanted
from varstream.streaming.calls import asks_for_cache, nan_of_nothing, streamable, wanted
from varstream.streaming.forward import Forward
from varstream.streaming.routers import balances_load, load_balancing, router_class
from varstream.streaming.rows import check_labels, shift_labels
from varstream.streaming.structure import (
    Parts,
    UnsupportedModelError,
    active_head,
    check_head,
    head_refusal,
)

IGNORE_INDEX = -100


def model_forward(forward: Forward, args: Any, kwargs: Any) -> Any:
    """The whole model's forward: its own, over a streamed backbone, where no loss is wanted, or
    where it gives, without gradients, what a streamed model doesn't."""
    model, given = forward.module, forward.named(args, kwargs)
    if not _wants_loss(given) or not (torch.is_grad_enabled() or _streams_evaluation(model, given)):
        return forward.original(*args, **kwargs)
    labels, targets = given.pop("labels", None), given.get("shift_labels")
    keep = given.pop("logits_to_keep", 0)
    if isinstance(keep, Tensor) or keep:
        raise ValueError(
            "logits_to_keep must be 0 with labels: a streamed model forms no logits to keep"
        )
    head = model.get_output_embeddings()
    _check_loss(model)
    check_head(head)
    return_dict = given.pop("return_dict", getattr(model.config, "return_dict", True))
    backbone = getattr(model, model.base_model_prefix)
    routers = routers_wanted(backbone, given.get("output_router_logits"))
    packed: PackedHidden = backbone(**given, stream_model=model)
    hidden, rows = packed.values, packed.rows
    if targets is None:
        assert labels is not None
        labels = check_labels("labels", labels, rows).to(hidden.device)
        targets = shift_labels(labels, rows, IGNORE_INDEX)
    else:
        targets = rows.pack(check_labels("shift_labels", targets, rows).to(hidden.device))
    scale, softcap = logits_rule(model)
    hidden, weight, bias = head_operands(head, hidden)
    loss = linear_cross_entropy(
        hidden,
        weight,
        targets,
        linear_bias=bias,
        logit_scale=scale,
        softcap=softcap,
        ignore_index=IGNORE_INDEX,
        normalizer=given.get("num_items_in_batch"),
        chunk_size=packed.head_chunk,
    )
    loss = nan_of_nothing(loss, targets, given.get("num_items_in_batch"), IGNORE_INDEX)
    found: dict[str, Any] = {"loss": loss}
    if routers is not None:
        aux = load_balancing(model, packed.router_logits)
        logits = tuple(rows.unpack(part).flatten(0, 1) for part in packed.router_logits)
        found["loss"] = loss + model.router_aux_loss_coef * aux
        found |= {"aux_loss": aux, "router_logits": logits}
    if not torch.is_grad_enabled():
        found["logits"] = _lazy(rows.unpack(hidden), weight, bias, scale, softcap)
    output = _output_class(router_class(backbone) is not None)(**found)
    return output.to_tuple() if return_dict is False else output


def _wants_loss(given: dict[str, Any]) -> bool:
    return not asks_for_cache(given) and any(
        given.get(name) is not None for name in ("labels", "shift_labels")
    )


def _streams_evaluation(model: Any, given: dict[str, Any]) -> bool:
    """Whether a loss without gradients comes from packed rows: nothing in the call would be
    refused."""
    keep, backbone = given.get("logits_to_keep", 0), getattr(model, model.base_model_prefix)
    asked = {name: x for name, x in given.items() if name not in ("labels", "logits_to_keep")}
    return (
        given.get("labels") is not None
        and not isinstance(keep, Tensor)
        and not keep
        and _has_plain_loss(model)
        and head_refusal(model.get_output_embeddings()) is None
        and streamable(backbone, asked)
        and (not wanted(model.config, given, "output_router_logits") or balances_load(model))
    )


def _lazy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float
) -> Tensor:
    """Logits of hidden (B, S, d), computed if they are read."""
    from varstream.integrations.transformers import lazy_logits

    dtype = lazy_logits.projection_dtype(hidden)
    projection = lazy_logits.Projection(hidden, weight, bias, scale, softcap, dtype, grad=False)
    return lazy_logits.LazyLogits.make(projection)


def _output_class(mixture: bool) -> Any:
    """Of transformers' kind, whose logits may be lazy."""
    from varstream.integrations.transformers import lazy_logits

    return lazy_logits.LazyMoeCausalLMOutput if mixture else lazy_logits.LazyCausalLMOutput


def head_operands(head: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """What stands in ``hidden W^T + bias`` for a head: (n, d'), (V, d'), (V,).

    A LoRA adapter adds ``s B A x``: its ``s A x`` are r more columns of the hidden states and its B
    r more of the weight, so that V x d never exists a second time as a product.
    """
    head = active_head(head)
    base = getattr(head, "base_layer", None)
    if base is None:
        return hidden, head.weight, head.bias
    if head.disable_adapters and head.merged:
        head.unmerge()  # as its own forward does
    weight = base.weight
    if head.disable_adapters or head.merged:
        return hidden, weight, base.bias
    columns, weights = [hidden], [weight]
    for name in head.active_adapters:
        if name not in head.lora_A:
            continue
        down, up = head.lora_A[name], head.lora_B[name]
        low = F.linear(head.lora_dropout[name](hidden).to(down.weight.dtype), down.weight)
        columns.append((low * head.scaling[name]).to(hidden.dtype))
        weights.append(up.weight.to(weight.dtype))
    return torch.cat(columns, 1), torch.cat(weights, 1), base.bias


def logits_rule(model: Any) -> tuple[float, float]:
    """Scale and softcap of the model's logits, ``softcap(scale (x W^T + b))``, by the names that
    transformers' configurations use."""
    config = model.config
    softcap = getattr(config, "final_logit_softcapping", None) or 0.0
    divisor = getattr(config, "logits_scaling", None)
    if divisor is not None:
        return 1.0 / divisor, softcap
    scale = getattr(config, "logit_scale", None)
    return (1.0 if scale is None else scale), softcap


@torch.no_grad()
def check_logits(parts: Parts) -> None:
    """Refuse a model whose logits are not what ``logits_rule`` says, told by two rows of hidden
    states that its own forward turns into logits.

    Raises:
        UnsupportedModelError: they differ.
    """
    model, backbone, head = parts.model, parts.backbone, parts.head
    weight: Any = getattr(head, "base_layer", head).weight
    if weight.is_meta:  # sizes only
        return
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 2, weight.shape[1], generator=draw).to(weight)
    training = [m for m in head.modules() if m.training]
    before = backbone.__dict__.get("forward")
    routers = {"output_router_logits": False} if router_class(backbone) else {}
    with random_state_kept([weight.device]):
        try:
            for module in training:
                module.training = False
            backbone.forward = lambda *_, **__: _Hidden(hidden)
            ids = torch.zeros(1, 2, dtype=torch.int64, device=weight.device)
            theirs = type(model).forward(model, input_ids=ids, use_cache=False, **routers).logits
            scale, softcap = logits_rule(model)
            ours = head(hidden) * scale
        finally:
            for module in training:
                module.training = True
            del backbone.forward
            if before is not None:
                backbone.forward = before
    if softcap:
        ours = softcap * torch.tanh(ours / softcap)
    tolerance = 0.02 if weight.dtype in (torch.bfloat16, torch.float16) else 1e-3
    if not torch.allclose(
        ours.float(), theirs.float(), tolerance, tolerance * float(theirs.abs().max()), True
    ):
        raise UnsupportedModelError(
            f"{type(model).__name__} does more to its logits than a scale ({scale}) and a softcap "
            f"({softcap}); streaming understands nothing else"
        )


class _Hidden:
    """A backbone's output with hidden states and nothing else."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, place: int) -> Tensor:
        return (self.last_hidden_state,)[place]

    def __getattr__(self, name: str) -> None:
        return None


def _check_loss(model: Any) -> None:
    """Only the plain causal language model loss is fused; another must not be replaced silently."""
    if not _has_plain_loss(model):
        function = model.loss_function
        raise UnsupportedModelError(
            f"model.loss_function is {getattr(function, '__name__', repr(function))}; a streamed "
            "model fuses ForCausalLMLoss only. Call it without labels to get logits."
        )


def _has_plain_loss(model: Any) -> bool:
    from transformers.loss.loss_utils import ForCausalLMLoss

    function = model.loss_function
    return function is ForCausalLMLoss or getattr(function, "is_causal_lm_loss", False)
