"""attn_implementation="varstream" against dense attention under transformers' own masks, on tiny
models of each family."""

import copy

import pytest
import torch
import transformers
from attention_models import (
    DECODERS,
    ENCODERS,
    SIZES,
    VOCAB,
    Layer,
    build,
    check_models,
    heads,
    oracle_attention,
    oracle_mask,
    padded,
    pair,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from models import make_twin, packed_row
from transformers import modeling_flash_attention_utils as flash_utils
from transformers.integrations.flash_attention import flash_attention_forward

import varstream as vs
from varstream.integrations import flash_attn, flash_attn_3
from varstream.integrations.transformers import varstream_attention, varstream_mask
from varstream.testing import assert_error_ratio, assert_exact, relative_error, worst_gradient

# --- decoders -------------------------------------------------------------------------------------


def test_registered_with_a_mask_of_its_own():
    assert transformers.AttentionInterface()["varstream"] is varstream_attention
    assert transformers.AttentionMaskInterface()["varstream"] is varstream_mask


@pytest.mark.parametrize("kind", ["left", "right", "both", "none"])
@pytest.mark.parametrize("name", DECODERS)
def test_decoders_on_padded_batches(name, kind):
    check_models(*pair(DECODERS[name]), padded(kind) | {"use_cache": False})


@pytest.mark.parametrize("name", ["llama", "llama_bidirectional", "qwen3"])
def test_padding_in_holes(name):
    check_models(*pair(DECODERS[name]), padded("holes") | {"use_cache": False})


def test_bfloat16():
    """The error against float64 is at most twice that of sdpa in the same dtype."""
    inputs = padded("both") | {"use_cache": False}
    real = inputs["attention_mask"].bool()
    reference = build(DECODERS["llama"], "oracle", dtype=torch.bfloat16).double()  # rounded weights
    exact = reference(**inputs).logits[real]
    ours, plain = (
        build(DECODERS["llama"], name, dtype=torch.bfloat16)(**inputs).logits[real]
        for name in ("varstream", "sdpa")
    )
    assert_error_ratio(ours, plain, exact)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("name", [n for n in DECODERS if n != "llama_bidirectional"])
def test_decoders_on_packed_documents(name, rows):
    """Documents are told by position ids that restart, in one row or in several."""
    positions = [torch.cat([torch.arange(n) for n in lengths]) for lengths in ([5, 1, 7], [9, 4])]
    ids = torch.randint(VOCAB, (rows, 13))
    inputs = {"input_ids": ids, "position_ids": torch.stack(positions[:rows]), "use_cache": False}
    ours, oracle = pair(DECODERS[name])
    if name != "gpt_oss":  # whose masks never see the position ids: its documents see each other
        check_models(ours, oracle, inputs)
    with torch.no_grad():  # the last document alone says the same, with a cache too
        alone = ours(input_ids=ids[-1:, 6 if rows == 1 else 9 :], use_cache=False).logits[0]
        for use_cache in (False, True):
            together = ours(**inputs | {"use_cache": use_cache}).logits[-1]
            assert_exact(together[-len(alone) :], alone, tolerance=1e-6)


@pytest.mark.parametrize("family", ["llama", "qwen2_window", "qwen3_mqa"])
@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_float64_twins_are_exact(family, kind):
    ours = make_twin(family)
    oracle = copy.deepcopy(ours)
    ours.config._attn_implementation, oracle.config._attn_implementation = "varstream", "oracle"
    inputs = padded("both") if kind == "padded" else packed_row([5, 1, 7])
    inputs.pop("labels", None)
    check_models(ours, oracle, inputs | {"use_cache": False}, tolerance=1e-12)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_lengths_of_the_flattening_collator(name):
    features = [{"input_ids": torch.randint(VOCAB, (n,)).tolist()} for n in (5, 1, 7)]
    kwargs = {"return_tensors": "pt", "return_flash_attn_kwargs": True}
    collate = transformers.DataCollatorWithFlattening(**kwargs)
    lengths_only = transformers.DataCollatorWithFlattening(return_position_ids=False, **kwargs)
    ours, oracle = pair(DECODERS[name])
    batch = collate(features)
    batch.pop("labels")
    want = oracle(**batch, use_cache=False).logits
    assert relative_error(ours(**batch, use_cache=False).logits, want) < 1e-6
    # Without position ids rotary positions run on (attention is the same under a shift), and only
    # the lengths tell the documents apart.
    batch = lengths_only(features)
    batch.pop("labels")
    assert relative_error(ours(**batch, use_cache=False).logits, want) < 1e-6


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", [n for n in DECODERS if n != "llama_bidirectional"])
def test_generate(name, cache):
    """Greedy tokens equal eager's with left padding, past the sliding window."""
    ours, eager = (build(DECODERS[name], n, dtype=torch.float32) for n in ("varstream", "eager"))
    options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    if cache == "static":
        options["cache_implementation"] = "static"
    inputs = padded("left")
    assert ours.generate(**inputs, **options).equal(eager.generate(**inputs, **options))


@pytest.mark.parametrize(
    ("name", "kind"), [("llama", "holes"), ("llama", "both"), ("gemma3", "both")]
)
def test_several_queries_against_a_cache(name, kind):
    """Chunks of a prompt whose padding stands between them, too."""
    ours, oracle = pair(DECODERS[name])
    inputs = padded(kind)
    results = []
    for model in (ours, oracle):
        cache, steps = transformers.DynamicCache(config=model.config), []
        for first, last in ((0, 6), (6, 7), (7, 11)):
            steps.append(
                model(
                    input_ids=inputs["input_ids"][:, first:last],
                    attention_mask=inputs["attention_mask"][:, :last],
                    past_key_values=cache,
                ).logits
            )
        results.append(torch.cat(steps, 1)[inputs["attention_mask"].bool()])
    assert relative_error(*results) < 1e-6


def test_a_streamed_model():
    model = build(DECODERS["llama"], "varstream").train()
    inputs = padded("right")
    inputs["labels"] = inputs["input_ids"].where(inputs["attention_mask"].bool(), -100)
    model(**inputs).loss.backward()
    want = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    vs.stream(model, chunk_size=4)
    model(**inputs).loss.backward()
    name, error = worst_gradient(((n, p.grad) for n, p in model.named_parameters()), want)
    assert error < 1e-6, name


def test_gradient_checkpointing():
    ours, oracle = pair(DECODERS["gemma2"])
    ours.train().gradient_checkpointing_enable({"use_reentrant": False})
    check_models(ours, oracle, padded("left") | {"use_cache": False})


def test_compiled():
    ours, oracle = pair(DECODERS["qwen2"])
    compiled = torch.compile(ours, backend="aot_eager")
    for kind in ("left", "right"):
        check_models(compiled, oracle, padded(kind) | {"use_cache": False})
    torch.compiler.reset()


# --- encoders and cross-attention -----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["left", "right", "both", "none"])
@pytest.mark.parametrize("name", ENCODERS)
def test_encoders(name, kind):
    check_models(*pair(ENCODERS[name], transformers.AutoModel), padded(kind))


@pytest.mark.parametrize("length", [11, 6])
def test_cross_attention(length):
    """The encoder's padding is not the decoder's, at equal lengths either."""
    config = transformers.BartConfig(
        vocab_size=VOCAB,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=64,
    )
    inputs = padded("right")
    real = inputs.pop("attention_mask")
    decoder = torch.randint(1, VOCAB, (3, length))
    inputs |= {"attention_mask": real, "decoder_input_ids": decoder, "use_cache": False}
    ours, oracle = pair(config, transformers.AutoModelForSeq2SeqLM)
    results = [model(**inputs).logits for model in (ours, oracle)]
    assert relative_error(*results) < 1e-6
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2}
    encoder = {"input_ids": inputs["input_ids"], "attention_mask": real}
    assert ours.generate(**encoder, **options).equal(oracle.generate(**encoder, **options))


