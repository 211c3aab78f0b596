"""What a model type of transformers must say about itself to run on packed rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from varstream.encoder import checks
from varstream.encoder.layer import EncoderLayer, Rows

REFUSED = ("is_decoder", "add_cross_attention", "is_causal", "chunk_size_feed_forward")
_POOLER = "pooler"


@dataclass(frozen=True)
class Family(ABC):
    """One model type. The defaults are BERT's; a subclass overrides where its models differ.

    Attributes:
        kind: the module ``transformers.models.<kind>``.
        prefix: what its class names start with.
        output: class of ``transformers.modeling_outputs`` that the backbone returns.
        layer_list: path from the backbone to the list of layers.
        children: the backbone's modules by name.
        by_distance: attention depends on the distance of two tokens, so that padding between them
            counts.
        reads_padding: the padded model's position 0 sees the tokens of its sequence where it is
            padding too, so that a pooler or head may read it.
    """

    kind: str
    prefix: str
    output: str
    layer_list: str = "encoder.layer"
    children: tuple[str, ...] = ("embeddings", "encoder", _POOLER)
    by_distance: bool = False
    reads_padding: bool = True

    # --- layers -----------------------------------------------------------------------------------

    @abstractmethod
    def read(self, name: str, layer: nn.Module) -> EncoderLayer:
        """The parts of one layer, checked.

        Raises:
            UnsupportedModelError: names the first part that isn't understood.
        """

    def layers(self, backbone: nn.Module) -> dict[str, nn.Module]:
        """The layers by name, each once."""
        stack = backbone.get_submodule(self.layer_list)
        return {f"{self.layer_list}.{name}": layer for name, layer in stack.named_children()}

    def order(self, backbone: nn.Module) -> Sequence[nn.Module]:
        """The layers as they run."""
        return list(self.layers(backbone).values())

    def bypassed(self, backbone: nn.Module) -> dict[str, nn.Module]:
        """Modules around the layers whose own forward isn't called."""
        stack = self.layer_list.split(".")[0]
        return {stack: backbone.get_submodule(stack)}

    # --- checks -----------------------------------------------------------------------------------

    def check(self, backbone: Any) -> None:
        """Refuse a backbone that would not compute the same on packed rows.

        Raises:
            UnsupportedModelError: names the first part that isn't understood.
        """
        checks.check_stock("the encoder", backbone, self.kind)
        checks.check_config(backbone.config, REFUSED)
        checks.check_children(backbone, self.children)
        self.check_bypassed(backbone)
        for name, layer in self.layers(backbone).items():
            checks.check_stock(name, layer, self.kind)
            self.read(name, layer)

    def check_bypassed(self, backbone: nn.Module) -> None:
        """What is checked again at each call, beside the layers."""
        for name, module in self.bypassed(backbone).items():
            checks.check_bypassed(name, module, self.kind)

    # --- around the layers ------------------------------------------------------------------------

    def positions(
        self, backbone: Any, input_ids: Tensor | None, inputs_embeds: Tensor | None
    ) -> Tensor:
        """Position numbers of a padded batch, (B, S) or (1, S) int64, by the model's own rule: the
        column, here."""
        given = input_ids if input_ids is not None else inputs_embeds
        assert given is not None
        seqlen, table = given.shape[1], getattr(backbone.embeddings, "position_embeddings", None)
        if table is not None and seqlen > table.num_embeddings:
            raise ValueError(
                f"the batch must have at most max_position_embeddings={table.num_embeddings} "
                f"columns, got {seqlen}"
            )
        return torch.arange(seqlen, device=given.device)[None]

    def embed(self, backbone: Any, columns: dict[str, Tensor]) -> Tensor:
        """Packed columns (total, ...) to embeddings (total, d), by the model's own module."""
        given: dict[str, Any] = {name: c[None] for name, c in columns.items()}
        given.setdefault("input_ids", None)
        return backbone.embeddings(**given)[0]

    def share(self, backbone: Any, x: Tensor, positions: Tensor, rows: Rows) -> tuple[Tensor, ...]:
        """What all layers of a call need: ``Rows.shared``. x (total, d), positions (total,)."""
        return ()

    def finish(self, backbone: Any, x: Tensor) -> Tensor:
        """What follows the last layer, (total, d) to (total, d)."""
        return x

    def has_pooler(self, backbone: nn.Module) -> bool:
        return getattr(backbone, _POOLER, None) is not None

    def pool(self, backbone: Any, first: Tensor) -> Tensor:
        """The pooler's output (B, d) from position 0 (B, d) of each sequence."""
        return backbone.pooler(first[:, None])
