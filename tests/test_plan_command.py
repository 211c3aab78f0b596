"""``varstream plan``: the table, the JSON, and one line for every kind of bad input."""

from __future__ import annotations

import json
import re

import pytest
import torch
from transformers import LlamaConfig
from typer.main import get_command

from varstream.cli import errors
from varstream.cli.plan import app, parse_budget
from varstream.planner import MemoryPlan, plan_memory

CONFIG = LlamaConfig(
    vocab_size=500,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=3000,
)


@pytest.fixture
def folder(tmp_path):
    CONFIG.save_pretrained(tmp_path)
    return tmp_path


def plan(*args: object) -> int:
    return errors.run(get_command(app).main, [str(arg) for arg in args], "varstream plan")


def test_json_is_the_plan(folder, capsys):
    assert plan(folder, "--budget", "20MiB", "--json") == 0
    printed = MemoryPlan(**json.loads(capsys.readouterr().out))
    assert printed == plan_memory(CONFIG, 3000, 20 << 20)
    assert plan(
        folder / "config.json", "--tokens", 700, "--longest", 300, "--dtype", "bfloat16",
        "--optimizer", "sgd", "--chunk-size", 256, "--head-chunk-size", 100, "--json",
    ) == 0  # fmt: skip
    printed = MemoryPlan(**json.loads(capsys.readouterr().out))
    assert printed == plan_memory(
        CONFIG,
        700,
        longest=300,
        dtype=torch.bfloat16,
        optimizer="sgd",
        chunk_size=256,
        head_chunk_size=100,
    )


def test_modes_and_devices_are_the_planners(folder, capsys):
    args = ["--mode", "lora", "--lora-rank", 4, "--lora-targets", "q_proj,v_proj", "--json"]
    assert plan(folder, *args, "--gpu", "4090", "--optimizer-dtype", "float32") == 0
    printed = MemoryPlan(**json.loads(capsys.readouterr().out))
    assert printed == plan_memory(
        CONFIG,
        3000,
        mode="lora",
        lora_rank=4,
        lora_targets=["q_proj", "v_proj"],
        gpu="4090",
        optimizer_dtype=torch.float32,
    )
    assert (printed.budget_bytes, printed.device) == (24 * 10**9, "4090")
    assert plan(folder, "--mode", "frozen", "--trained", "norm", "--device", "cuda", "--json") == 0
    printed = MemoryPlan(**json.loads(capsys.readouterr().out))
    assert printed == plan_memory(CONFIG, 3000, mode="frozen", trained="norm", device="cuda")


def test_a_gpu_of_a_size(folder, capsys):
    assert plan(folder, "--gpu", "80GB", "--mode", "lora", "--chunk-size", 128) == 0
    text = capsys.readouterr().out
    ours = plan_memory(CONFIG, 3000, gpu=80 * 10**9, mode="lora", chunk_size=128)
    assert ours.below_knee and ours.below_knee in text
    for words in ("CUDA context", "fragmentation", "predicted, not yet measured on a GPU"):
        assert words in text
    assert f"largest length: {ours.max_tokens:,}" in text


def test_table(folder, capsys):
    assert plan(folder, "--budget", "20MiB") == 0
    text = capsys.readouterr().out
    ours = plan_memory(CONFIG, 3000, 20 << 20)
    for words in ("layer inputs", "share", f"largest length: {ours.max_tokens:,}", ours.reason):
        assert words in text


def test_tokens_that_do_not_fit_are_an_answer(folder, capsys):
    assert plan(folder, "--budget", "2.5MB") == 0
    assert "does not fit" in capsys.readouterr().out