@pytest.mark.parametrize(
    ("changes", "queries"),
    [({}, "packed"), ({"cross_attention_frequency": 2}, "all"), ({"is_decoder": True}, "all")],
)
def test_which_models_may_cross_attend(changes, queries):
    """Only where no cross-attention can be are the queries taken for the keys' own rows."""
    config = transformers.BertConfig(**SIZES)
    for name, value in changes.items():
        setattr(config, name, value)
    bidirectional = transformers.masking_utils.bidirectional_mask_function
    padding = torch.tensor([[0, 1, 1, 1]])
    mask = varstream_mask(
        1, 4, 4, attention_mask=padding, mask_function=bidirectional, config=config
    )
    assert mask.indices_k.tolist() == [1, 2, 3]
    assert (mask.indices_q is None) == (queries == "all")


@st.composite
def cached_batches(draw):
    """A batch against a cache: sizes, a causal pattern, padding without holes under a window."""
    batch, new, past = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(0, 4))
    dropped = draw(st.integers(0, past))  # keys that a sliding cache no longer holds
    spare = draw(st.integers(0, 3))  # slots that a static cache has not filled
    window = draw(st.none() | st.integers(1, 12))
    rows = torch.zeros(batch, past + new, dtype=torch.bool)
    for row in rows:
        if window is None:
            row[:] = torch.tensor(
                draw(st.lists(st.booleans(), min_size=len(row), max_size=len(row)))
            )
        else:
            first = draw(st.integers(0, len(row)))
            row[first : draw(st.integers(first, len(row)))] = True
    return batch, new, past, dropped, spare, window, draw(st.none() | st.just(rows))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cached_batches())
