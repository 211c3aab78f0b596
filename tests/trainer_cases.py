"""Trainers on tiny local models: what a run logs, its first gradients, its last weights, and the
rows that its layers were differentiated on."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from models import make_twin
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import varstream as vs
from varstream.testing import assert_exact

CHUNK = 7
WORDS = ["<pad>", "<eos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz"]
IDS = {"vocab_size": len(WORDS), "pad_token_id": 0, "eos_token_id": 1}
# float64 models; TRL's own head computes in float32, from hidden states equal to 1e-15
EXACT, FLOAT32_HEAD = 1e-10, 2e-6
COMMON = {
    "per_device_train_batch_size": 2,
    "max_steps": 2,
    "logging_steps": 1,
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}


@dataclass
class Run:
    """One training run.

    ``rows`` are those of each differentiated call of the first layer's MLP, ``real`` the unpadded
    positions of all differentiated calls of the model.
    """

    logs: list[dict[str, float]] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    rows: list[int] = field(default_factory=list)
    real: int = 0
    result: Any = None


class _KeepGradients(TrainerCallback):
    """Keeps what the optimizer is given at the first step."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        if state.global_step == 0:
            self.run.gradients = {
                n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
            }


def tokenizer() -> PreTrainedTokenizerFast:
    vocab = {word: i for i, word in enumerate(WORDS)}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **names)


def saved(model: Any, path: Path) -> Any:
    """The model, put on disk too, where TRL loads reference models from."""
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 1, 0
    model.save_pretrained(path)
    model.config._name_or_path = str(path)
    return model


def saved_twin(path: Path, family: str = "llama", **changes: Any) -> Any:
    """A small float64 model of the tokenizer's vocabulary."""
    return saved(make_twin(family, **IDS, **changes), path)


def documents(count: int, longest: int = 9) -> list[dict[str, Any]]:
    """Ragged token rows; every third has a prompt that isn't trained."""
    rows = []
    for i in range(count):
        ids = [(7 * i + 3 * j) % 26 + 3 for j in range(2 + (5 * i) % (longest - 1))]
        labels = [-100] * 2 + ids[2:] if i % 3 == 0 else ids
        rows.append({"input_ids": ids, "labels": labels, "text": "not an input"})
    return rows


def huggingface(model: Any, path: Path, changes: dict[str, Any], **more: Any) -> Trainer:
    """``transformers.Trainer`` on padded batches of ``documents``."""
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(path), **COMMON | changes),
        train_dataset=documents(16),
        processing_class=tokenizer(),
        data_collator=DataCollatorForSeq2Seq(tokenizer()),
        **more,
    )


def train(model: Any, make: Callable[[Any], Trainer], after: Callable[[Any], Any] = id) -> Run:
    """Train ``model`` under the trainer that ``make`` builds; ``after`` is called with it."""
    run = Run()
    torch.manual_seed(3)
    trainer = make(model)
    trainer.add_callback(_KeepGradients(run))
    trained = trainer.model
    first = next(m for name, m in trained.named_modules() if name.endswith("0.mlp"))

    def count_rows(_: Any, args: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            run.rows.append(math.prod(args[0].shape[:-1]))

    def count_real(_: Any, args: Any, inputs: dict[str, Any]) -> None:
        if torch.is_grad_enabled() and trained.training:
            mask = inputs.get("attention_mask")
            run.real += inputs["input_ids"].numel() if mask is None else int(mask.sum())

    hooks = [
        first.register_forward_pre_hook(count_rows),
        trained.register_forward_pre_hook(count_real, with_kwargs=True),
    ]
    trainer.train()
    for hook in hooks:
        hook.remove()
    run.logs = [
        {k: v for k, v in entry.items() if "time" not in k and "per_second" not in k}
        for entry in trainer.state.log_history
    ]
    run.weights = {n: p.detach().clone() for n, p in trained.named_parameters()}
    run.result = after(trainer)
    return run


def both(
    model: Any,
    make: Callable[[Any], Trainer],
    after: Callable[[Any], Any] = id,
    stream: Callable[[Any], Any] | None = None,
) -> tuple[Run, Run]:
    """The same training of the model as it is and streamed."""
    stream = stream or (lambda m: vs.stream(m, chunk_size=CHUNK))
    dense = train(copy.deepcopy(model), make, after)
    return dense, train(stream(copy.deepcopy(model)), make, after)


def assert_same(dense: Run, streamed: Run, tolerance: float = EXACT) -> None:
    """Equal logs, first gradients and last weights, from chunks of the real tokens."""
    assert streamed.real == dense.real > 0
    assert max(streamed.rows) <= CHUNK < max(dense.rows)
    assert sum(streamed.rows) == streamed.real
    assert len(streamed.logs) == len(dense.logs)
    for ours, theirs in zip(streamed.logs, dense.logs, strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert math.isclose(ours[key], value, rel_tol=tolerance, abs_tol=tolerance), (
                f"{key} at step {theirs['step']}: {ours[key]!r} against {value!r}"
            )
    assert streamed.gradients.keys() == dense.gradients.keys() and dense.gradients
    for name, gradient in dense.gradients.items():
        assert gradient.any(), name
        assert_exact(streamed.gradients[name], gradient, tolerance, name)
    for name, weight in dense.weights.items():
        assert_exact(streamed.weights[name], weight, tolerance, name)


# --- TRL ------------------------------------------------------------------------------------------


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(text))) + text.count("a") for text in completions]


def sentences(count: int) -> list[str]:
    """Ragged sentences of one-letter words."""
    return [" ".join(WORDS[t] for t in row["input_ids"]) for row in documents(count)]


def trl_rows(name: str) -> list[dict[str, Any]]:
    """Examples as the trainer called ``name`` wants them."""
    prompts, first, second = sentences(8), sentences(9)[1:], sentences(11)[3:]
    if name == "SFT":
        return [{"prompt": p, "completion": f" {c}"} for p, c in zip(prompts, first, strict=True)]
    if name == "DPO":
        pairs = zip(prompts, first, second, strict=True)
        return [{"prompt": p, "chosen": f" {c}", "rejected": f" {r}"} for p, c, r in pairs]
    if name == "KTO":
        return [
            {"prompt": p, "completion": f" {c}", "label": i % 3 != 1}
            for i, (p, c) in enumerate(zip(prompts, first, strict=True))
        ]
    return [{"prompt": p} for p in prompts]


TRL_OPTIONS: dict[str, dict[str, Any]] = {
    "SFT": {},
    "DPO": {},
    "KTO": {},
    # completions of both iterations come from the model as it is by then
    "GRPO": {
        "num_generations": 2,
        "max_completion_length": 6,
        "num_iterations": 2,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
    },
}


def trl_trainer(name: str, model: Any, path: Path, changes: dict[str, Any], **more: Any) -> Trainer:
    """TRL's trainer called ``name`` with TRL's defaults but for precision: gradient checkpointing,
    a reference model from disk, its own head."""
    import trl
    from datasets import Dataset

    if name == "GRPO":
        more["reward_funcs"] = reward
    rows = more.pop("rows", None) or trl_rows(name)
    return getattr(trl, f"{name}Trainer")(
        model=model,
        args=getattr(trl, f"{name}Config")(
            output_dir=str(path), **COMMON | TRL_OPTIONS[name] | changes
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        **more,
    )
