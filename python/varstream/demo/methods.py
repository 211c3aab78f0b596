"""The four compared ways to compute one batch's loss; each is what its users would write.

A method gets a model of its own (a copy) and returns the function from documents to their loss, the
mean over all predicted tokens. Calling ``backward`` on that is left to the caller.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import varstream as vs
from varstream.batching import PackedCollator

Documents = list[Tensor]  # each int64 (length,), on the model's device
Loss = Callable[[Documents], Tensor]

PER_DOCUMENT = "sdpa_per_document"
IGNORE_INDEX = -100


@dataclass(frozen=True)
class Method:
    """A way to train: ``key`` names it in result files, ``name`` and ``note`` in tables."""

    key: str
    name: str
    note: str
    build: Callable[[Any], Loss]

    def prepare(self, model: Any) -> Runner:
        """The method on a copy of ``model``, which stays as it is."""
        own = copy.deepcopy(model)
        return Runner(self, own, self.build(own))


@dataclass(frozen=True)
class Runner:
    """A method and its own copy of the model."""

    method: Method
    model: Any
    loss: Loss

    def step(self, documents: Documents) -> float:
        """Forward and backward of one batch into fresh gradients; returns the loss."""
        self.model.zero_grad(set_to_none=True)
        loss = self.loss(documents)
        loss.backward()
        return loss.item()

    def release(self) -> None:
        """Free the gradients."""
        self.model.zero_grad(set_to_none=True)


def predicted(documents: Documents) -> int:
    """Tokens that the batch predicts: all but each document's first. The loss's normaliser."""
    return max(sum(max(len(document) - 1, 0) for document in documents), 1)


def packed_batch(documents: Documents, device: torch.device) -> dict[str, Any]:
    """The documents as one packed row, as :class:`varstream.batching.PackedCollator` makes it."""
    batch = PackedCollator()([{"input_ids": document} for document in documents])
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def padded(model: Any) -> Loss:
    """Right-padded rows, logits for every position, Hugging Face's own attention and loss."""

    def loss(documents: Documents) -> Tensor:
        ids = nn.utils.rnn.pad_sequence(documents, batch_first=True)
        lengths = torch.tensor([len(document) for document in documents], device=ids.device)
        mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        return model(
            input_ids=ids,
            attention_mask=mask.long(),
            labels=ids.masked_fill(~mask, IGNORE_INDEX),
            num_items_in_batch=predicted(documents),
            use_cache=False,
        ).loss

    return loss


def padded_checkpointed(model: Any) -> Loss:
    """As :func:`padded`, keeping one input per layer and recomputing the rest."""
    _checkpoint(model)
    return padded(model)


def packed_checkpointed(model: Any) -> Loss:
    """One packed row, a causal SDPA call per document, checkpointed layers, chunked head."""
    from transformers import AttentionInterface

    # transformers gives an implementation that its mask registry doesn't know no mask at all; this
    # one needs none. Its own "sdpa" would build a dense (tokens, tokens) mask for a packed row.
    AttentionInterface.register(PER_DOCUMENT, _attention_per_document)
    model.config._attn_implementation = PER_DOCUMENT
    _checkpoint(model)

    def loss(documents: Documents) -> Tensor:
        batch = packed_batch(documents, model.device)
        hidden = model.model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            use_cache=False,
            document_lengths=[len(document) for document in documents],
        ).last_hidden_state
        targets = nn.functional.pad(batch["labels"][0, 1:], (0, 1), value=IGNORE_INDEX)
        return vs.linear_cross_entropy(
            hidden[0], model.lm_head.weight, targets, normalizer=predicted(documents)
        )

    return loss


def streamed(model: Any) -> Loss:
    """One packed row through ``vs.stream``: one chunk's activations at a time."""
    vs.stream(model)

    def loss(documents: Documents) -> Tensor:
        batch = packed_batch(documents, model.device)
        return model(**batch, num_items_in_batch=predicted(documents)).loss

    return loss


def _checkpoint(model: Any) -> None:
    # transformers 5 has renamed the method along the way
    new_name = getattr(model, "activation_checkpointing_enable", None)
    (new_name or model.gradient_checkpointing_enable)({"use_reentrant": False})


def _attention_per_document(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    document_lengths: list[int] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """An ``AttentionInterface``: causal SDPA on each document's rows of (1, heads, tokens, D)."""
    assert document_lengths is not None
    rows = (x.split(document_lengths, dim=2) for x in (query, key, value))
    outs = [
        nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, enable_gqa=True
        )
        for q, k, v in zip(*rows, strict=True)
    ]
    return torch.cat(outs, dim=2).transpose(1, 2), None


METHODS = (
    Method(
        "padded",
        "padded",
        "Hugging Face model and loss, right-padded rows with an attention mask, SDPA",
        padded,
    ),
    Method(
        "padded_checkpointed",
        "padded + checkpointing",
        "the same with gradient checkpointing of every layer",
        padded_checkpointed,
    ),
    Method(
        "packed_checkpointed",
        "packed + checkpointing + chunked CE",
        "Hugging Face layers on one packed row, one causal SDPA call per document (no mask, no "
        "work between documents), gradient checkpointing, vs.linear_cross_entropy as head",
        packed_checkpointed,
    ),
    Method("varstream", "varstream", "the same packed row through vs.stream(model)", streamed),
)
