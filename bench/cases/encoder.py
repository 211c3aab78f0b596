"""The padding-free encoder: its two fused operators, and a training step of a BERT over a padded
batch."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import varstream as vs

from .. import floors, peers
from ..case import Case, Peer, Setup, Shape, floor

EPS = 1e-12
BERT = {"width": 256, "inner": 1024, "layers": 4, "heads": 4, "classes": 8000}


def _build_norm(shape: Shape, device: torch.device, seed: int) -> Setup:
    draw = torch.Generator().manual_seed(seed)
    size = (shape["rows"], shape["width"])

    def normal(*of: int) -> Tensor:
        return torch.randn(*of, generator=draw).to(device)

    x, residual, dy = normal(*size), normal(*size), normal(*size)
    bias, weight, shift = (normal(size[1]) for _ in range(3))
    leaves = [t.requires_grad_() for t in (x, bias, residual, weight, shift)]

    def fused(x: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, shift: Tensor) -> Any:
        return vs.ops.bias_residual_layer_norm(x, bias, residual, weight, shift, EPS)

    def plain(x: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, shift: Tensor) -> Tensor:
        return F.layer_norm(x + bias + residual, size[1:], weight, shift, EPS)

    return Setup(
        runs={
            **_differentiated({"varstream": fused, "layer_norm": plain}, leaves, dy),
            # Forward: x and residual read, y written; backward: both and dy read, dx written.
            "copy_floor": floors.copy(7 * x.nbytes, device),
        },
        operand_bytes=3 * x.nbytes,
    )


def _build_gelu(shape: Shape, device: torch.device, seed: int) -> Setup:
    draw = torch.Generator().manual_seed(seed)
    rows, width, inner = shape["rows"], shape["width"], shape["inner"]

    def normal(*of: int) -> Tensor:
        return torch.randn(*of, generator=draw).to(device)

    x, bias, dy = normal(rows, width), normal(inner), normal(rows, inner)
    weight = normal(inner, width) * width**-0.5
    leaves = [t.requires_grad_() for t in (x, weight, bias)]

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(F.linear(x, weight, bias))

    return Setup(
        runs={
            **_differentiated(
                {"varstream": vs.ops.linear_bias_gelu, "linear_gelu": plain}, leaves, dy
            ),
            "gemm_floor": floors.head_products(x, weight, "zxw"),
        },
        operand_bytes=x.nbytes + weight.nbytes + dy.nbytes,
    )


def _differentiated(forwards: dict[str, Any], leaves: list[Tensor], dy: Tensor) -> dict[str, Any]:
    """Runs of forward and backward, and the first peer's in float64 as the reference."""

    def run(forward: Any, given: list[Tensor], upstream: Tensor) -> list[Tensor]:
        y = forward(*given)
        return [y.detach(), *torch.autograd.grad(y, given, upstream)]

    wide = [t.detach().double().requires_grad_() for t in leaves]
    plain = next(forward for name, forward in forwards.items() if name != "varstream")
    runs = {name: partial(run, forward, leaves, dy) for name, forward in forwards.items()}
    return {**runs, "float64": partial(run, plain, wide, dy.double())}


def _build_model(shape: Shape, device: torch.device, seed: int) -> Setup:
    """A padded batch whose rows are right-padded; a loss over all real positions."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=shape["classes"],
        hidden_size=shape["width"],
        intermediate_size=shape["inner"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        max_position_embeddings=shape["seqlen"],
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    padded = BertModel(config, add_pooling_layer=False).to(device).train()
    packed = vs.padding_free(copy.deepcopy(padded))
    batch, seqlen = shape["batch"], shape["seqlen"]
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(shape["classes"], (batch, seqlen), generator=draw).to(device)
    lengths = torch.randint(max(1, seqlen // 5), seqlen + 1, (batch,), generator=draw)
    real = (torch.arange(seqlen) < lengths[:, None]).to(device)
    upstream = torch.randn(batch, seqlen, shape["width"], generator=draw).to(device)
    upstream = upstream * real[..., None]

    def step(model: Any) -> list[Tensor]:
        hidden = model(ids, attention_mask=real.long()).last_hidden_state
        hidden.backward(upstream)
        grads = [p.grad for p in model.parameters()]
        model.zero_grad(set_to_none=True)
        return [hidden.detach(), *grads]

    def compared(found: list[Tensor]) -> list[Tensor]:
        """Real positions, and the gradients as one vector: a key bias shifts all scores of a row,
        so its gradient alone is nothing but rounding."""
        hidden, *grads = found
        return [hidden[real], torch.cat([g.flatten() for g in grads])]

    return Setup(
        runs={"varstream": partial(step, packed), "padded": partial(step, padded)},
        results={"varstream": compared, "padded": compared},
        figures=lambda peaks, ours: {"fill": real.sum().item() / real.numel()},
    )


CASES = (
    Case(
        "encoder/bias_residual_layer_norm",
        "ops.bias_residual_layer_norm",
        {"rows": 8192, "width": 768},
        _build_norm,
        {"rows": 37, "width": 24},
        peers=(Peer("layer_norm"), floor("copy_floor")),
        needs=peers.attribute("varstream.ops", "bias_residual_layer_norm"),
        note="forward and backward; floor: a copy of the bytes that must move",
    ),
    Case(
        "encoder/linear_bias_gelu",
        "ops.linear_bias_gelu",
        {"rows": 4096, "width": 768, "inner": 3072},
        _build_gelu,
        {"rows": 37, "width": 24, "inner": 40},
        peers=(Peer("linear_gelu"), floor("gemm_floor")),
        needs=peers.attribute("varstream.ops", "linear_bias_gelu"),
        note="forward and backward; floor: the 3 matrix products",
    ),
    Case(
        "encoder/bert_step",
        "padding_free",
        {**BERT, "batch": 16, "seqlen": 256},
        _build_model,
        {
            "width": 16,
            "inner": 24,
            "layers": 2,
            "heads": 2,
            "classes": 31,
            "batch": 3,
            "seqlen": 11,
        },
        peers=(Peer("padded"),),
        reference="padded",
        tolerance=1e-4,
        needs=peers.every(peers.transformers, peers.attribute("varstream", "padding_free")),
        note="forward and backward of a BERT over a right-padded batch",
    ),
)
