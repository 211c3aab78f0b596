"""TRL's SFT, DPO, GRPO and KTO trainers, unchanged, on a streamed model.

Gradient checkpointing is on and the head is called past the model's own forward, as TRL has it.
"""

import copy

import pytest
import torch
from models import make_model
from trainer_cases import (
    CHUNK,
    EXACT,
    FLOAT32_HEAD,
    IDS,
    assert_same,
    both,
    documents,
    saved,
    saved_twin,
    train,
    trl_rows,
    trl_trainer,
)

import varstream as vs
from varstream.integrations import trl as hook
from varstream.testing import float64_twin, worst_gradient

pytest.importorskip("trl")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    torch.manual_seed(0)
    return saved_twin(tmp_path_factory.mktemp("qwen3"), "qwen3")


@pytest.mark.parametrize(
    "name, changes",
    [
        ("SFT", {"max_steps": 3, "gradient_accumulation_steps": 2}),
        ("SFT", {"packing": True, "max_length": 24}),
        ("SFT", {"packing": True, "packing_strategy": "wrapped", "max_length": 11}),
        ("SFT", {"padding_free": True, "max_length": None, "gradient_accumulation_steps": 2}),
        ("SFT", {"completion_only_loss": False, "loss_type": "dft"}),
        ("DPO", {"max_steps": 3, "gradient_accumulation_steps": 2}),
        ("DPO", {"precompute_ref_log_probs": True}),
        ("DPO", {"loss_type": ["sigmoid", "ipo"], "use_weighting": True, "max_length": 9}),
        ("GRPO", {}),
        ("GRPO", {"beta": 0.1, "entropy_coef": 0.1, "temperature": 0.8}),
        ("KTO", {"max_steps": 3}),
        ("KTO", {"precompute_ref_log_probs": True, "gradient_accumulation_steps": 2}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "defaults",
)
def test_trainers(name, changes, qwen3, tmp_path):
    dense, streamed = both(qwen3, lambda model: trl_trainer(name, model, tmp_path, changes))
    assert_same(dense, streamed, FLOAT32_HEAD)
    if name == "GRPO":
        assert streamed.logs[0]["completions/mean_length"] > 1
        assert streamed.logs[0]["reward"] != streamed.logs[2]["reward"]  # sampled again


@pytest.mark.parametrize("name", ["SFT", "DPO", "GRPO", "KTO"])
def test_with_our_head_installed(name, qwen3, tmp_path):
    """Both runs take their log-probabilities from ``vs.token_logprobs``, in float64 throughout."""
    with hook.installed():
        dense, streamed = both(qwen3, lambda model: trl_trainer(name, model, tmp_path, {}))
    assert_same(dense, streamed, EXACT)


@pytest.mark.parametrize("name", ["SFT", "DPO", "GRPO", "KTO"])
def test_trls_defaults_are_bf16(name, tmp_path):
    """TRL trains in bfloat16 autocast unless told not to: gradients are as near to float64 ones as
    the unstreamed trainer's."""
    plain = saved(make_model("qwen3", **IDS), tmp_path / "model")
    one, mixed = {"max_steps": 1}, {"max_steps": 1, "bf16": None}
    exact = train(float64_twin(plain), lambda model: trl_trainer(name, model, tmp_path, one))
    dense, streamed = both(plain, lambda model: trl_trainer(name, model, tmp_path, mixed))
    assert max(streamed.rows) <= CHUNK and sum(streamed.rows) == streamed.real == dense.real
    worst = [worst_gradient(run.gradients.items(), exact.gradients) for run in (dense, streamed)]
    assert worst[0][1] > 1e-3 and worst[1][1] <= 2 * worst[0][1], worst
    assert streamed.logs[0]["loss"] == pytest.approx(dense.logs[0]["loss"], rel=1e-2, abs=1e-3)


def test_a_streamed_reference_model(qwen3, tmp_path):
    """DPO against another model, streamed too: without gradients its own forward runs."""
    torch.manual_seed(1)
    from datasets import Dataset

    other = saved_twin(tmp_path / "other", "qwen3")
    changes = {"eval_strategy": "steps", "eval_steps": 1}
    evaluation = Dataset.from_list(trl_rows("DPO"))

    def run(change):
        def make(model):
            reference = change(copy.deepcopy(other))
            return trl_trainer(
                "DPO", model, tmp_path, changes, ref_model=reference, eval_dataset=evaluation
            )

        return train(change(copy.deepcopy(qwen3)), make)

    dense, streamed = run(lambda model: model), run(lambda m: vs.stream(m, chunk_size=CHUNK))
    assert_same(dense, streamed, FLOAT32_HEAD)
    assert sum("eval_rewards/margins" in entry for entry in streamed.logs) == 2


def test_packed_rows_that_are_tokens_already(qwen3, tmp_path):
    """Documents of one token among them, and labels of the data set's own."""
    rows = [{k: row[k] for k in ("input_ids", "labels")} for row in documents(12, longest=8)]
    rows += [{"input_ids": [5], "labels": [5]}] * 6
    changes = {"packing": True, "max_length": 16}
    dense, streamed = both(
        qwen3, lambda model: trl_trainer("SFT", model, tmp_path, changes, rows=rows)
    )
    assert_same(dense, streamed, FLOAT32_HEAD)


def test_after_training(qwen3, tmp_path):
    """TRL leaves its own forward around ours, which ``unstream`` won't throw away; a second trainer
    takes the model as it is, and saved it is a plain one."""
    model = vs.stream(copy.deepcopy(qwen3), chunk_size=CHUNK)
    for name in ("SFT", "KTO"):
        trainer = trl_trainer(name, model, tmp_path, {"max_steps": 1})
        trainer.train()
    with pytest.raises(ValueError, match="replaced after vs.stream"):
        vs.unstream(model)
    trainer.save_model(tmp_path / "saved")
    plain = type(model).from_pretrained(tmp_path / "saved", dtype=torch.float64)
    assert "forward" not in plain.__dict__
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
