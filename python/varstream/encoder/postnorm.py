"""Layers of the BERT shape, which normalise after each block, and the families made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from varstream.encoder.checks import Reader, check_head_dim
from varstream.encoder.family import Family
from varstream.encoder.layer import Rows, SelfAttention
from varstream.ops.bias_residual_layer_norm import bias_residual_layer_norm
from varstream.ops.linear_bias_gelu import linear_bias_gelu

_GELU = {
    "GELUActivation": "none",
    "NewGELUActivation": "tanh",
    "GELUTanh": "tanh",
    "PytorchGELUTanh": "tanh",
}


@dataclass(frozen=True)
class Attention:
    """Scaled products of queries and keys, nothing else."""

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    heads: int
    scaling: float
    dropout: float  # 0 outside training

    def attend(self, x: Tensor, rows: Rows) -> Tensor:
        """Packed rows x (total, d) to (total, H * Dv)."""
        return rows.attend(*self.project(x), self.scaling, self.dropout)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v of rows x (total, d), each (total, H, D)."""
        q, k, v = (
            linear(x).unflatten(-1, (self.heads, -1))
            for linear in (self.query, self.key, self.value)
        )
        return q, k, v


@dataclass(frozen=True)
class PostNormLayer:
    """``x = norm(x + dropout(out(attention(x))))`` and then
    ``x = norm(x + dropout(ffn_out(activation(ffn_in x))))``.
    """

    attention: SelfAttention
    out: nn.Linear
    out_dropout: nn.Dropout | None
    out_norm: nn.LayerNorm
    ffn_in: nn.Linear
    activation: Callable[[Tensor], Tensor]
    ffn_out: nn.Linear
    ffn_dropout: nn.Dropout | None
    ffn_norm: nn.LayerNorm

    def run(self, x: Tensor, rows: Rows) -> Tensor:
        """Packed rows x (total, d) to the layer's output (total, d)."""
        attended = self.attention.attend(x, rows)
        x = _close(attended, self.out, self.out_dropout, x, self.out_norm)
        return _close(self._expand(x), self.ffn_out, self.ffn_dropout, x, self.ffn_norm)

    def _expand(self, x: Tensor) -> Tensor:
        """The first half of the feed-forward block, (total, d) to (total, f)."""
        gelu = _GELU.get(type(self.activation).__name__)
        if gelu is None:
            return self.activation(self.ffn_in(x))
        return linear_bias_gelu(x, self.ffn_in.weight, self.ffn_in.bias, gelu)


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


BERT_PARTS = {
    "attention": "attention.self",
    "heads": "num_attention_heads",
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_dropout": "attention.self.dropout",
    "out": "attention.output.dense",
    "out_dropout": "attention.output.dropout",
    "out_norm": "attention.output.LayerNorm",
    "ffn_in": "intermediate.dense",
    "activation": "intermediate.intermediate_act_fn",
    "ffn_out": "output.dense",
    "ffn_dropout": "output.dropout",
    "ffn_norm": "output.LayerNorm",
}
DISTILBERT_PARTS = {
    "attention": "attention",
    "heads": "n_heads",
    "query": "attention.q_lin",
    "key": "attention.k_lin",
    "value": "attention.v_lin",
    "attention_dropout": "attention.dropout",
    "out": "attention.out_lin",
    "out_norm": "sa_layer_norm",
    "ffn_in": "ffn.lin1",
    "activation": "ffn.activation",
    "ffn_out": "ffn.lin2",
    "ffn_dropout": "ffn.dropout",
    "ffn_norm": "output_layer_norm",
}
ALBERT_PARTS = {
    "attention": "attention",
    "heads": "num_attention_heads",
    "query": "attention.query",
    "key": "attention.key",
    "value": "attention.value",
    "attention_dropout": "attention.attention_dropout",
    "out": "attention.dense",
    "out_dropout": "attention.output_dropout",
    "out_norm": "attention.LayerNorm",
    "ffn_in": "ffn",
    "activation": "activation",
    "ffn_out": "ffn_output",
    "ffn_norm": "full_layer_layer_norm",
}


