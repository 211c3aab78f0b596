"""The recipes: they train, their losses are the formulas of single documents, their check can fail,
and bad arguments are one line."""

import importlib
import re
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import varstream as vs
from varstream.testing import assert_exact, float64_twin

EXAMPLES = Path(__file__).parent.parent / "examples"
RECIPES = ("long_sft", "packed_dpo", "packed_grpo")
HELPERS = ("_text", "_setup", "_packed")
SIZES = {"vocab_size": 300, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16}


@pytest.fixture(scope="module")
def recipes():
    """The recipes and their helpers by name; nothing stays importable."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        yield SimpleNamespace(**{n: importlib.import_module(n) for n in (*HELPERS, *RECIPES)})
    finally:
        sys.path.remove(str(EXAMPLES))
        for name in (*HELPERS, *RECIPES):
            sys.modules.pop(name, None)


def figures(printed):
    """Peaks in MiB, streamed and dense, and the differences that the check found."""
    peaks = [float(x) for x in re.findall(r"([\d.]+) MiB", printed)]
    return peaks, [float(x) for x in re.findall(r"\be?by ([\d.e+-]+)", printed)]


# --- they run, and what they are for comes about --------------------------------------------------


def run(recipe, capfd, *args):
    """What a quick run returns; its memory is small and its gradients are exact."""
    result = recipe.main(["--quick", "--check", *args])
    printed = capfd.readouterr().out
    (streamed, dense), errors = figures(printed)
    assert streamed < dense / 2
    assert len(errors) == 2 and max(errors) <= 1e-10
    return result, printed


def test_long_sft(recipes, capfd):
    (losses, before, after), printed = run(recipes.long_sft, capfd)
    assert len(losses) == 4 and losses[-1] < losses[0] - 0.1 and after < before - 0.1
    assert f"{losses[-1]:.3f}" in printed and f"{after:.3f}" in printed
    shortest, longest = map(int, re.search(r"of (\d+) to (\d+) tokens", printed).groups())
    assert longest == 512 and shortest < 64  # a row, and less than a chunk


def test_packed_dpo(recipes, capfd):
    (before, after), printed = run(recipes.packed_dpo, capfd)
    for pairs in ("trained", "held out"):
        assert before[pairs]["margin"] == 0 and before[pairs]["margins above 0"] == 0.5
        assert after[pairs]["margin"] > 0.05 and after[pairs]["loss"] < before[pairs]["loss"]
    assert after["trained"]["margins above 0"] > 0.8
    assert f"{after['held out']['margin']:.3f}" in printed


def test_packed_grpo(recipes, capfd):
    (rewards, before, after), printed = run(recipes.packed_grpo, capfd, "--steps", "6")
    assert len(rewards) == 6 and after > before + 0.1
    assert f"{before:.3f}" in printed and f"{after:.3f}" in printed
    assert "def __repr__" in printed


# --- losses and gradients are the formulas over single documents ----------------------------------

LENGTHS = [9, 30, 1, 17, 12, 2, 25, 8]  # of prompt and completion, a quarter of it prompt


@pytest.fixture
def twin(recipes):
    options = Namespace(vocab=300, width=32, layers=2, tokens=64)
    model = Qwen3ForCausalLM(recipes._setup.small_config(options))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return float64_twin(model)


def documents(recipes, **constants):
    ids = [torch.randint(300, (n,)).tolist() for n in LENGTHS]
    return [
        recipes._packed.document(
            row[: n // 4], row[n // 4 :], **{name: values[i] for name, values in constants.items()}
        )
        for i, (n, row) in enumerate(zip(LENGTHS, ids, strict=True))
    ]


def completion_logprobs(model, document):
    """Of a document's trained tokens, by the model's own logits; its first is never predicted."""
    ids, labels = (torch.tensor(document[name]) for name in ("input_ids", "labels"))
    logits = model(ids[None], use_cache=False).logits[0]
    return -cross_entropy(logits[:-1], labels[1:], reduction="none")[labels[1:] != -100]


def assert_same(recipes, twin, rows, objective, expected):
    """Summed over rows, the streamed loss and its gradients are those of the tensor `expected`."""
    expected.backward()
    want = {name: p.grad for name, p in twin.named_parameters()}
    assert all(grad.any() for grad in want.values())
    streamed = vs.stream(twin, chunk_size=7)
    loss, found = recipes._packed.gradients(
        streamed, rows, objective, recipes._packed.streamed_logprobs
    )
    assert_exact(loss, expected, 1e-10, "loss")
    for name, grad in want.items():
        assert_exact(found[name], grad, 1e-10, name)


def test_accumulated_tokens_count_the_same(recipes, twin):
    """Rows of unequal fill: the loss is the mean over all their tokens, not over rows."""
    parts = documents(recipes)
    rows = [recipes._packed.packed_row(some, "cpu") for some in (parts[:2], parts[2:7], parts[7:])]
    logp = torch.cat([completion_logprobs(twin, part) for part in parts])
    assert len({int(row.mask.sum()) for row in rows}) == 3
    assert_same(recipes, twin, rows, recipes.long_sft.objective_of(rows), -logp.mean())


def test_preferences_are_of_pairs(recipes, twin):
    row = recipes._packed.packed_row(parts := documents(recipes), "cpu")
    with torch.no_grad():
        sums = torch.stack([completion_logprobs(twin, part).sum() for part in parts])
        row.constants["ref_logp"] = recipes._packed.dense_logprobs(twin, row) + 0.3
        counts = [0.3 * len(completion_logprobs(twin, part)) for part in parts]
        reference = sums + torch.tensor(counts, dtype=torch.float64)
    sums = torch.stack([completion_logprobs(twin, part).sum() for part in parts])
    chosen, rejected = (sums - reference).view(-1, 2).T
    expected = -logsigmoid(recipes.packed_dpo.BETA * (chosen - rejected)).mean()
    assert_same(recipes, twin, [row], recipes.packed_dpo.objective, expected)


def test_samples_are_weighed_by_their_group(recipes, twin):
    """Several rows, ratios that leave the clipping range, one divisor for all."""
    # What the collator makes of Python's numbers is float32.
    advantages = torch.randn(len(LENGTHS)).tolist()
    parts = documents(recipes, advantages=advantages)
    rows = [recipes._packed.packed_row(some, "cpu") for some in (parts[:3], parts[3:])]
    shifts = torch.linspace(-0.4, 0.4, len(LENGTHS), dtype=torch.float64)
    for row, shift in zip(rows, (shifts[:3], shifts[3:]), strict=True):
        with torch.no_grad():
            logp = recipes._packed.dense_logprobs(twin, row)
        shift = shift.repeat_interleave(row.cu_seqlens.diff().long())
        row.constants["old_logp"] = logp + shift
    expected, clipped = 0.0, 0
    for part, advantage, shift in zip(parts, advantages, shifts, strict=True):
        logp = completion_logprobs(twin, part)
        if len(logp):
            ratio = (logp - logp.detach() - shift).exp()
            gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            clipped += int((gain != ratio * advantage).sum())
            expected = expected - gain.mean() / len(parts)
    assert clipped > 0
    assert_same(recipes, twin, rows, recipes.packed_grpo.objective_of(rows), expected)


# --- the data -------------------------------------------------------------------------------------


def test_pairs_differ_in_the_order_of_words_alone(recipes):
    texts = recipes._text.sources(0, 60_000) * 2  # every docstring twice
    tokenizer = recipes._text.train_tokenizer(texts, 400)
    pairs = recipes.packed_dpo.make_pairs(texts, tokenizer, Namespace(seed=0, tokens=200))
    assert len(pairs) > 10 and len({tuple(pair[0]["input_ids"]) for pair in pairs}) == len(pairs)
    originals = {" ".join(words[:30]) for words in recipes._text.docstrings(texts)}
    for chosen, rejected in pairs:
        texts = [tokenizer.decode(part["input_ids"]) for part in (chosen, rejected)]
        assert texts[0] in originals and texts[1] not in originals
        assert sorted(texts[0].split()) == sorted(texts[1].split())
        prompts = [part["input_ids"][: part["labels"].count(-100)] for part in (chosen, rejected)]
        assert prompts[0] == prompts[1] != []
        assert len(chosen["input_ids"]) + len(rejected["input_ids"]) <= 200


def test_groups_stay_together_in_their_order(recipes):
    groups = [
        [recipes._packed.document([i], [2 * i] * n, advantages=i / 2) for n in (3, 1 + i % 5)]
        for i in range(1, 40)
    ]
    rows = recipes._packed.pack(groups, Namespace(tokens=30, seed=0, device="cpu"))
    seen = []
    for row in rows:
        ids, cu = row.inputs["input_ids"][0], row.cu_seqlens.tolist()
        assert len(ids) <= 30
        firsts = ids[cu[:-1]].tolist()
        assert firsts[::2] == firsts[1::2]
        assert [b - a for a, b in zip(cu, cu[1:], strict=False)][::2] == [4] * (len(cu) // 2)
        seen += firsts[::2]
        assert torch.equal(row.constants["advantages"][cu[:-1]] * 2, ids[cu[:-1]].float())
        # What a token predicts is the next one of its document; the last one predicts nothing.
        assert (row.target[[end - 1 for end in cu[1:]]] == -100).all()
        assert torch.equal(row.target[row.mask], ids[1:][row.mask[:-1]])
        assert torch.equal(row.sums(torch.ones(len(ids))), row.cu_seqlens.diff() - 1.0)
    assert sorted(seen) == list(range(1, 40))


@pytest.mark.parametrize(
    "definition, parameters, worth",
    [
        ("def f(a, b):", 2, 1.0),
        ("def f(a, /, b=1, *c, d, **e) -> int:", 3, 1.0),
        ("def f(a, b):", 3, 0.0),  # too few
        ("def f(a, a):", 2, 0.0),  # one name twice
        ("def f(a, b)", 2, 0.0),
        ("def f(a, b:", 2, 0.0),
        ("def f(a, b): return 1", 2, 0.0),  # more than a definition's first line
        ("def f(a, b):\n    x = 1", 2, 0.0),
        ("def f(a, b='\\d'):", 2, 1.0),  # a warning is no error
        ("def f(a\0, b):", 2, 0.0),
        ("def f(" + "(" * 500 + "):", 2, 0.0),
        ("def f(a, b=" + "-" * 20_000 + "1):", 2, 0.0),
    ],
)
@pytest.mark.filterwarnings("error")
def test_reward(recipes, definition, parameters, worth):
    assert recipes.packed_grpo.reward(definition, parameters) == worth


def test_samples_end_with_the_end_token_or_are_worth_nothing(recipes):
    tokenizer = recipes._text.train_tokenizer(["def f(self, x):"], 300)
    end = tokenizer.eos_token_id
    (ids,) = recipes._text.encode(tokenizer, ["(self, x):"])
    completions = [[*ids, end], [*ids, ids[0]], [end]]
    found = recipes.packed_grpo.rewards_of(tokenizer, ["def f"] * 3, completions, 2)
    assert found.tolist() == [1.0, 0.0, 0.0]

    class Model:
        device = torch.device("cpu")
        eval = train = lambda self: self

        def generate(self, input_ids, attention_mask, **options):
            assert options["max_new_tokens"] == 4
            assert options["do_sample"] and options["temperature"] == options["top_p"] == 1.0
            assert options["top_k"] == 0  # the policy itself
            self.asked = input_ids, attention_mask
            new = torch.tensor([[7, 8, end, end], [7, 8, 9, 7], [end, end, end, end]])
            return torch.cat([input_ids, new], dim=1)

    model = Model()
    prompts = [[5], [5, 6, 7], [5, 6]]
    found = recipes.packed_grpo.sample(model, tokenizer, prompts, 4)
    assert found == [[7, 8, end], [7, 8, 9, 7], [end]]
    ids, mask = model.asked  # padded on the left: a completion follows its prompt at once
    assert ids[:, -1].tolist() == [5, 7, 6] and mask.sum(1).tolist() == [1, 3, 2]
    assert mask[:, -1].all()


def test_advantages_are_within_groups(recipes, monkeypatch, twin):
    tokenizer = recipes._text.train_tokenizer(["def f(self, x):"], 300)
    good, poor = (
        [*ids, tokenizer.eos_token_id]
        for ids in recipes._text.encode(tokenizer, ["(self, x):", "(x, x):"])
    )
    completions = [good, poor, good, good, poor, poor, good, good]  # of f, g
    monkeypatch.setattr(recipes.packed_grpo, "sample", lambda *_: completions)
    options = Namespace(group=4, length=9, parameters=2, tokens=60, seed=0, device="cpu")
    model = vs.stream(twin, chunk_size=7)
    rows, mean = recipes.packed_grpo.collect(model, tokenizer, ["def f", "def g"], options)
    assert mean == 5 / 8 and len(rows) > 1
    found = []
    for row in rows:
        starts = row.cu_seqlens[:-1].long()
        found += row.constants["advantages"][starts].tolist()
        want = recipes._packed.streamed_logprobs(model, row)
        assert_exact(row.constants["old_logp"], want)
        assert want.requires_grad and not row.constants["old_logp"].requires_grad
        # Completions are trained, with their end; prompts are not.
        trained = row.sums(torch.ones(len(row.target)))
        assert set(trained.tolist()) <= {len(good), len(poor)}
    want = [0.5, -1.5, 0.5, 0.5], [-0.5, -0.5, 0.5, 0.5]
    scale = torch.tensor(want).std(1) + 1e-4
    want = (torch.tensor(want) / scale[:, None]).flatten()
    assert torch.allclose(torch.tensor(sorted(found)), want.sort().values, atol=2e-3)


def test_constants_know_no_dropout(recipes):
    config = GPT2Config(**SIZES, n_positions=64, bos_token_id=None, eos_token_id=None)
    model = vs.stream(AutoModelForCausalLM.from_config(config).train(), chunk_size=7)
    row = recipes._packed.packed_row(documents(recipes), "cpu")
    first, again = (recipes._packed.fixed_logprobs(model, row) for _ in range(2))
    assert torch.equal(first, again) and not first.requires_grad and model.training
    assert not torch.equal(first, recipes._packed.streamed_logprobs(model, row))


# --- the check can fail ---------------------------------------------------------------------------


@pytest.mark.parametrize("mistake", ["targets", "weights"])
def test_check_sees_a_difference(recipes, monkeypatch, twin, mistake):
    packed = recipes._packed
    row = packed.packed_row(documents(recipes), "cpu")
    objective = recipes.long_sft.objective_of([row])
    packed.check(twin, [row], objective, 7)

    def wrong(model, row):
        if mistake == "targets":  # documents that see each other
            inputs = {"input_ids": row.inputs["input_ids"]}
            return streamed(model, packed.Row(inputs, row.target, {}))
        with torch.no_grad():
            constant = streamed(model, row)
        return constant + 0 * streamed(model, row)  # the value, not the gradient

    streamed = packed.streamed_logprobs
    monkeypatch.setattr(packed, "streamed_logprobs", wrong)
    with pytest.raises(SystemExit, match="packed and dense differ by more than 1e-10"):
        packed.check(twin, [row], objective, 7)


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(**SIZES, n_positions=64, bos_token_id=None, eos_token_id=None),  # dropout
        GraniteConfig(**SIZES, intermediate_size=24, logits_scaling=4.0),
        Gemma2Config(
            **SIZES,
            intermediate_size=24,
            head_dim=8,
            num_key_value_heads=1,
            final_logit_softcapping=0.5,
        ),
    ],
    ids=lambda config: config.model_type,
)
def test_heads_of_other_models(recipes, config):
    model = AutoModelForCausalLM.from_config(config).train()
    row = recipes._packed.packed_row(documents(recipes), "cpu")
    recipes._packed.check(model, [row], recipes.long_sft.objective_of([row]), 7)


def test_check_of_nothing_is_no_check(recipes, twin):
    row = recipes._packed.packed_row(documents(recipes), "cpu")
    with pytest.raises(SystemExit, match="nothing to compare"):
        recipes._packed.check(twin, [row], lambda row, logp: 0 * logp.sum(), 7)


# --- arguments ------------------------------------------------------------------------------------


@pytest.fixture
def folder(recipes, twin, tmp_path):
    """A model's folder with weights and a tokenizer of its own."""
    tokenizer = recipes._text.train_tokenizer(recipes._text.sources(0, 30_000), 300)
    twin.float().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_a_model_of_ones_own(recipes, folder, twin):
    """Weights and tokenizer of a folder; a configuration alone gives neither."""
    parser = recipes._setup.Parser("", {"tokens": 64, "steps": 1, "chunk_size": 8}, {})
    parser.set_defaults(learning_rate=1e-3)
    options = parser.read(["--model", str(folder), "--dtype", "bfloat16"])
    model, tokenizer = recipes._setup.load(parser, options, ["text"])
    assert model.dtype == torch.bfloat16 and model.training
    weight = twin.model.layers[0].mlp.up_proj.weight
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, weight.bfloat16())
    assert tokenizer.eos_token == recipes._text.END and len(tokenizer) == 300

    for path in (folder / "tokenizer.json", folder / "tokenizer_config.json"):
        path.unlink()
    for path in folder.glob("*.safetensors"):
        path.unlink()
    for name in (folder, folder / "config.json"):
        options = parser.read(["--model", str(name)])
        model, tokenizer = recipes._setup.load(parser, options, ["text"])
        assert model.dtype == torch.float32
        assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, weight)
        assert len(tokenizer) < 300  # learned from "text"


