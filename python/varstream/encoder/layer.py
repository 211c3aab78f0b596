"""One post-norm encoder layer over packed rows, whatever names its parts have in a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from varstream.ops.attention import varlen_attention
from varstream.ops.bias_residual_layer_norm import bias_residual_layer_norm
from varstream.ops.linear_bias_gelu import linear_bias_gelu


@dataclass(frozen=True)
class Rows:
    """Where the sequences of a packed batch are."""

    cu_seqlens: Tensor  # (B+1,) int32
    max_seqlen: int


@dataclass(frozen=True)
class LayerParts:
    """What a layer of the BERT shape is made of:

    ``x = norm(x + dropout(out(attention(query x, key x, value x))))`` and then
    ``x = norm(x + dropout(ffn_out(activation(ffn_in x))))``.
    """

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    heads: int
    scaling: float
    attention_dropout: float  # 0 outside training
    out: nn.Linear
    out_dropout: nn.Dropout | None
    out_norm: nn.LayerNorm
    ffn_in: nn.Linear
    activation: Callable[[Tensor], Tensor]
    gelu: str | None  # the activation as linear_bias_gelu's ``approximate``; None: another one
    ffn_out: nn.Linear
    ffn_dropout: nn.Dropout | None
    ffn_norm: nn.LayerNorm

    def run(self, x: Tensor, rows: Rows) -> Tensor:
        """Packed rows x (total, d) to the layer's output (total, d)."""
        q, k, v = (
            linear(x).unflatten(-1, (self.heads, -1))
            for linear in (self.query, self.key, self.value)
        )
        attended = varlen_attention(
            q,
            k,
            v,
            rows.cu_seqlens,
            max_seqlen_q=rows.max_seqlen,
            softmax_scale=self.scaling,
            dropout_p=self.attention_dropout,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        assert isinstance(attended, Tensor)
        x = _close(attended.flatten(1), self.out, self.out_dropout, x, self.out_norm)
        return _close(self._expand(x), self.ffn_out, self.ffn_dropout, x, self.ffn_norm)

    def _expand(self, x: Tensor) -> Tensor:
        """The first half of the feed-forward block, (total, d) to (total, f)."""
        if self.gelu is None:
            return self.activation(self.ffn_in(x))
        return linear_bias_gelu(x, self.ffn_in.weight, self.ffn_in.bias, self.gelu)


def _close(
    h: Tensor, linear: nn.Linear, dropout: nn.Dropout | None, residual: Tensor, norm: nn.LayerNorm
) -> Tensor:
    """``norm(dropout(linear(h)) + residual)``, with the bias inside the norm unless dropout stands
    between them."""
    if dropout is not None and dropout.training and dropout.p > 0.0:
        x, bias = dropout(linear(h)), None
    else:
        x, bias = torch.nn.functional.linear(h, linear.weight), linear.bias
    return bias_residual_layer_norm(x, bias, residual, norm.weight, norm.bias, norm.eps)