def test_masks_and_caches_of_every_shape(case):
    """The attention under our mask is that under transformers' own mask of the same arguments."""
    batch, new, past, dropped, spare, window, padding = case
    masks = transformers.masking_utils
    pattern = masks.causal_mask_function
    if window is not None:
        pattern = masks.sliding_window_causal_mask_function(window)
    keys = past - dropped + new + spare
    arguments = {"q_offset": past, "kv_offset": dropped, "mask_function": pattern}
    arguments |= {"attention_mask": padding}
    visible = oracle_mask(batch, new, keys, **arguments)
    q, k, v = heads(new, keys, batch)
    want, _ = oracle_attention(Layer(), q, k, v, visible)
    real = torch.ones(batch, new, dtype=torch.bool) if padding is None else padding[:, -new:]
    for offset in (past, torch.tensor(past)):
        ours = varstream_mask(batch, new, keys, **arguments | {"q_offset": offset})
        got, _ = varstream_attention(Layer(), q, k, v, ours)
        assert_exact(got[real], want[real])
        assert (got[~real] == 0).all()


# --- the attention function alone -----------------------------------------------------------------


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("window", [None, 3])
def test_plain_masks_without_the_registry(is_causal, window):
    q, k, v = heads()
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    if window and not is_causal:
        mask = None
    out, weights = varstream_attention(
        Layer(), q, k, v, mask, is_causal=is_causal, sliding_window=window
    )
    assert weights is None and out.shape == (2, 5, 4, 8)
    distance = torch.arange(5)[None] - torch.arange(5)[:, None]
    visible = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    if is_causal:
        visible &= distance <= 0
    if window:
        visible &= distance.abs() < window
    if mask is not None:
        visible &= mask.bool()[:, None, None]
    want, _ = oracle_attention(Layer(), q, k, v, visible)
    assert_exact(out, want)


def test_padding_is_neither_read_nor_written():
    q, k, v = heads()
    padding = torch.tensor([[0, 1, 0, 1, 1], [1, 1, 1, 0, 0]]).bool()
    want, _ = varstream_attention(Layer(), q, k, v, padding)
    for x in (q, k, v):
        x.transpose(1, 2)[~padding] = torch.nan
    got, _ = varstream_attention(Layer(), q, k, v, padding)
    assert got.equal(want) and (got[~padding] == 0).all()


