"""``vs.stream`` and ``vs.unstream``: a Hugging Face causal language model, in place.

The forwards of the model, its backbone, the backbone's layers and the norm after them are replaced
on the instances; weights, configuration, ``generate`` and ``state_dict`` stay what they are.
Without gradients or with a cache the original forwards run untouched.
"""

from __future__ import annotations

from typing import Any

import torch

from varstream._checks import check_bool, check_int
from varstream.planner.plan import check_chunk, check_optimizer
from varstream.streaming.backbone import State, backbone_forward, layer_forward, norm_forward
from varstream.streaming.forward import Forward
from varstream.streaming.head import check_logits, model_forward
from varstream.streaming.probe import check_attention
from varstream.streaming.structure import STATE, Parts, check_supported, find_parts


def stream(
    model: Any,
    chunk_size: int | str = "auto",
    head_chunk_size: int | str = "auto",
    offload: bool = False,
    memory_budget: int | None = None,
    *,
    optimizer: str = "adamw",
    compile: bool | str = False,
) -> Any:
    """Make a Hugging Face causal language model stream its backward, in place.

    Training then keeps one input per layer and one chunk's activations, never the logits; padded
    batches are packed inside, packed rows are taken as they are, and losses and gradients stay
    those of the dense model. Use it as before: ``loss = model(...).loss; loss.backward()``. With
    ``labels`` the output has no logits (they are never formed). The backbone alone
    (``model.model``) streams too. Dropout is drawn chunk by chunk and drawn again the same in the
    backward.

    Models are understood by their structure: a backbone of embeddings, layers and a norm, whose
    layers mix rows in one causal attention that transformers' attention registry serves and act
    row by row elsewhere (linear, LoRA, norms, activations, experts and their routers), and a head
    whose logits are scaled or softcapped at most. Each layer's own forward runs, on chunks.

    A padding position predicts nothing and is predicted by nothing, and a document's last token
    predicts nothing: the loss is that of the documents run one by one. (transformers' own loss on a
    padded batch differs where labels say so: with left padding it trains the first token from a
    padding row unless that label is -100.)

    Args:
        model: a causal language model of transformers, such as ``LlamaForCausalLM``, or PEFT's
            wrapper of one with LoRA adapters.
        chunk_size: rows of a layer chunk, or ``"auto"``, planned for each call from its real
            tokens: on the CPU 1024, up to 4096 where more rows cost little memory; on CUDA 4096.
            One chosen below the roofline knee is warned of once.
        head_chunk_size: rows of a chunk of logits, or ``"auto"``.
        offload: keeping layer inputs in host memory; must be False. On the CPU they are there
            already, on a GPU it is not available in this version.
        memory_budget: bytes that the whole job may take, as in ``vs.plan_memory``: weights,
            gradients, optimizer states and the step. Chunks left ``"auto"`` are then made as small
            as each call's tokens need. A backbone called alone is planned without the head. On a
            GPU the plan is a model that has not been measured yet.
        optimizer: whose states the budget counts: ``"adamw"``, ``"sgd"`` (no momentum), ``"none"``.
        compile: run the layers' forwards on chunks through ``torch.compile``, in graphs before and
            after the attention; True for the backend ``"inductor"``, or the name of another. What a
            chunk keeps for its backward is the compiler's choice then, and the planner knows
            nothing of it.

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: a ValueError naming the part of the model that isn't understood;
            nothing was changed.
        TypeError, ValueError: an argument breaks its contract. A call whose predicted peak passes
            ``memory_budget`` with the smallest chunks raises a ValueError before it computes
            anything.

    Source: StreamBP (arXiv 2506.03077) over packed rows, with K and V formed once a pass.
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
    state = State(chunk_size, head_chunk_size, memory_budget, optimizer, _compiler(compile))
    if _is_streamed(model):
        unstream(model)
    parts = check_supported(model)
    check_attention(parts)
    check_logits(parts)
    for module in dict.fromkeys(parts.streamed):  # a layer may be there twice
        setattr(module, STATE, state)
        module.forward = Forward(module, _run(parts, module))
    return model


def unstream(model: Any) -> Any:
    """Undo ``stream``: give the model its own forwards back. Returns the same model.

    Raises:
        ValueError: the model is not streamed.
    """
    if not _is_streamed(model):
        raise ValueError(f"{type(model).__name__} is not a streamed causal language model")
    modules = [m for m in find_parts(model).model.modules() if STATE in m.__dict__]
    for module in modules:
        if not isinstance(module.forward, Forward):
            raise ValueError(
                f"{type(module).__name__}.forward was replaced after vs.stream; undo that first"
            )
    for module in modules:
        del module.__dict__[STATE]
        forward: Any = module.forward
        forward.remove()
    return model


def _is_streamed(model: Any) -> bool:
    wrapped = model.get_base_model() if hasattr(model, "get_base_model") else model
    return STATE in getattr(wrapped, "__dict__", {}) and hasattr(wrapped, "base_model_prefix")


def _compiler(wanted: bool | str) -> str | None:
    """The backend of torch.compile."""
    if isinstance(wanted, bool):
        return "inductor" if wanted else None
    known = torch.compiler.list_backends(exclude_tags=())
    if wanted not in known:
        raise ValueError(f"compile must be a bool or one of {', '.join(known)}, got {wanted!r}")
    return wanted


def _run(parts: Parts, module: Any) -> Any:
    if module is parts.model:
        return model_forward
    if module is parts.backbone:
        return backbone_forward
    return norm_forward if module is parts.norm else layer_forward
