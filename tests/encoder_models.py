"""Tiny Hugging Face encoders with random weights, and padded batches for them."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers

import varstream.encoder

VOCAB, WIDTH, COLUMNS = 53, 24, 11
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 24,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pad_token_id": 1,
    "num_labels": 3,
}
DISTILBERT_SIZES = {
    "vocab_size": VOCAB,
    "dim": WIDTH,
    "hidden_dim": 40,
    "n_layers": 2,
    "n_heads": 3,
    "max_position_embeddings": 24,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "seq_classif_dropout": 0.0,
    "qa_dropout": 0.0,
    "pad_token_id": 1,
    "num_labels": 3,
}
ALBERT_SIZES = SIZES | {
    "embedding_size": 16,
    "num_hidden_layers": 5,
    "num_hidden_groups": 2,
    "inner_group_num": 2,
    "classifier_dropout_prob": 0.0,
}
DEBERTA_SIZES = SIZES | {
    "type_vocab_size": 2,
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 4,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
}
# Layers without a window, and with one that is narrower than a row.
MODERNBERT_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "max_position_embeddings": 24,
    "local_attention": 4,
    "pad_token_id": 1,
    "num_labels": 3,
}
SIZES_BY_PREFIX = {
    "Bert": SIZES,
    "Roberta": SIZES,
    "XLMRoberta": SIZES,
    "Electra": SIZES | {"embedding_size": 16, "summary_last_dropout": 0.0},
    "DistilBert": DISTILBERT_SIZES,
    "Albert": ALBERT_SIZES,
    "MPNet": SIZES,
    "DebertaV2": DEBERTA_SIZES,
    "ModernBert": MODERNBERT_SIZES,
}
PREFIXES = tuple(SIZES_BY_PREFIX)
POOLED = ("Bert", "Roberta", "XLMRoberta", "Albert", "MPNet")
EMBEDDED = {"Electra": 16, "Albert": 16}  # embeddings narrower than the layers
# Implementations of attention that the padded model has, in the dtype that it is given.
IMPLEMENTATIONS = dict.fromkeys(PREFIXES, ("sdpa", "eager")) | {
    "MPNet": ("eager",),
    "DebertaV2": ("eager",),
    "ModernBert": ("sdpa",),  # its eager softmax is in float32
}
# Models whose embeddings take token types.
TYPED = ("Bert", "Electra", "Albert", "DebertaV2")

# 1 for real: right padding, left padding, holes, one token, nothing missing
MASK = torch.tensor(
    [
        [1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0],
        [0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1],
        [1, 1, 0, 1, 1, 0, 0, 1, 0, 1, 0],
        [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    ]
)
FIRST_KEPT = MASK[[0, 2, 3, 4]]  # position 0 is real
# Position 0 is padding in some rows: left, before holes, before one token; and real in others
FIRST_PADDED = torch.tensor(
    [
        [0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 0, 1, 1, 0, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 1, 1, 0, 1, 0, 0],
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
        [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    ]
)
READ_PADDING = tuple(p for p in PREFIXES if p not in ("DebertaV2", "ModernBert"))


def make(name: str = "BertModel", dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """An encoder by class name, in training mode; ``pooler`` leaves the pooler out when False."""
    prefix = next(p for p in sorted(PREFIXES, key=len, reverse=True) if name.startswith(p))
    pooler = {"add_pooling_layer": False} if changes.pop("pooler", True) is False else {}
    config = getattr(transformers, f"{prefix}Config")(**(SIZES_BY_PREFIX[prefix] | changes))
    model = getattr(transformers, name)(config, **pooler)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model.to(dtype).train()


def twins(name: str = "BertModel", *args: Any, **changes: Any) -> tuple[Any, Any]:
    """The padded model and its padding-free copy."""
    dense = make(name, *args, **changes)
    return dense, varstream.encoder.padding_free(copy.deepcopy(dense))


def batch(mask: torch.Tensor = MASK, name: str = "BertModel") -> dict[str, torch.Tensor]:
    """input_ids with the padding token where the mask is 0, and token types where there are any."""
    ids = torch.randint(2, VOCAB, mask.shape).masked_fill(mask == 0, 1)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if name.startswith(TYPED):
        inputs["token_type_ids"] = torch.randint(2, mask.shape)
    return inputs


def labels_for(name: str, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Labels of the stock head ``name``, -100 on padding."""
    if name == "BertForPreTraining":
        sentences = torch.randint(2, mask.shape[:1])
        return labels_for("ForMaskedLM", mask) | {"next_sentence_label": sentences}
    if name == "AlbertForPreTraining":
        sentences = torch.randint(2, mask.shape[:1])
        return labels_for("ForMaskedLM", mask) | {"sentence_order_label": sentences}
    if name == "ElectraForPreTraining":
        return {"labels": torch.randint(2, mask.shape)}
    if name.endswith(("SequenceClassification", "NextSentencePrediction")):
        return {"labels": torch.randint(2, mask.shape[:1])}
    most = 3 if name.endswith("TokenClassification") else VOCAB
    return {"labels": torch.randint(most, mask.shape).masked_fill(mask == 0, -100)}


KEY_BIASES = {
    "pos_key_proj.bias": "query_proj.bias",
    "key.bias": "query.bias",
    "k_lin.bias": "q_lin.bias",
    "attn.k.bias": "attn.q.bias",
    "key_proj.bias": "query_proj.bias",
}


def assert_gradients(
    found: dict[str, torch.Tensor | None],
    expected: dict[str, torch.Tensor | None],
    zero: str = "",
) -> None:
    """Equal to 1e-12, parameter by parameter.

    A key bias shifts all scores of a query alike, so its gradient is 0 but for rounding: it is
    measured against that of the query bias. ``zero`` names another such bias, measured against its
    weight.
    """
    for name, want in expected.items():
        got = found[name]
        if got is None or want is None:
            assert got is want or not (want if got is None else got).any(), name
            continue
        against = name
        for key, query in KEY_BIASES.items():
            against = against.replace(key, query)
        against = name.replace("bias", "weight") if name == zero else against
        error = (got - want).norm().item()
        size = max(want.norm().item(), expected[against].norm().item())
        assert error <= 1e-12 * size, f"{name}: {error:.3e} against {size:.3e}"


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor | None]:
    """The gradient of every parameter after one backward."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}
