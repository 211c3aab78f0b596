"""``varstream verify``: exact models pass, inexact ones fail, bad input is one line."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers")

from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from typer.testing import CliRunner

from varstream.cli import app
from varstream.streaming import UnsupportedModelError, layer_call, recompute
from varstream.testing.verify import ConfigError, verify

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
LLAMA = LlamaConfig(num_key_value_heads=8, rope_parameters=LLAMA3_ROPE)
QWEN3 = Qwen3Config(
    hidden_size=1024,
    intermediate_size=3072,
    num_attention_heads=16,
    num_key_value_heads=8,
    tie_word_embeddings=True,
)
QUICK = {"tokens": 37, "chunk_size": 7}


def start(*args):
    return CliRunner().invoke(app, ["verify", *map(str, args)])


@pytest.fixture
def config_file(tmp_path):
    """Writes its argument as config.json and returns the path."""

    def write(content):
        path = tmp_path / "config.json"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(json.dumps(content))
        return path

    return write


# --- the verdict ----------------------------------------------------------------------------------


def test_exact_on_the_command_line(config_file):
    result = start(config_file(LLAMA.to_dict()), "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["exact"] and report["worst"]["error"] <= 1e-12
    assert len(report["cases"]) == 6
    assert {"packed, 1", "packed, 97", "left-padded, 7"} <= set(report["cases"])
    assert report["gradients"].keys() == report["shapes"].keys()
    assert {1, 2, 3, 67} <= set(report["lengths"]) and sum(report["lengths"]) == 97
    assert report["shrunk"]["num_hidden_layers"] == [32, 2]


VARIANTS = {
    "llama_mha": LlamaConfig(),
    "llama_tied_biases": LlamaConfig(
        tie_word_embeddings=True, attention_bias=True, mlp_bias=True, num_key_value_heads=4
    ),
    "qwen2": Qwen2Config(num_key_value_heads=4),
    "qwen2_window": Qwen2Config(use_sliding_window=True, sliding_window=9, max_window_layers=1),
    "qwen3_bias_mqa": Qwen3Config(attention_bias=True, num_key_value_heads=1),
    "one_layer": Qwen3Config(num_hidden_layers=1),
    "llama_yarn": LlamaConfig(
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    ),
    "llama_linear_wide_heads": LlamaConfig(
        head_dim=192,
        rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    ),
    # One key a window: gradients of q and k are zero but for rounding.
    "qwen2_window_of_one": Qwen2Config(
        use_sliding_window=True, sliding_window=1, max_window_layers=0
    ),
}


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_exact_variants(config):
    report = verify(config, **QUICK)
    assert report.worst[1].error <= 1e-12, report.worst
    assert report.exact


def test_same_seed_same_report_and_the_generator_is_untouched():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = (verify(QWEN3, **QUICK, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), state)


def test_progress_counts_every_step():
    seen = []
    report = verify(QWEN3, **QUICK, progress=lambda *step: seen.append(step))
    assert [number for _, number, _ in seen] == list(range(len(seen)))
    assert {total for *_, total in seen} == {len(seen)} == {len(report.cases) + 3}


def test_an_inexact_layer_is_found(config_file, monkeypatch):
    """A window one key too wide, as an off-by-one would make it."""
    monkeypatch.setattr(layer_call, "_window", lambda keys: (-1, -1) if keys is None else (keys, 0))
    config = Qwen2Config(use_sliding_window=True, sliding_window=5, max_window_layers=1)
    result = start(config_file(config.to_dict()), "--tokens", 37, "--chunk-size", 7)
    assert result.exit_code == 1
    assert result.stdout.strip().splitlines()[-1].startswith("NOT exact: worst")


def test_a_dropped_chunk_is_found(monkeypatch):
    """A backward that leaves a chunk out: the loss stays right."""
    right = recompute._backward_chunk

    def wrong(work, keys, chunk, *others):
        if chunk.plan.begin != 7:
            right(work, keys, chunk, *others)

    monkeypatch.setattr(recompute, "_backward_chunk", wrong)
    report = verify(QWEN3, **QUICK)
    assert not report.exact and report.loss.error <= 1e-12


def test_nothing_to_compare_is_no_verdict():
    with pytest.raises(ConfigError, match="every gradient of this model is zero"):
        verify(LlamaConfig(vocab_size=1), **QUICK)


def test_the_largest_chunk_there_is():
    assert verify(QWEN3, tokens=37, chunk_size=2**63 - 1).exact
    with pytest.raises(ValueError, match="chunk_size must fit an int of 64 bits"):
        verify(QWEN3, tokens=37, chunk_size=10**30)


def test_a_chunk_past_64_bits_on_the_command_line(tmp_path):
    QWEN3.save_pretrained(tmp_path)
    run = [sys.executable, "-m", "varstream", "verify", str(tmp_path), "--chunk-size", "9" * 30]
    result = subprocess.run(run, capture_output=True, text=True)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1


def test_one_wrong_gradient_is_found(monkeypatch):
    """The rest exact to rounding: the verdict is that of the worst parameter."""
    from varstream.testing import verify as module

    right = module._streamed

    def wrong(twin, case, documents):
        loss, gradients = right(twin, case, documents)
        if case.form == "left-padded":
            gradients["model.norm.weight"] *= 1 + 1e-9
        return loss, gradients

    monkeypatch.setattr(module, "_streamed", wrong)
    report = verify(QWEN3, **QUICK)
    assert not report.exact
    name, worst = report.worst
    assert (name, worst.case) == ("model.norm.weight", "left-padded, 7")
    assert worst.error == pytest.approx(1e-9, rel=1e-3)
    assert verify(QWEN3, **QUICK, tolerance=1e-8).exact


def test_table(config_file):
    result = start(config_file(QWEN3.to_dict()), "--tokens", 37, "--chunk-size", 7)
    assert result.exit_code == 0
    assert "layers.1.self_attn.q_norm" in result.stdout and "(the loss)" in result.stdout
    assert result.stdout.strip().splitlines()[-1].startswith("exact: worst ")
    assert result.stderr == ""  # no bar without a terminal


# --- bad input ------------------------------------------------------------------------------------

UNUSABLE = {
    "no_json": (b"{nope", "is no JSON"),
    "binary": (b"\xff\xfe\x00", "is no JSON"),
    "list": ([1, 2], "has no model_type, so it is no model's configuration; give"),
    "other_json": ({"name": "package"}, "has no model_type"),
    "bert": ({"model_type": "vit"}, "has model type 'vit', no causal language model of"),
    "words": ({"model_type": "llama", "hidden_size": "wide"}, "is no valid llama configuration"),
    "heads": (
        {
            "model_type": "llama",
            "num_attention_heads": 6,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "hidden_size": 48,
        },
        "must be a multiple of num_key_value_heads, got 6 and 4",
    ),
    "nothing": (
        {"model_type": "qwen2", "num_hidden_layers": 0},
        "config.num_hidden_layers must be >= 1",
    ),
    "window": (
        {
            "model_type": "qwen2",
            "use_sliding_window": True,
            "sliding_window": 0,
            "max_window_layers": 0,
        },
        "sliding_window is 0; it must be None or at least 1",
    ),
    "activation": ({"model_type": "llama", "hidden_act": "wow"}, "builds no model of this config"),
    "several_parts": ({"model_type": "gemma3"}, "give the config.json of its gemma3_text"),
    "no_attention": ({"model_type": "mamba"}, "a mamba has no num_attention_heads"),
    "positions": (
        {"model_type": "gpt2", "n_positions": 32},
        "the model has 32 positions; give fewer",
    ),
}


@pytest.mark.parametrize(("content", "message"), UNUSABLE.values(), ids=UNUSABLE)
def test_unusable_configurations_are_one_line(content, message, config_file):
    path = config_file(content)
    result = start(path)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"varstream verify: {path}") and message in line


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/such/config.json", "no/such/config.json doesn't exist; give a model's config.json"),
        ("org/model", "org/model is no file here and no model in the local Hugging Face cache"),
    ],
)
def test_nothing_of_that_name(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    result = start(name)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"varstream verify: {message}")
    assert len(result.stderr.splitlines()) == 1


def test_a_folder_without_a_configuration(tmp_path):
    result = start(tmp_path)
    assert result.exit_code == 2
    assert "config.json doesn't exist; give" in result.stderr


def test_a_model_in_the_local_cache_and_a_folder(tmp_path, monkeypatch, config_file):
    from varstream.cli.config import read_config

    wanted = read_config(str(config_file(QWEN3.to_dict()).parent)).to_dict()
    snapshot = tmp_path / "models--org--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(QWEN3.to_dict()))
    (tmp_path / "models--org--model" / "refs").mkdir()
    (tmp_path / "models--org--model" / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert read_config("org/model").to_dict() == wanted == QWEN3.to_dict()


def test_needs_transformers(monkeypatch):
    from varstream.cli import config as module

    monkeypatch.setattr(module, "find_spec", lambda name: None)
    result = start("x")
    assert result.exit_code == 2
    assert result.stderr == "varstream verify: needs transformers; pip install transformers\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 31}, "tokens must be >= 32, got 31"),
        ({"tokens": 40.0}, "tokens must be an int, got float"),
        ({"chunk_size": 0}, "chunk_size must be >= 1, got 0"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"tolerance": float("nan")}, "tolerance must be finite, got nan"),
    ],
)
def test_arguments_of_the_function(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        verify(QWEN3, **change)


def test_function_names_what_it_does_not_understand():
    with pytest.raises(UnsupportedModelError, match="sliding_window is 0"):
        verify(MistralConfig(sliding_window=0), **QUICK)
