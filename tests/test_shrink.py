"""Small copies of configurations keep the architecture, float64 twins compute what the model does,
and families verify as exact on them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

pytest.importorskip("transformers")

from models import FAMILIES, VOCAB, make_model
from transformers import (
    CohereConfig,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    LlamaConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from varstream.testing import float64_twin, relative_error
from varstream.testing.shrink import describe_shrunk, shrink_config
from varstream.testing.verify import ConfigError, verify

QWEN3 = Qwen3Config(
    hidden_size=1024,
    intermediate_size=3072,
    num_attention_heads=16,
    num_key_value_heads=8,
    tie_word_embeddings=True,
)
QUICK = {"tokens": 37, "chunk_size": 7}

# As published, and what the report says is kept.
PUBLISHED = {
    "llama3": (
        LlamaConfig(vocab_size=128256, intermediate_size=14336, num_key_value_heads=8),
        ["4 query heads a key head", "untied head", "rotary embedding: default"],
    ),
    "qwen2": (
        Qwen2Config(use_sliding_window=True, sliding_window=64, num_key_value_heads=8),
        ["sliding window in some layers", "q_proj biases", "k_proj biases", "v_proj biases"],
    ),
    "gemma2": (
        Gemma2Config(),
        [
            "sliding window in some layers",
            "tied embeddings",
            "norms after attention and MLP",
            "embeddings scaled",
            "softcap of scores",
            "softcap of logits",
        ],
    ),
    "gemma3": (
        Gemma3TextConfig(),
        ["q and k norms", "rotary embedding: default, parameters by layer type"],
    ),
    "phi4_mini": (
        Phi3Config(
            hidden_size=3072,
            num_attention_heads=24,
            num_key_value_heads=8,
            tie_word_embeddings=True,
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0] * 48,
                "long_factor": [1.5] * 48,
                "original_max_position_embeddings": 4096,
            },
            max_position_embeddings=131072,
        ),
        ["q, k and v in one projection", "rotary embedding: longrope, 0.75 of each head"],
    ),
    "smollm3": (SmolLM3Config(), ["rotary embedding: default, not in every layer"]),
    "olmo2": (Olmo2Config(), ["q and k norms", "norms after attention and MLP"]),
    "granite": (
        GraniteConfig(
            num_key_value_heads=8,
            embedding_multiplier=12.0,
            residual_multiplier=0.22,
            attention_multiplier=0.0078125,
            logits_scaling=16.0,
        ),
        ["embeddings scaled", "residuals scaled", "logits scaled"],
    ),
    "gpt2": (
        GPT2Config(),
        ["q, k and v in one projection", "no rotary embedding", "c_attn biases", "c_fc biases"],
    ),
    "mixtral": (
        MixtralConfig(num_key_value_heads=8, output_router_logits=True),
        ["4 query heads a key head", "4 experts, 2 a token", "router loss"],
    ),
    "qwen3_moe": (
        Qwen3MoeConfig(head_dim=128, mlp_only_layers=[2], output_router_logits=True),
        ["q and k norms", "4 experts, 2 a token", "router loss"],
    ),
    "cohere": (CohereConfig(use_qk_norm=True), ["logits scaled", "q and k norms"]),
    "deepseek_v3": (DeepseekV3Config(), ["keys and values of low rank", "8 experts, 2 a token"]),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_families_are_exact_and_what_is_kept_is_told(name):
    config, words = PUBLISHED[name]
    report = verify(config, **QUICK)
    assert report.exact, report.worst
    assert set(words) <= set(report.kept), report.kept


# --- the small copy -------------------------------------------------------------------------------


def test_ratios_are_kept():
    before = QWEN3.to_dict()
    small = shrink_config(QWEN3)
    assert QWEN3.to_dict() == before
    assert type(small) is Qwen3Config
    assert small.num_attention_heads == 2 * small.num_key_value_heads == 4
    assert small.head_dim * small.num_attention_heads == 2 * small.hidden_size
    assert small.intermediate_size == 3 * small.hidden_size
    assert small.num_hidden_layers == 2 and small.vocab_size == 61
    assert small.tie_word_embeddings


def test_each_kind_of_layer_is_kept_and_windows_shrink():
    config = Qwen2Config(use_sliding_window=True, sliding_window=4096, max_window_layers=28)
    small = shrink_config(config)
    assert small.layer_types == ["full_attention", "sliding_attention"]
    assert small.num_hidden_layers == 2 and small.sliding_window == 5
    only_windows = Qwen2Config(use_sliding_window=True, sliding_window=3, max_window_layers=0)
    small = shrink_config(only_windows)
    assert small.layer_types == ["sliding_attention"] * 2 and small.sliding_window == 3


def test_rotary_lists_and_token_ids_fit_the_copy():
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "short_factor": [1.0] * 64,
        "long_factor": [2.0] * 64,
        "original_max_position_embeddings": 1024,
    }
    config = LlamaConfig(rope_parameters=rope, pad_token_id=31999, bos_token_id=1)
    small = shrink_config(config)
    assert small.rope_parameters["rope_type"] == "longrope"
    assert small.rope_parameters["short_factor"] == [1.0] * (small.head_dim // 2)
    assert (small.pad_token_id, small.bos_token_id) == (60, 0)
    assert verify(config, **QUICK).exact


def test_a_small_model_stays_as_it_is():
    config = shrink_config(LlamaConfig(num_key_value_heads=8))
    assert shrink_config(config).to_dict() == config.to_dict()


def test_one_key_head_for_many_queries():
    small = shrink_config(LlamaConfig(num_attention_heads=32, num_key_value_heads=1))
    assert (small.num_attention_heads, small.num_key_value_heads) == (32, 1)


def test_each_kind_of_layer_of_a_mixture_is_kept():
    config = Qwen3MoeConfig(mlp_only_layers=[3], decoder_sparse_step=2, num_experts=128)
    small = shrink_config(config)
    assert small.mlp_only_layers == [0] and small.decoder_sparse_step == 1
    assert (small.num_hidden_layers, small.num_experts, small.num_experts_per_tok) == (2, 4, 2)
    assert small.moe_intermediate_size == round(small.hidden_size * 768 / 2048)
    small = shrink_config(DeepseekV3Config())
    assert (small.num_hidden_layers, small.first_k_dense_replace) == (2, 1)
    assert (small.n_routed_experts, small.n_group, small.topk_group) == (8, 2, 2)
    assert small.qk_head_dim == small.qk_nope_head_dim + small.qk_rope_head_dim


def test_names_of_gpt2():
    config = GPT2Config(n_inner=1536)
    small = shrink_config(config)
    assert (small.n_layer, small.n_head, small.n_embd, small.n_inner) == (2, 2, 32, 64)
    assert small.n_positions == 1024 and "rope_parameters" not in small.to_dict()
    assert describe_shrunk(config, small)["n_layer"] == (12, 2)


def test_layers_without_rotary_embedding_and_scales_of_scores_are_kept():
    small = shrink_config(SmolLM3Config())
    assert small.no_rope_layers == [1, 0] and len(small.layer_types) == 2
    small = shrink_config(Gemma3TextConfig())
    assert small.layer_types == ["sliding_attention", "full_attention"]
    assert small.rope_parameters.keys() == {"sliding_attention", "full_attention"}
    assert small.query_pre_attn_scalar == small.head_dim == 16


# --- float64 twins --------------------------------------------------------------------------------


def _oss():
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 5}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0}
    config = GptOssConfig(vocab_size=VOCAB, **sizes, **heads, **experts)
    return GptOssForCausalLM(config)


@pytest.mark.parametrize("name", [*FAMILIES, "gpt_oss"])
def test_twins_compute_what_the_model_does(name):
    """But for the classes' own casts to float32, which the twin has not."""
    model = (_oss() if name == "gpt_oss" else make_model(name)).double().eval()
    model.set_attn_implementation("eager")
    model.config._experts_implementation = "eager"
    ids = torch.randint(VOCAB, (1, 19))
    twin = float64_twin(model)
    with torch.no_grad():
        want, got = (m(input_ids=ids, use_cache=False).logits for m in (model, twin))
    assert relative_error(got, want) < 2e-6
    assert name == "gpt2" or not torch.equal(got, want)  # GPT-2 casts nothing