def test_dropout_softcap_and_sinks_reach_the_operator():
    q, k, v = heads(batch=1)
    options = {"dropout_p": 0.4, "softcap": 2.0, "softmax_scale": 0.3, "sinks": torch.randn(4)}
    torch.manual_seed(3)
    rows = (x[0].transpose(0, 1) for x in (q, k, v))
    want = vs.varlen_attention(*rows, vs.cu_seqlens([5]), causal=True, **options)
    torch.manual_seed(3)
    got, _ = varstream_attention(
        Layer(), q, k, v, None, dropout=0.4, softcap=2.0, scaling=0.3, s_aux=options["sinks"]
    )
    assert got[0].equal(want)


def test_training_applies_attention_dropout():
    model = build(DECODERS["llama"], "varstream")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    inputs = padded("left")
    with torch.no_grad():
        calm = [model(**inputs).logits for _ in range(2)]
        wild = [model.train()(**inputs).logits for _ in range(2)]
    assert calm[0].equal(calm[1]) and not wild[0].equal(wild[1])


def test_position_ids_without_the_registry():
    q, k, v = heads(batch=1)
    got, _ = varstream_attention(
        Layer(), q, k, v, None, position_ids=torch.tensor([[0, 1, 0, 1, 2]])
    )
    parts = [[x[:, :, rows] for x in (q, k, v)] for rows in (slice(0, 2), slice(2, 5))]
    want = torch.cat([varstream_attention(Layer(), *part, None)[0] for part in parts], 1)
    assert_exact(got, want)


def test_a_row_mask_moves_with_its_layer():
    mask = varstream_mask(1, 4, 4, attention_mask=torch.tensor([[0, 1, 1, 1]]))
    moved = mask.to("meta")
    assert moved.cu_seqlens_q.is_meta and moved.indices_k.is_meta
    assert moved.window == mask.window and moved.max_seqlen_q == 3
    assert mask.contiguous() is mask and mask.shape == (1, 1, 4, 4)


# --- transformers' flash path over the FlashAttention faces ---------------------------------------


@pytest.mark.parametrize("face", [flash_attn, flash_attn_3])
@pytest.mark.parametrize("kind", ["padded", "packed", "decoding", "whole"])
def test_transformers_calls_the_flash_faces(face, kind, monkeypatch):
    """transformers' own flash code finds every name and keyword it wants on our functions."""
    functions = (face.flash_attn_func, face.flash_attn_varlen_func, None)
    functions += (flash_attn.pad_input, flash_attn.unpad_input)
    process = flash_utils._lazy_define_process_function(face.flash_attn_varlen_func)
    monkeypatch.setattr(
        flash_utils, "lazy_import_flash_attention", lambda *_: (functions, (process, dict))
    )
    module = Layer()
    module.config = transformers.LlamaConfig(**SIZES)
    q, k, v = heads(rows=1 if kind == "decoding" else 5, batch=1 if kind == "packed" else 2)
    mask, extra = None, {}
    visible = torch.ones(q.shape[0], 1, 5, 5, dtype=torch.bool).tril()
    if kind == "packed":
        extra["position_ids"] = torch.tensor([[0, 1, 0, 1, 2]])
        visible[..., 2:, :2] = False
    elif kind != "whole":
        mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
        visible = visible & mask.bool()[:, None, None]
    out, _ = flash_attention_forward(module, q, k, v, mask, sliding_window=3, softcap=2.0, **extra)
    visible &= torch.ones(5, 5, dtype=torch.bool).triu(-2)
    visible = visible[..., -q.shape[2] :, :]
    want, _ = oracle_attention(module, q, k, v, visible, softcap=2.0)
    assert_exact(out, want)