def test_more_tokens_than_the_model_has_positions(folder, capsys):
    assert plan(folder, "--tokens", 3000, "--budget", "2.5MB") == 0
    assert not re.search("positions:|by memory", capsys.readouterr().out)
    assert plan(folder, "--tokens", 3001, "--budget", "1GiB") == 0
    text = capsys.readouterr().out
    assert "positions: the longest document passes the model's 3,000" in text
    assert re.search(
        r"largest length: [\d,]+ tokens by memory; the model has 3,000 positions", text
    )
    # Documents within the positions: a packed row may be longer than they are.
    assert plan(folder, "--tokens", 9000, "--longest", 3000, "--budget", "1GiB") == 0
    assert not re.search("positions:|by memory", capsys.readouterr().out)
    assert plan(folder, "--json") == 0
    assert json.loads(capsys.readouterr().out)["positions"] == 3000


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--budget", "16 parsecs"], "--budget must be a size such as 16GiB or 800MB"),
        (["--budget", "-1GiB"], "--budget must be a size"),
        (["--budget", "0.1"], "--budget must be at least one byte"),
        (["--budget", "1e400"], "--budget must be finite, got '1e400'"),
        (["--budget", "١٦GiB"], "--budget must be a size"),
        (["--budget", "900kB"], "--budget 900kB is too small: .* even one token needs"),
        (["--tokens", "0"], "invalid value for '--tokens'"),
        (["--longest", "4000"], "--longest 4000 passes the 3000 tokens"),
        (["--dtype", "int8"], "--dtype must be one of float64"),
        (["--optimizer", "lion"], "--optimizer must be one of adamw"),
        (["--chunk-size", "-3"], "--chunk-size must be auto or at least 1, got '-3'"),
        (["--head-chunk-size", "x"], "--head-chunk-size must be auto or at least 1"),
        (["--chunk-size", "²"], "--chunk-size must be auto or at least 1"),
        (["--chunk-size", "9" * 5000], "--chunk-size must be auto or at least 1, got '9999"),
        (["--mode", "dora"], "--mode must be one of full, lora, frozen, got 'dora'"),
        (["--mode", "lora", "--lora-rank", "0"], "invalid value for '--lora-rank'"),
        (["--mode", "lora", "--lora-targets", "c_attn"], "lora_targets names no linear layer"),
        (["--mode", "lora", "--lora-targets", ","], "lora_targets must name something"),
        (["--mode", "frozen", "--trained", "tail"], "trained names no parameter"),
        (["--optimizer-dtype", "int8"], "--optimizer-dtype must be one of float64"),
        (["--device", "tpu"], "--device must be one of cpu, cuda"),
        (["--gpu", "voodoo2"], "--gpu must be a size such as 80GB or one of h200, h100"),
        (["--gpu", "1kB"], "--gpu 1kB is too small: .* even one token needs"),
        (["--nope"], "no such option"),
    ],
)
def test_bad_options(folder, args, message, capsys):
    assert plan(folder, *args) == errors.BAD_INPUT
    refused(capsys, message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "no model_type"),
        ("{", "is no JSON"),
        ('{"model_type": "t5"}', "no causal language model"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "is no valid llama configuration"),
        ('{"model_type": "llama", "quantization_config": {"quant_method": "x"}}', "quantization"),
        ("[" * 100_000, "is no JSON"),
        (None, "config.json doesn't exist"),
    ],
)
def test_bad_configs(tmp_path, text, message, capsys):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    assert plan(tmp_path) == errors.BAD_INPUT
    refused(capsys, message)


@pytest.mark.parametrize("name", ["someone/not-here", "a..b/c", "a--b"])
def test_names_are_never_downloaded(name, capsys):
    assert plan(name) == errors.BAD_INPUT
    refused(capsys, "no model in the local Hugging Face cache")


@pytest.mark.parametrize(
    ("name", "message"),
    [("nothing.json", "nothing.json doesn't exist"), ("x" * 5000, "can't be read: File name too")],
)
def test_names_of_no_file(name, message, capsys):
    assert plan(name) == errors.BAD_INPUT
    refused(capsys, message)


def refused(capsys, message: str) -> None:
    """One line on stderr, nothing on stdout."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert re.match(f"varstream plan: .*{message}.*;", captured.err), captured.err


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1234", 1234),
        ("16GiB", 16 << 30),
        ("16 gib", 16 << 30),
        ("16G", 16 << 30),
        ("16GB", 16 * 10**9),
        ("1.5 MiB", 3 << 19),
        ("2e9", 2 * 10**9),
        ("3TB", 3 * 10**12),
        ("7B", 7),
        (".5GiB", 1 << 29),
        ("1e-3 GB", 10**6),
    ],
)
def test_sizes(text, size):
    assert parse_budget(text) == size
