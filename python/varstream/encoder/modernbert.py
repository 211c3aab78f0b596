"""ModernBERT: normalised before each block, rotated queries and keys, windows on most layers, a
gated feed-forward block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from varstream.encoder.checks import Reader, check_head_dim
from varstream.encoder.family import Family
from varstream.encoder.layer import Rows
from varstream.streaming import UnsupportedModelError

# Their frequencies follow the number of columns, which packed rows don't have.
_ROPE_BY_LENGTH = ("dynamic", "longrope")


@dataclass(frozen=True)
class ModernBertLayer:
    """``x = x + dropout(out(attention(norm x)))`` and then
    ``x = x + ffn_out(dropout(activation(a) * b))`` where a, b = the halves of ``ffn_in(norm x)``.
    """

    norm: Callable[[Tensor], Tensor]
    qkv: nn.Linear
    head_dim: int
    dropout: float  # of attention; 0 outside training
    window: int  # tokens seen to either side, -1 for all
    rotation: int  # where this layer's cosines and sines are in Rows.shared
    rotate: Callable[..., tuple[Tensor, Tensor]]
    out: nn.Linear
    out_dropout: Callable[[Tensor], Tensor]
    ffn_norm: Callable[[Tensor], Tensor]
    ffn_in: nn.Linear
    activation: Callable[[Tensor], Tensor]
    ffn_dropout: nn.Dropout
    ffn_out: nn.Linear

    def run(self, x: Tensor, rows: Rows) -> Tensor:
        """Packed rows x (total, d) to the layer's output (total, d)."""
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, -1, self.head_dim)).unbind(1)
        cos, sin = rows.shared[self.rotation : self.rotation + 2]  # (total, D)
        q, k = self.rotate(q, k, cos, sin)
        window = (self.window, self.window)
        attended = rows.attend(q, k, v, self.head_dim**-0.5, self.dropout, window)
        x = x + self.out_dropout(self.out(attended))
        gated, gate = self.ffn_in(self.ffn_norm(x)).chunk(2, dim=-1)
        return x + self.ffn_out(self.ffn_dropout(self.activation(gated) * gate))


class ModernBertFamily(Family):
    def read(self, name: str, layer: Any) -> ModernBertLayer:
        from transformers.models.modernbert.modeling_modernbert import apply_rotary_pos_emb

        reader = Reader(name, layer, self.kind)
        attention = reader.module("attn")
        check_head_dim(f"{name}.attn", attention.head_dim)
        kind = layer.attention_type
        found = ModernBertLayer(
            norm=reader.part("attn_norm", nn.LayerNorm, nn.Identity),
            qkv=reader.linear("attn.Wqkv"),
            head_dim=attention.head_dim,
            dropout=attention.attention_dropout if attention.training else 0.0,
            window=layer.config.sliding_window if kind == "sliding_attention" else -1,
            rotation=2 * _layer_types(layer.config).index(kind),
            rotate=apply_rotary_pos_emb,
            out=reader.linear("attn.Wo"),
            out_dropout=reader.part("attn.out_drop", nn.Dropout, nn.Identity),
            ffn_norm=reader.norm("mlp_norm"),
            ffn_in=reader.linear("mlp.Wi"),
            activation=reader.activation("mlp.act"),
            ffn_dropout=reader.part("mlp.drop", nn.Dropout),
            ffn_out=reader.linear("mlp.Wo"),
        )
        reader.close()
        return found

    def bypassed(self, backbone: nn.Module) -> dict[str, nn.Module]:
        return {}  # the model itself runs its layers

    def check(self, backbone: Any) -> None:
        super().check(backbone)
        for layer_type in _layer_types(backbone.config):
            rope = backbone.rotary_emb.rope_type.get(layer_type)
            if rope in _ROPE_BY_LENGTH:
                raise UnsupportedModelError(
                    f"rotary embeddings of type {rope!r} follow the padded length; "
                    "vs.padding_free understands those of a fixed length"
                )

    def embed(self, backbone: Any, columns: dict[str, Tensor]) -> Tensor:
        return super().embed(backbone, {n: c for n, c in columns.items() if n != "position_ids"})

    def share(self, backbone: Any, x: Tensor, positions: Tensor, rows: Rows) -> tuple[Tensor, ...]:
        """Cosines and sines (total, D) of each type of layer."""
        return tuple(
            part[0]
            for layer_type in _layer_types(backbone.config)
            for part in backbone.rotary_emb(x[None], positions[None], layer_type)
        )

    def finish(self, backbone: Any, x: Tensor) -> Tensor:
        return backbone.final_norm(x)


def _layer_types(config: Any) -> list[str]:
    return sorted(set(config.layer_types))


MODERNBERT = ModernBertFamily(
    "modernbert",
    "ModernBert",
    "BaseModelOutput",
    layer_list="layers",
    children=("embeddings", "layers", "final_norm", "rotary_emb"),
    by_distance=True,
    reads_padding=False,  # its window may hold no token
)
