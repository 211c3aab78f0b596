"""``transformers.Trainer``, unchanged, on a streamed model: the unstreamed trainer's logs,
gradients and weights."""

import copy

import numpy as np
import pytest
import torch
from models import make_model
from trainer_cases import (
    CHUNK,
    IDS,
    WORDS,
    assert_same,
    both,
    documents,
    huggingface,
    saved_twin,
    train,
)

import varstream as vs
from varstream.testing import assert_exact, float64_twin, worst_gradient

pytest.importorskip("accelerate")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    torch.manual_seed(0)
    return saved_twin(tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize(
    "changes",
    [
        {"max_steps": 3},
        {"gradient_accumulation_steps": 3},
        {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 2, "num_train_epochs": 1},
        {"gradient_checkpointing": True},
        {"optim": "adamw_torch", "learning_rate": 1e-3, "weight_decay": 0.1},
        {"label_smoothing_factor": 0.1},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_padded_batches(changes, llama, tmp_path):
    if "num_train_epochs" in changes:  # 16 documents: 10, then a batch of 5 and one of 1
        changes = changes | {"max_steps": -1}
    dense, streamed = both(llama, lambda model: huggingface(model, tmp_path, changes))
    assert_same(dense, streamed)


@pytest.mark.parametrize("bound", [0.5, 1e9])
def test_clipping(bound, llama, tmp_path):
    """The norm before clipping is logged; what the optimizer gets has at most the bound's."""
    changes = {"max_grad_norm": bound, "gradient_accumulation_steps": 2}
    dense, streamed = both(llama, lambda model: huggingface(model, tmp_path, changes))
    assert_same(dense, streamed)
    norm = torch.stack([g.norm() for g in streamed.gradients.values()]).norm().item()
    logged = streamed.logs[0]["grad_norm"]
    assert logged > 0.5 and norm == pytest.approx(min(logged, bound), rel=1e-5)


def metrics(prediction):
    """Accuracy of the next token over the trained positions."""
    chosen, labels = prediction.predictions.argmax(-1)[:, :-1], prediction.label_ids[:, 1:]
    return {"accuracy": float((chosen == labels)[labels != -100].mean())}


def test_evaluation_and_predictions(llama, tmp_path):
    """Metrics between updates, from logits that a streamed model gives where no gradient is."""

    def make(model):
        changes = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 3}
        evaluation = documents(7)[::-1]
        return huggingface(
            model, tmp_path, changes, eval_dataset=evaluation, compute_metrics=metrics
        )

    dense, streamed = both(llama, make, lambda trainer: trainer.predict(documents(5)))
    assert_same(dense, streamed)
    assert sum("eval_accuracy" in entry for entry in streamed.logs) == 2
    got, want = streamed.result, dense.result
    assert got.predictions.shape == (5, 9, len(WORDS))
    for i, document in enumerate(documents(5)):  # padding predicts nothing
        real = i, slice(len(document["input_ids"]))
        np.testing.assert_allclose(got.predictions[real], want.predictions[real], 1e-10, 1e-10)
    assert got.metrics["test_accuracy"] == want.metrics["test_accuracy"]


def test_checkpoints_resume(llama, tmp_path):
    """A run stopped after two of four steps goes on from its checkpoint to the same weights."""

    def resumed(model, steps, path, **options):
        changes = {"max_steps": steps, "save_strategy": "steps", "save_steps": 2}
        trainer = huggingface(model, path, changes)
        trainer.train(**options)
        return trainer

    want = train(copy.deepcopy(llama), lambda m: huggingface(m, tmp_path / "a", {"max_steps": 4}))
    model = vs.stream(copy.deepcopy(llama), chunk_size=CHUNK)
    resumed(model, 2, tmp_path / "b")
    assert (tmp_path / "b/checkpoint-2/model.safetensors").exists()
    model = vs.stream(copy.deepcopy(llama), chunk_size=CHUNK)
    trainer = resumed(model, 4, tmp_path / "b", resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    for name, parameter in vs.unstream(model).named_parameters():
        assert_exact(parameter, want.weights[name], 1e-10, name)


def test_bf16_autocast(tmp_path):
    """Under ``bf16=True`` gradients are as near to float64 ones as the unstreamed trainer's."""
    plain = make_model("qwen3", **IDS)
    mixed = {"bf16": True, "gradient_checkpointing": True}
    exact = train(float64_twin(plain), lambda model: huggingface(model, tmp_path, {}))
    dense, streamed = both(plain, lambda model: huggingface(model, tmp_path, mixed))
    assert sum(streamed.rows) == streamed.real == dense.real
    worst = [worst_gradient(run.gradients.items(), exact.gradients) for run in (dense, streamed)]
    assert worst[0][1] > 1e-3 and worst[1][1] <= 2 * worst[0][1], worst
    for ours, theirs in zip(streamed.logs[:2], dense.logs[:2], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=5e-3)


def test_the_model_comes_back_as_it_was(llama, tmp_path):
    """After training, ``unstream`` gives a plain model with the trained weights, and a saved one
    loads as a plain one."""
    model = vs.stream(copy.deepcopy(llama), chunk_size=CHUNK)
    trainer = huggingface(model, tmp_path, {"gradient_checkpointing": True})
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    ids = torch.randint(3, 29, (2, 9))
    with torch.no_grad():
        want = model(ids).logits
        plain = vs.unstream(model)
        assert "forward" not in plain.__dict__
        assert_exact(plain.eval()(ids).logits, want)
        loaded = type(plain).from_pretrained(tmp_path / "saved", dtype=torch.float64)
        assert_exact(loaded(ids).logits, want, 1e-6)  # the shipped class has norms in float32