@pytest.mark.parametrize("recipe", RECIPES)
def test_in_bfloat16(recipes, recipe, folder, capfd):
    few = ["--quick", "--steps", "1", "--tokens", "256"]
    few += [] if recipe == "long_sft" else ["--warmup", "1"]
    getattr(recipes, recipe).main([*few, "--dtype", "bfloat16", "--model", str(folder)])
    assert "MiB streamed\n" in capfd.readouterr().out  # a dense run of a large model may not fit


@pytest.mark.parametrize(
    "recipe, args, message",
    [
        ("long_sft", ["--steps", "0"], "--steps must be at least 1, got 0"),
        ("long_sft", ["--steps", "many"], "argument --steps: invalid int value: 'many'"),
        ("long_sft", ["--accumulate", "-1"], "--accumulate must be at least 1, got -1"),
        ("long_sft", ["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        ("long_sft", ["--device", "tpu"], "--device tpu can't be used: "),
        ("long_sft", ["--quick", "--tokens", "9999999"], "too much: the whole text is one row"),
        ("long_sft", ["--quick", "--model", "HERE"], "--model HERE: Unrecognized model in HERE"),
        ("long_sft", ["--quick", "--model", "HERE/a.json"], "--model HERE/a.json: "),
        ("long_sft", ["--quick", "--model", "HERE/b.json"], "--model HERE/b.json: It looks like "),
        ("long_sft", ["--quick", "--model", "HERE/c.json"], "--model HERE/c.json: bert has"),
        ("long_sft", ["--quick", "--model", "HERE/d.json"], "has 90 tokens, its tokenizer 257"),
        ("packed_dpo", ["--learning-rate", "0"], "--learning-rate must be above 0 and below 1"),
        ("packed_dpo", ["--warmup", "-1"], "--warmup must be at least 0, got -1"),
        ("packed_dpo", ["--quick", "--tokens", "8"], "--tokens 8 holds 0 pairs of the text"),
        ("packed_grpo", ["--group", "1"], "--group must be at least 2, got 1"),
        ("packed_grpo", ["--quick", "--tokens", "9"], "--tokens must be at least "),
        ("packed_grpo", ["--quick", "--prompts", "99999"], "--prompts must be at most "),
    ],
)
def test_bad_arguments_are_one_line(recipes, recipe, args, message, tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "b.json").write_text("no JSON")
    few = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 90}
    (tmp_path / "c.json").write_text(BertConfig(**few | {"vocab_size": 400}).to_json_string())
    (tmp_path / "d.json").write_text(Qwen3Config(**few).to_json_string())
    with pytest.raises(SystemExit) as exit:
        getattr(recipes, recipe).main([a.replace("HERE", str(tmp_path)) for a in args])
    error = capsys.readouterr().err.replace(str(tmp_path), "HERE")
    assert exit.value.code == 2 and message in error
    assert error.count("\n") == 1 and error.endswith("\n")
