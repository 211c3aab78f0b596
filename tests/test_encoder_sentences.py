"""SentenceTransformer models on padding-free encoders: the same embeddings, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from encoder_models import make
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast

import varstream as vs
from varstream.encoder import padding_free, restore_padding
from varstream.testing import assert_exact

WORDS = ["pack", "rows", "of", "real", "tokens", "only", "and", "never", "pad", "them"]
SPECIAL = ["[UNK]", "[PAD]", "[CLS]", "[SEP]"]
TEXTS = [
    "pack rows of real tokens only and never pad them",
    "pack",
    "never pad rows of tokens",
    "",
    "real rows and real tokens and rows of them",
    "only them",
]
PREFIXES = ("Bert", "DistilBert", "MPNet", "ModernBert", "DebertaV2", "Albert")
MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")


def save(prefix: str, folder: Path) -> str:
    """A random model and a tokenizer of words, as files."""
    vocabulary = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=20,
        model_input_names=["input_ids", "attention_mask"],
        **names,
    ).save_pretrained(folder)
    make(f"{prefix}Model", torch.float32).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    return save("Bert", tmp_path_factory.mktemp("bert"))


def sentence_model(folder: str, modes="mean", *more: nn.Module, **options) -> SentenceTransformer:
    encoder = Transformer(folder)
    pooling = Pooling(encoder.get_embedding_dimension(), modes, **options)
    return SentenceTransformer(modules=[encoder, pooling, *more], device="cpu")


def embeddings(model, **options):
    return model.encode(TEXTS, batch_size=4, convert_to_tensor=True, **options)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_embeddings_are_the_same(prefix, tmp_path):
    dense = sentence_model(save(prefix, tmp_path), "mean", Normalize())
    ours = padding_free(copy.deepcopy(dense))
    want, got = embeddings(dense), embeddings(ours)
    assert got.shape == (len(TEXTS), 24)
    assert_exact(got, want, tolerance=1e-5)
    assert_exact(embeddings(restore_padding(ours)), want, tolerance=1e-6)


@pytest.mark.parametrize("modes", [*MODES, ("mean", "cls"), ("mean", "max"), MODES], ids=str)
def test_every_mode(folder, modes):
    """Those that packed rows have, those that they don't, and both beside each other."""
    dense = sentence_model(folder, modes)
    ours = padding_free(copy.deepcopy(dense))
    assert_exact(embeddings(ours), embeddings(dense), tolerance=1e-5)


def test_pooling_takes_packed_rows(folder, monkeypatch):
    def no(*_):
        raise AssertionError("pooled padded tokens")

    ours = padding_free(sentence_model(folder, ("mean", "cls", "mean_sqrt_len_tokens")))
    monkeypatch.setattr(Pooling, "_forward_padded", no)
    monkeypatch.setattr(Pooling, "_forward_flattened", no)
    assert embeddings(ours).isfinite().all()


def test_token_embeddings(folder):
    dense = sentence_model(folder)
    ours = padding_free(copy.deepcopy(dense))
    pairs = zip(
        *(embeddings(m, output_value="token_embeddings") for m in (ours, dense)), strict=True
    )
    for got, want in pairs:
        assert_exact(got, want, tolerance=1e-5)
    for got, want in zip(*(embeddings(m, output_value=None) for m in (ours, dense)), strict=True):
        assert got.keys() == want.keys()
        assert_exact(got["sentence_embedding"], want["sentence_embedding"], tolerance=1e-5)


def test_prompts_left_out_of_pooling(folder):
    dense = sentence_model(folder, ("mean", "cls"), include_prompt=False)
    ours = padding_free(copy.deepcopy(dense))
    want, got = (embeddings(m, prompt="pack rows of ") for m in (dense, ours))
    assert_exact(got, want, tolerance=1e-5)
    assert (want - embeddings(dense)).norm() > 0.1


def test_other_modules_follow(folder):
    """Without a stock Pooling right behind it the encoder gives padded tokens."""

    class Own(Pooling):
        pass

    own = Own(24, "mean")
    Own.__module__ = "elsewhere"
    plain = sentence_model(folder)
    for modules in ([plain[0], own], [*plain.children(), Dense(24, 7)]):
        dense = SentenceTransformer(modules=modules, device="cpu")
        ours = copy.deepcopy(dense)
        padding_free(ours)
        assert_exact(embeddings(ours), embeddings(dense), tolerance=1e-5)


def test_training(folder):
    """The same gradients through pooling and encoder."""
    dense = sentence_model(folder, ("mean", "cls")).double()
    ours = padding_free(copy.deepcopy(dense))
    grads = []
    for model in (ours, dense):
        out = model.train()(model.preprocess(TEXTS))["sentence_embedding"]
        out.sin().sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and grads[0]
    for name, want in grads[1].items():
        against = grads[1][name.replace("key.bias", "query.bias")]
        assert (grads[0][name] - want).norm() <= 1e-10 * max(want.norm(), against.norm()), name


def test_left_padding(folder):
    """The pooler, which would read padding, is not a sentence model's."""
    dense = sentence_model(folder, ("mean", "cls", "lasttoken"))
    dense.tokenizer.padding_side = "left"
    ours = padding_free(copy.deepcopy(dense))
    assert_exact(embeddings(ours), embeddings(dense), tolerance=1e-5)


def test_twice_and_back(folder):
    model = sentence_model(folder)
    want = embeddings(model)
    padding_free(padding_free(model))
    assert "forward" in model[1].__dict__
    assert_exact(embeddings(copy.deepcopy(model)), want, tolerance=1e-5)
    restore_padding(model)
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert torch.equal(embeddings(model), want)


def test_what_is_refused(folder, tmp_path):
    model = sentence_model(folder)
    with pytest.raises(
        vs.UnsupportedModelError, match="a SentenceTransformer can't return output_p"
    ):
        padding_free(model, output_packed=True)
    model[0].forward = model[0].forward
    with pytest.raises(
        vs.UnsupportedModelError, match="Transformer has a forward set on the insta"
    ):
        padding_free(model)
    del model[0].forward
    model[0].modality_config["text"]["method_output_name"] = "pooler_output"
    with pytest.raises(
        vs.UnsupportedModelError, match="pooler_output of forward; .* understands last"
    ):
        padding_free(model)
    unpadding = sentence_model(folder)
    unpadding[0].can_flatten_inputs = True
    with pytest.raises(
        vs.UnsupportedModelError, match="unpads its inputs itself; set its unpad_inp"
    ):
        padding_free(unpadding)
    with pytest.raises(vs.UnsupportedModelError, match="the first module is Dense; .* begins with"):
        padding_free(SentenceTransformer(modules=[Dense(4, 4)], device="cpu"))
    hooked = sentence_model(folder)
    hooked[0].model.encoder.layer[0].output.register_forward_hook(lambda *_: None)
    with pytest.raises(vs.UnsupportedModelError, match="encoder.layer.0.output has hooks"):
        padding_free(hooked)
    cross = CrossEncoder(folder, device="cpu")
    with pytest.raises(vs.UnsupportedModelError, match=r"pass its model \(cross.model\)"):
        padding_free(cross)
    assert "forward" not in cross.model.__dict__ and padding_free(cross.model) is cross.model
    for left in (model, unpadding, hooked):
        assert not any("_varstream_padding_free" in m.__dict__ for m in left.modules())