def test_a_twin_that_would_not_be_exact_is_refused(monkeypatch):
    """A cast where a twin can't take it out."""
    right = LlamaDecoderLayer.forward
    monkeypatch.setattr(
        LlamaDecoderLayer,
        "forward",
        lambda self, x, **rest: right(self, x, **rest).float().double(),
    )
    with pytest.raises(ValueError, match=r"model\.layers\.0 computes in a lower dtype by itself"):
        float64_twin(make_model())
    with pytest.raises(ConfigError, match="this model has no exact copy to compare with: model"):
        verify(LlamaConfig(), **QUICK)


def test_an_argument_of_attention_that_a_twin_does_not_know_is_refused():
    model = make_model()
    with pytest.raises(ValueError, match="LlamaAttention uses position_bias, unknown to a"):
        float64_twin(model)(torch.zeros(1, 3, dtype=torch.int64), position_bias=torch.zeros(1))


def test_a_twin_leaves_generators_alone():
    model = make_model("gpt2", attn_pdrop=0.1)
    state = torch.get_rng_state()
    float64_twin(model)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_a_twin_are_twins_of_their_own(copier):
    twin = float64_twin(make_model())
    again, ids = copier(twin), torch.randint(VOCAB, (1, 7))
    with torch.no_grad():
        want = twin(ids).logits
        twin.model.norm.weight.zero_()
        assert torch.equal(again(ids).logits, want)