@dataclass(frozen=True)
class PostNormFamily(Family):
    """A family whose layers have the BERT shape.

    Attributes:
        parts: paths from a layer to its parts: those of ``PostNormLayer`` and ``Attention``;
            ``attention`` is the module that knows the number of heads, under the name ``heads``.
        project: path from the backbone to what brings embeddings to the layers' width, if anything.
    """

    parts: Mapping[str, str] = field(kw_only=True)
    project: str = ""

    def read(self, name: str, layer: nn.Module) -> PostNormLayer:
        reader, paths = Reader(name, layer, self.kind), self.parts
        found = PostNormLayer(
            attention=self.read_attention(reader),
            out=reader.linear(paths["out"]),
            out_dropout=reader.dropout(paths.get("out_dropout")),
            out_norm=reader.norm(paths["out_norm"]),
            ffn_in=reader.linear(paths["ffn_in"]),
            activation=reader.activation(paths["activation"]),
            ffn_out=reader.linear(paths["ffn_out"]),
            ffn_dropout=reader.dropout(paths.get("ffn_dropout")),
            ffn_norm=reader.norm(paths["ffn_norm"]),
        )
        self.read_unused(reader)
        reader.close()
        return found

    def read_attention(self, reader: Reader) -> SelfAttention:
        """The attention of one layer."""
        module = reader.module(self.parts["attention"])
        return self.read_projections(reader, getattr(module, "scaling", 1.0))

    def read_projections(self, reader: Reader, scaling: float) -> Attention:
        paths = self.parts
        module, query = reader.module(paths["attention"]), reader.linear(paths["query"])
        heads = getattr(module, paths["heads"], 1)
        check_head_dim(f"{reader.name}.{paths['attention']}", query.out_features // heads)
        dropout = reader.dropout(paths["attention_dropout"])
        training = dropout is not None and module.training
        return Attention(
            query=query,
            key=reader.linear(paths["key"]),
            value=reader.linear(paths["value"]),
            heads=heads,
            scaling=scaling,
            dropout=dropout.p if dropout is not None and training else 0.0,
        )

    def read_unused(self, reader: Reader) -> None:
        """Parts that the stock layer has and never calls."""

    def embed(self, backbone: Any, columns: dict[str, Tensor]) -> Tensor:
        x = super().embed(backbone, columns)
        owner, _, name = self.project.rpartition(".")
        mapping = getattr(backbone.get_submodule(owner), name, None) if name else None
        return x if mapping is None else mapping(x[None])[0]


class RobertaFamily(PostNormFamily):
    """Positions count the tokens that aren't the padding token."""

    def positions(
        self, backbone: Any, input_ids: Tensor | None, inputs_embeds: Tensor | None
    ) -> Tensor:
        embeddings = backbone.embeddings
        if input_ids is not None:
            return embeddings.create_position_ids_from_input_ids(input_ids, embeddings.padding_idx)
        return embeddings.create_position_ids_from_inputs_embeds(
            inputs_embeds, embeddings.padding_idx
        )


class AlbertFamily(PostNormFamily):
    """A few layers in groups, each run several times."""

    def layers(self, backbone: nn.Module) -> dict[str, nn.Module]:
        return {
            f"{group}.albert_layers.{name}": layer
            for group, module in self._groups(backbone).items()
            for name, layer in module.get_submodule("albert_layers").named_children()
        }

    def order(self, backbone: Any) -> Sequence[nn.Module]:
        groups, config = list(self._groups(backbone).values()), backbone.config
        repeats = config.num_hidden_layers / config.num_hidden_groups
        return [
            layer
            for i in range(config.num_hidden_layers)
            for layer in groups[int(i / repeats)].get_submodule("albert_layers").children()
        ]

    def bypassed(self, backbone: nn.Module) -> dict[str, nn.Module]:
        return super().bypassed(backbone) | self._groups(backbone)

    def read_unused(self, reader: Reader) -> None:
        reader.dropout("dropout")

    def pool(self, backbone: Any, first: Tensor) -> Tensor:
        return backbone.pooler_activation(backbone.pooler(first))

    def _groups(self, backbone: nn.Module) -> dict[str, nn.Module]:
        groups = backbone.get_submodule(self.layer_list)
        return {f"{self.layer_list}.{name}": group for name, group in groups.named_children()}


_POOLED = "BaseModelOutputWithPoolingAndCrossAttentions"
BERT = PostNormFamily("bert", "Bert", _POOLED, parts=BERT_PARTS)
ROBERTA = RobertaFamily("roberta", "Roberta", _POOLED, parts=BERT_PARTS)
XLM_ROBERTA = RobertaFamily("xlm_roberta", "XLMRoberta", _POOLED, parts=BERT_PARTS)
ELECTRA = PostNormFamily(
    "electra",
    "Electra",
    "BaseModelOutputWithPastAndCrossAttentions",
    children=("embeddings", "embeddings_project", "encoder"),
    parts=BERT_PARTS,
    project="embeddings_project",
)
DISTILBERT = PostNormFamily(
    "distilbert",
    "DistilBert",
    "BaseModelOutput",
    layer_list="transformer.layer",
    children=("embeddings", "transformer"),
    parts=DISTILBERT_PARTS,
)
ALBERT = AlbertFamily(
    "albert",
    "Albert",
    "BaseModelOutputWithPooling",
    layer_list="encoder.albert_layer_groups",
    children=("embeddings", "encoder", "pooler", "pooler_activation"),
    parts=ALBERT_PARTS,
    project="encoder.embedding_hidden_mapping_in",
)
