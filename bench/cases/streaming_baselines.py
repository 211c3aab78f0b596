"""Language models over one packed row, streamed and as they are trained without streaming.

A way takes a ``Row`` and returns the loss and the gradients of all trained parameters. The models
of all ways hold the same parameter tensors, so that a real size fits on one GPU.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

import varstream as vs

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Way = Callable[["Row"], list[Tensor]]


@dataclass(frozen=True)
class Row:
    """Documents one after the other in a row of n tokens.

    Attributes:
        ids, labels, positions: (1, n) int64; positions restart at each document, whose first
            token no other predicts.
        cu_seqlens: (B+1,) int32.
        longest: tokens of the longest document.
    """

    ids: Tensor
    labels: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    longest: int

    @classmethod
    def draw(cls, lengths: Sequence[int], classes: int, device: torch.device, seed: int) -> Row:
        draw = torch.Generator().manual_seed(seed)
        ids = torch.randint(classes, (1, sum(lengths)), generator=draw)
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        labels = ids.masked_fill(positions == 0, -100)
        columns = [t.to(device) for t in (ids, labels, positions)]
        return cls(*columns, vs.cu_seqlens(list(lengths), device), max(lengths))

    @property
    def documents(self) -> dict[str, Tensor]:
        """What tells a model of several documents; nothing for one."""
        return {"position_ids": self.positions} if len(self.cu_seqlens) > 2 else {}


# --- models ---------------------------------------------------------------------------------------


def language_model(config: Any, dtype: torch.dtype, device: torch.device, seed: int) -> Any:
    """A causal language model with random weights, made on its device."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype).train()


def with_adapters(model: Any, rank: int, seed: int) -> Any:
    """PEFT's LoRA modules on every projection; both factors random, as a zero one would leave the
    other without a gradient."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=list(PROJECTIONS),
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    with _old_names():
        return get_peft_model(model, config, autocast_adapter_dtype=False)


@contextmanager
def _old_names() -> Iterator[None]:
    """Without transformers' warnings of names whose successors older versions don't know."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def sharing(model: nn.Module) -> Any:
    """The model's modules again, around the same tensors."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(t): t for t in tensors})


def _inner(model: Any) -> Any:
    """The causal language model inside PEFT's wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _step(model: Any, loss_of: Callable[[Any, Row], Tensor], row: Row) -> list[Tensor]:
    """The loss and its gradients, taken off the model."""
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        loss = loss_of(model, row)
        loss.backward()
        return [loss.detach(), *(p.grad for p in trained)]  # type: ignore[misc]
    finally:  # a run out of memory leaves nothing for the next one, which has the same parameters
        for p in trained:
            p.grad = None


# --- the ways -------------------------------------------------------------------------------------


def streamed(model: Any, chunk: int, head_chunk: int) -> Way:
    """Ours."""
    model = vs.stream(sharing(model), chunk_size=chunk, head_chunk_size=head_chunk)
    return partial(_step, model, _own_loss)


def checkpointing(model: Any, packed: bool) -> Way:
    """transformers as it is: layers checkpointed, all logits, its own loss. One document runs
    through SDPA; on several its mask of all pairs would be the peak, so they get varlen attention.
    """
    model = _checkpointed(sharing(model))
    model.set_attn_implementation(varlen(next(model.parameters()).device) if packed else "sdpa")
    return partial(_step, model, _own_loss)


def tiled(model: Any, tile: int, head_chunk: int, offload: bool = False) -> Way:
    """The strongest without streaming: layers checkpointed, varlen attention, the MLP in tiles of
    rows, our chunked loss; with ``offload`` the layers' inputs are kept in host memory."""
    model = _checkpointed(sharing(model))
    device = next(model.parameters()).device
    model.set_attn_implementation(varlen(device))
    for layer in _inner(model).model.layers:
        layer.mlp.forward = partial(_tiled_mlp, layer.mlp, tile)
    return partial(_step, model, partial(_chunked_loss, head_chunk, offload))


def _checkpointed(model: Any) -> Any:
    with _old_names():
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _own_loss(model: Any, row: Row) -> Tensor:
    return model(row.ids, labels=row.labels, use_cache=False, **row.documents).loss


def _chunked_loss(head_chunk: int, offload: bool, model: Any, row: Row) -> Tensor:
    inner = _inner(model)
    lengths = {
        **{f"cu_seq_lens_{side}": row.cu_seqlens for side in "qk"},
        **{f"max_length_{side}": row.longest for side in "qk"},
    }
    kept: Any = nullcontext()
    if offload:
        kept = torch.autograd.graph.save_on_cpu(pin_memory=row.ids.is_cuda)
    with kept:
        output = inner.model(row.ids, position_ids=row.positions, use_cache=False, **lengths)
    hidden = output.last_hidden_state[0]  # (n, d)
    targets = torch.cat([row.labels[0, 1:], row.labels.new_full((1,), -100)])
    return vs.linear_cross_entropy(hidden, inner.lm_head.weight, targets, chunk_size=head_chunk)


# --- parts of them --------------------------------------------------------------------------------


def _tiled_mlp(mlp: Any, tile: int, x: Tensor) -> Tensor:
    """The MLP's own forward on x (1, n, d), ``tile`` rows at a time."""
    params = [p for p in mlp.parameters() if p.requires_grad]
    return _Tiled.apply(partial(type(mlp).forward, mlp), tile, x, *params)


class _Tiled(torch.autograd.Function):
    """A function that acts row by row, in tiles of rows: keeps its input x (1, n, d), forms each
    tile again in the backward and sums the parameters' gradients in place."""

    @staticmethod
    def forward(ctx: Any, function: Any, tile: int, x: Tensor, *params: Tensor) -> Tensor:
        ctx.function, ctx.tile, ctx.params = function, tile, params
        ctx.save_for_backward(x)
        y = torch.empty_like(x)
        for rows, out in zip(x.split(tile, 1), y.split(tile, 1), strict=True):
            out.copy_(function(rows))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        dx, sums = torch.empty_like(x), [None] * len(ctx.params)
        parts = (t.split(ctx.tile, 1) for t in (x, dy, dx))
        for rows, dout, din in zip(*parts, strict=True):
            with torch.enable_grad():
                rows = rows.detach().requires_grad_()
                out = ctx.function(rows)
            found, *grads = torch.autograd.grad(out, [rows, *ctx.params], dout)
            din.copy_(found)
            del out, found
            sums = [g if s is None else s.add_(g) for s, g in zip(sums, grads, strict=True)]
        return None, None, dx, *sums


def varlen(device: torch.device) -> str:
    """The attention implementation over packed documents: torch's own varlen operator, which
    needs CUDA; on the CPU ours, as there is no other."""
    import varstream.integrations.transformers  # noqa: F401  # registers "varstream"

    return varlen_of_torch() if device.type == "cuda" else "varstream"


@cache
def varlen_of_torch() -> str:
    """The name that torch's operator is registered under."""
    from transformers import AttentionInterface, AttentionMaskInterface

    name = "bench_torch_varlen"
    AttentionInterface.register(name, _torch_varlen)
    AttentionMaskInterface.register(name, lambda *args, **kwargs: None)
    return name


def _torch_varlen(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float | None = None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """torch's varlen operator as an attention function: query (1, H, n, D), key and value (1, Hkv,
    n, D) to (1, n, H, D)."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (t[0].transpose(0, 1).contiguous() for t in (query, key, value))
    lengths = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
    out = varlen_attn(q, k, v, *lengths, scale=scaling, window_size=(-1, 0), enable_gqa=True)
    return out[None], None
