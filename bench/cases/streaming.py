"""``vs.stream`` on a padded batch and ``vs.stream_layer``, against gradient checkpointing with the
same loss; ``streaming_models`` has the steps over long rows."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import varstream as vs

from .. import peers
from ..case import Case, Peer, Setup, Shape
from . import streaming_models

TOLERANCE = 1e-4  # float32 gradients of two float32 computations
LLAMA = {
    **{"width": 512, "inner": 1376, "layers": 4, "heads": 8, "classes": 16000},
    **{"batch": 8, "seqlen": 1024},
}
TINY_LLAMA = {
    **{"width": 32, "inner": 48, "layers": 2, "heads": 2, "classes": 97},
    **{"batch": 3, "seqlen": 23},
}


def _llama(shape: Shape, seed: int) -> Any:
    """A Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=shape["classes"],
        hidden_size=shape["width"],
        intermediate_size=shape["inner"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["heads"],
        max_position_embeddings=shape["seqlen"],
    )
    return LlamaForCausalLM(config).train()


def _gradients(model: Any) -> list[Tensor]:
    """The gradients, taken off the model."""
    grads = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    return grads


def _build_model(shape: Shape, device: torch.device, seed: int) -> Setup:
    """``batch`` documents of up to ``seqlen`` tokens, right-padded."""
    dense = _llama(shape, seed).to(device)
    streamed = vs.stream(copy.deepcopy(dense), chunk_size="auto")
    dense.gradient_checkpointing_enable()
    batch, seqlen = shape["batch"], shape["seqlen"]
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(shape["classes"], (batch, seqlen), generator=draw).to(device)
    shortest = max(2, seqlen // 5)
    lengths = torch.randint(shortest, seqlen + 1, (batch,), generator=draw)
    real = (torch.arange(seqlen) < lengths[:, None]).to(device)
    mask = {"attention_mask": real.long()}
    labels = ids.masked_fill(~real, -100)

    def checkpointing() -> list[Tensor]:
        """Hugging Face's layers checkpointed, our chunked head."""
        hidden = dense.model(ids, use_cache=False, **mask).last_hidden_state
        rows, targets = hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        vs.linear_cross_entropy(rows, dense.lm_head.weight, targets).backward()
        return _gradients(dense)

    def streaming() -> list[Tensor]:
        streamed(ids, labels=labels, **mask).loss.backward()
        return _gradients(streamed)

    return Setup(
        runs={"varstream": streaming, "checkpointing": checkpointing},
        figures=lambda peaks, ours: {"fill": real.sum().item() / real.numel()},
    )


class _Layer:
    """A decoder layer's formulas: attention without positions, then a GELU block."""

    def __init__(self, width: int, heads: int, device: torch.device, draw: Any) -> None:
        self.heads, self.width = heads, width

        def normal(rows: int, columns: int) -> Tensor:
            w = torch.randn(rows, columns, generator=draw) * columns**-0.5
            return w.to(device).requires_grad_()

        self.w_kv, self.w_q, self.w_o = (normal(n * width, width) for n in (2, 1, 1))
        self.up, self.down = normal(4 * width, width), normal(width, 4 * width)

    @property
    def parameters(self) -> list[Tensor]:
        return [self.w_kv, self.w_q, self.w_o, self.up, self.down]

    def kv(self, x: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        both = F.linear(F.layer_norm(x, (self.width,)), self.w_kv)
        k, v = both.unflatten(1, (2, self.heads, -1)).unbind(1)
        return k, v

    def rest(self, x: Tensor, pos: Tensor, attend: Any) -> Tensor:
        q = F.linear(F.layer_norm(x, (self.width,)), self.w_q).unflatten(1, (self.heads, -1))
        x = x + F.linear(attend(q).flatten(1), self.w_o)
        inner = F.gelu(F.linear(F.layer_norm(x, (self.width,)), self.up))
        return x + F.linear(inner, self.down)

    def whole(self, x: Tensor, cu: Tensor, longest: int) -> Tensor:
        """All rows at once."""
        pos = torch.arange(x.shape[0], device=x.device)
        k, v = self.kv(x, pos)
        maxima = {"max_seqlen_q": longest, "max_seqlen_k": longest}
        return self.rest(x, pos, lambda q: vs.varlen_attention(q, k, v, cu, causal=True, **maxima))


def _build_layer(shape: Shape, device: torch.device, seed: int) -> Setup:
    """``documents`` documents of equal length, packed."""
    draw = torch.Generator().manual_seed(seed)
    layer = _Layer(shape["width"], shape["heads"], device, draw)
    length, count = shape["seqlen"], shape["documents"]
    cu = (torch.arange(count + 1) * length).to(device, torch.int32)
    x = torch.randn(count * length, shape["width"], generator=draw).to(device).requires_grad_()
    dy = torch.randn(x.shape, generator=draw).to(device)
    leaves = [x, *layer.parameters]

    def streamed() -> Tensor:
        return vs.stream_layer(layer.kv, layer.rest, x, cu, params=layer.parameters)

    def checkpointed() -> Any:
        return checkpoint(layer.whole, x, cu, length, use_reentrant=False)

    def run(forward: Any) -> list[Tensor]:
        y = forward()
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    return Setup(
        runs={
            "varstream": partial(run, streamed),
            "checkpointing": partial(run, checkpointed),
            "plain": partial(run, lambda: layer.whole(x, cu, length)),
        },
    )


CASES = (
    *streaming_models.CASES,
    Case(
        "stream/padded_batch",
        "stream",
        LLAMA,
        _build_model,
        TINY_LLAMA,
        peers=(Peer("checkpointing"),),
        reference="checkpointing",
        tolerance=TOLERANCE,
        needs=peers.transformers,
        note="one training step of a Llama, a right-padded batch of ragged documents; the peer has "
        "the same chunked loss",
    ),
    Case(
        "stream_layer/packed",
        "stream_layer",
        {"width": 512, "heads": 8, "seqlen": 2048, "documents": 4},
        _build_layer,
        {"width": 16, "heads": 2, "seqlen": 13, "documents": 3},
        peers=(Peer("checkpointing"), Peer("plain")),
        reference="plain",
        tolerance=TOLERANCE,
        note="forward and backward of one layer of own formulas over packed documents",
    ),
)
