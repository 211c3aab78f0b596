"""DeBERTa-v2 and v3: the BERT shape with disentangled attention, where content meets position both
ways."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from varstream.encoder.buckets import deberta_buckets
from varstream.encoder.checks import Reader, check_head_dim
from varstream.encoder.layer import Rows
from varstream.encoder.postnorm import BERT_PARTS, Attention, PostNormFamily
from varstream.streaming import UnsupportedModelError

DEBERTA_PARTS = BERT_PARTS | {
    "query": "attention.self.query_proj",
    "key": "attention.self.key_proj",
    "value": "attention.self.value_proj",
}


@dataclass(frozen=True)
class DisentangledAttention:
    """Scores ``q_i.k_j + q_i.K[r] + k_j.Q[r]``, each over ``scale``, where r is the bucket of the
    distance and K, Q are projections of one table of relative positions.

    ``Rows.shared`` holds buckets (2 M - 1,) and that table (R, d).
    """

    plain: Attention
    position_dropout: nn.Dropout
    position_key: nn.Linear | None  # None: no content-to-position term
    position_query: nn.Linear | None  # None: no position-to-content term

    def attend(self, x: Tensor, rows: Rows) -> Tensor:
        buckets, positions = rows.shared
        plain, positions = self.plain, self.position_dropout(positions)
        key_table, query_table = (
            None
            if linear is None
            else linear(positions).unflatten(-1, (plain.heads, -1)) * plain.scaling
            for linear in (self.position_key, self.position_query)
        )
        return rows.attend_relative(
            *plain.project(x),
            buckets,
            plain.scaling,
            plain.dropout,
            key_table=key_table,
            query_table=query_table,
        )


class DebertaFamily(PostNormFamily):
    def read_attention(self, reader: Reader) -> Attention | DisentangledAttention:
        path = self.parts["attention"]
        module = reader.module(path)
        terms, size = _terms(module), getattr(module, "attention_head_size", 1)
        # transformers takes this root in float32 whatever the model's dtype.
        root = float(np.sqrt(np.float32(size * (1 + len(terms)))))
        plain = self.read_projections(reader, 1.0 / root)
        if not getattr(module, "relative_attention", False):
            return plain
        check_head_dim(f"{reader.name}.{path}", size)
        key, query = None, None
        if module.share_att_key:
            key, query = plain.key, plain.query
        if "c2p" in terms and key is None:
            key = reader.linear(f"{path}.pos_key_proj")
        if "p2c" in terms and query is None:
            query = reader.linear(f"{path}.pos_query_proj")
        return DisentangledAttention(
            plain,
            reader.part(f"{path}.pos_dropout", nn.Dropout),
            key if "c2p" in terms else None,
            query if "p2c" in terms else None,
        )

    def check(self, backbone: Any) -> None:
        if backbone.z_steps > 1:
            raise UnsupportedModelError(
                f"z_steps is {backbone.z_steps}; vs.padding_free runs the last layer once"
            )
        if getattr(backbone.encoder, "conv", None) is not None:
            raise UnsupportedModelError(
                "encoder.conv is a part that vs.padding_free doesn't understand "
                f"(config.conv_kernel_size is {backbone.config.conv_kernel_size})"
            )
        super().check(backbone)

    def share(self, backbone: Any, x: Tensor, positions: Tensor, rows: Rows) -> tuple[Tensor, ...]:
        """Bucket of each distance (2 M - 1,) and the table of relative positions (R, d)."""
        encoder = backbone.encoder
        if not encoder.relative_attention:
            return ()
        span = encoder.max_relative_positions
        if encoder.position_buckets > 0:
            span = encoder.position_buckets
        buckets = deberta_buckets(
            rows.max_seqlen, encoder.position_buckets, encoder.max_relative_positions, x.device
        )
        return buckets, encoder.get_rel_embedding()[: 2 * span]


def _terms(module: Any) -> list[str]:
    """Which of the two terms there are: content-to-position, position-to-content."""
    return [term for term in ("c2p", "p2c") if term in getattr(module, "pos_att_type", ())]


DEBERTA = DebertaFamily(
    "deberta_v2",
    "DebertaV2",
    "BaseModelOutput",
    children=("embeddings", "encoder"),
    by_distance=True,
    reads_padding=False,  # there it averages all columns of the batch
    parts=DEBERTA_PARTS,
)
