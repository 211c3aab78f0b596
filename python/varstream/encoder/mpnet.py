"""MPNet: the BERT shape with a bias by distance on scores, from one table for all layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from varstream.encoder.buckets import mpnet_buckets
from varstream.encoder.checks import Reader, check_hooks
from varstream.encoder.layer import Rows
from varstream.encoder.postnorm import BERT_PARTS, Attention, PostNormFamily
from varstream.streaming import UnsupportedModelError

MPNET_PARTS = BERT_PARTS | {
    "attention": "attention.attn",
    "query": "attention.attn.q",
    "key": "attention.attn.k",
    "value": "attention.attn.v",
    "attention_dropout": "attention.attn.dropout",
    "out": "attention.attn.o",
    "out_dropout": "attention.dropout",
    "out_norm": "attention.LayerNorm",
}
_BUCKETS = 32  # of distances, whatever the configuration says


@dataclass(frozen=True)
class BiasedAttention:
    """A score gets the bias of its distance and head; ``Rows.shared`` holds buckets and table."""

    plain: Attention

    def attend(self, x: Tensor, rows: Rows) -> Tensor:
        buckets, table = rows.shared
        plain = self.plain
        return rows.attend_relative(
            *plain.project(x), buckets, plain.scaling, plain.dropout, table=table
        )


class MPNetFamily(PostNormFamily):
    def read_attention(self, reader: Reader) -> BiasedAttention:
        module = reader.module(self.parts["attention"])
        size = getattr(module, "attention_head_size", 1)
        return BiasedAttention(self.read_projections(reader, size**-0.5))

    def check_bypassed(self, backbone: nn.Module) -> None:
        super().check_bypassed(backbone)
        name = "encoder.relative_attention_bias"
        table = backbone.get_submodule(name)
        if type(table) is not nn.Embedding or table.num_embeddings < _BUCKETS:
            raise UnsupportedModelError(f"{name} is not a plain nn.Embedding of {_BUCKETS} rows")
        check_hooks(name, table)

    def positions(
        self, backbone: Any, input_ids: Tensor | None, inputs_embeds: Tensor | None
    ) -> Tensor:
        from transformers.models.mpnet import modeling_mpnet

        embeddings = backbone.embeddings
        if input_ids is None:
            return embeddings.create_position_ids_from_inputs_embeds(inputs_embeds)
        return modeling_mpnet.create_position_ids_from_input_ids(input_ids, embeddings.padding_idx)

    def share(self, backbone: Any, x: Tensor, positions: Tensor, rows: Rows) -> tuple[Tensor, ...]:
        """Bucket of each distance (2 M - 1,) and table (R, H)."""
        buckets = mpnet_buckets(rows.max_seqlen, _BUCKETS, device=x.device)
        return buckets, backbone.encoder.relative_attention_bias.weight


MPNET = MPNetFamily(
    "mpnet", "MPNet", "BaseModelOutputWithPooling", by_distance=True, parts=MPNET_PARTS
)
