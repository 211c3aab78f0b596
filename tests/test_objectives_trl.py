"""Objectives against TRL's own loss code, which runs here on stand-ins for its trainers.

Each trainer's loss method is bound to a namespace that holds the options it reads, and its model is
replaced by one that hands out given log-probabilities padded to (B, T). Only what surrounds CPO's
and ORPO's pair losses, the chosen sequences' likelihood, is restated: TRL forms it from logits
inside the model call.
"""

import os
from collections import defaultdict
from types import SimpleNamespace

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import pytest
import torch
from objective_cases import batch
from torch.nn.utils.rnn import pad_sequence
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, SFTTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from varstream import objectives
from varstream.testing import assert_exact

LENGTHS = [5, 3, 8, 7, 2, 6]


def assert_same(d, ours, theirs, tolerance=1e-12):
    assert_exact(ours, theirs.to(ours.dtype), tolerance, "loss")
    (a,), (b,) = (torch.autograd.grad(loss, d.logp) for loss in (ours, theirs))
    assert_exact(a, b, tolerance, "gradient")


def padded(d, values):
    """(N,) -> (B, T), zeros behind."""
    return pad_sequence(values.split(d.lengths), batch_first=True)


def problem():
    """Every sequence has trained tokens: TRL divides by zero in places where we don't."""
    d = batch(LENGTHS, 0.7)
    d.mask[d.cu[:-1].long()] = True
    return d


def accelerator():
    return SimpleNamespace(
        device=torch.device("cpu"),
        num_processes=1,
        sync_gradients=True,
        parallelism_config=None,
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction: x,
    )


def stand_in(**options):
    """What every loss method touches beside its own options."""
    return SimpleNamespace(
        accelerator=accelerator(),
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        current_gradient_accumulation_steps=1,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **options,
    )


def model_of(logp, mask):
    """A model with a fused head: log-probabilities (B, T), 0 where there is no label."""
    outputs = SimpleNamespace(
        log_probs=torch.where(mask, logp, 0.0),
        entropy=torch.zeros_like(logp),
        mean_logits=torch.zeros_like(logp),
        is_top1=torch.zeros_like(mask),
        label_mask=mask,
    )
    return lambda **_: outputs


def shifted(mask):
    """(B, T) mask of log-probabilities -> (B, T+1) mask of tokens, as TRL's batches hold it."""
    return torch.nn.functional.pad(mask, (1, 0)).long()


# --- likelihood -----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [None, 50])
@pytest.mark.parametrize("loss_type, objective", [("nll", "sft"), ("dft", "dft")])
def test_sft(loss_type, objective, count):
    d = problem()
    args = SimpleNamespace(loss_type=loss_type, average_tokens_across_devices=False, max_length=9)
    trainer = stand_in(args=args, compute_loss_func=None, label_smoother=None)
    mask = padded(d, d.mask)
    inputs = {"labels": mask.long(), "attention_mask": mask.long()}
    theirs = SFTTrainer.compute_loss(
        trainer, model_of(padded(d, d.logp), mask), inputs, num_items_in_batch=count
    )
    assert_same(d, getattr(objectives, objective)(d.logp, d.mask, normalizer=count), theirs)


# --- preference -----------------------------------------------------------------------------------


def packed(d):
    return d.logp, d.mask, d.cu


@pytest.mark.parametrize("loss_type", ["sigmoid", "sigmoid_norm", "ipo"])
@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_dpo(loss_type, beta):
    d = problem()
    theirs = trl_dpo(d, loss_type, beta)
    if loss_type == "ipo":
        ours = objectives.ipo(*packed(d), ref_logp=d.ref, beta=beta)
    else:
        means = loss_type == "sigmoid_norm"
        ours = objectives.dpo(*packed(d), ref_logp=d.ref, beta=beta, average_log_prob=means)
    assert_same(d, ours, theirs)


def trl_dpo(d, loss_type, beta):
    trainer = stand_in(
        beta=beta,
        loss_types=[loss_type],
        loss_weights=[1.0],
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        label_smoothing=0.0,
        use_weighting=False,
    )
    # TRL puts all chosen sequences before all rejected ones
    order = torch.tensor([*range(0, len(LENGTHS), 2), *range(1, len(LENGTHS), 2)])
    mask, logp, ref = (padded(d, v)[order] for v in (d.mask, d.logp, d.ref))
    ref_chosen, ref_rejected = (ref * mask).sum(1).chunk(2)
    tokens = shifted(mask)
    inputs = {
        "completion_mask": tokens,
        "input_ids": tokens,
        "attention_mask": tokens,
        "ref_chosen_logps": ref_chosen,
        "ref_rejected_logps": ref_rejected,
    }
    return DPOTrainer._compute_loss(trainer, model_of(logp, mask), inputs, return_outputs=False)


def pair_scores(d, means):
    values = [s.mean() if means else s.sum() for s in d.sequences(d.logp)]
    return torch.stack(values[::2]), torch.stack(values[1::2])


def restated_nll(d, mask=None):
    """Cross-entropy of the chosen sequences' labels, averaged over their tokens."""
    return -torch.cat(d.sequences(d.logp, mask)[::2]).mean()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("loss_type", ["sigmoid", "simpo"])
def test_cpo_and_simpo(loss_type, smoothing):
    d = problem()
    trainer = stand_in(
        alpha=0.0, beta=1.4, loss_type=loss_type, simpo_gamma=0.6, label_smoothing=smoothing
    )
    losses, *_ = CPOTrainer.cpo_loss(trainer, *pair_scores(d, loss_type == "simpo"))
    theirs = losses.mean() + 0.3 * restated_nll(d)
    options = {"beta": 1.4, "alpha": 0.3, "label_smoothing": smoothing}
    if loss_type == "simpo":
        ours = objectives.simpo(*packed(d), gamma=0.6, **options)
    else:
        ours = objectives.cpo(*packed(d), **options)
    assert_same(d, ours, theirs)


def test_orpo():
    """TRL casts to float32 here; its likelihood covers prompt and completion."""
    d = problem()
    whole = torch.ones_like(d.mask)
    trainer = stand_in(beta=0.4)
    losses, *_ = ORPOTrainer.odds_ratio_loss(trainer, *pair_scores(d, True))
    theirs = restated_nll(d, whole) - losses.mean()
    assert_same(d, objectives.orpo(*packed(d), beta=0.4, nll_mask=whole), theirs, 1e-6)


@pytest.mark.parametrize("shift", [0.7, -0.7])
def test_kto(shift):
    d = problem()
    d.labels = torch.tensor([True, False, True, True, False, False])
    kl = torch.randn(6, dtype=torch.float64) * 0.1 + shift
    trainer = stand_in(
        beta=0.3,
        loss_type="kto",
        desirable_weight=1.2,
        undesirable_weight=0.7,
        precompute_ref_logps=True,
        calculate_KL=True,
        _compute_kl_logps=lambda model, inputs: kl,
    )
    mask, logp, ref = (padded(d, v) for v in (d.mask, d.logp, d.ref))
    tokens = shifted(mask)
    inputs = {
        "label": d.labels,
        "input_ids": tokens,
        "attention_mask": tokens,
        "completion_mask": tokens,
        "ref_logps": (ref * mask).sum(1),
        "ref_KL_logps": torch.zeros(6, dtype=torch.float64),
    }
    theirs = KTOTrainer._compute_loss(trainer, model_of(logp, mask), inputs, return_outputs=False)
    ours = objectives.kto(
        *packed(d),
        ref_logp=d.ref,
        labels=d.labels,
        kl=kl.mean(),
        beta=0.3,
        desirable_weight=1.2,
        undesirable_weight=0.7,
    )
    assert_same(d, ours, theirs)


# --- policy gradient ------------------------------------------------------------------------------


def trl_grpo(d, loss_type, advantages, *, level="token", old=True, beta=0.05, **options):
    """TRL's policy loss on the same data; its mask has no holes in front, ours may."""
    args = SimpleNamespace(
        delta=options.get("delta"),
        use_bias_correction_kl=options.get("correction", False),
        steps_per_generation=1,
    )
    mask, logp, ref, before = (padded(d, v) for v in (d.mask, d.logp, d.ref, d.old))
    weight = options.get("weight")
    trainer = stand_in(
        args=args,
        _get_per_token_logps_and_entropies=lambda *a, **k: (logp, torch.zeros_like(logp), None),
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=level,
        loss_type=loss_type,
        beta=beta,
        epsilon_low=options.get("low", 0.2),
        epsilon_high=options.get("high", 0.2),
        max_completion_length=11,
        use_vllm=weight is not None,
        vllm_importance_sampling_correction=weight is not None,
        _entropy_bonus_enabled=False,
    )
    inputs = {
        "prompt_ids": torch.zeros(6, 1, dtype=torch.long),
        "prompt_mask": torch.ones(6, 1, dtype=torch.long),
        "completion_ids": torch.zeros_like(mask, dtype=torch.long),
        "completion_mask": mask.long(),
        "advantages": advantages,
        "ref_per_token_logps": ref,
        "num_items_in_batch": d.mask.sum() if "items" not in options else options["items"],
        "importance_sampling_ratio": weight,
    }
    if old:
        inputs["old_per_token_logps"] = before
    return GRPOTrainer._compute_loss(trainer, None, inputs)


FAMILY = {
    "grpo": ("grpo", {}, {}),
    "bnpo": ("dapo", {}, {}),
    "dapo": ("dapo", {"high": 0.28}, {"epsilon_high": 0.28}),
    "dr_grpo": ("dr_grpo", {}, {"max_length": 11}),
    "cispo": ("cispo", {"high": 1.1}, {"epsilon_high": 1.1 - 1}),
    "gspo": (
        "gspo",
        {"level": "sequence", "low": 0.05, "high": 0.1},
        {"epsilon": 0.05, "epsilon_high": 0.1},
    ),
}


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("loss_type", FAMILY)
def test_policy(loss_type, old):
    d = problem()
    name, theirs, ours = FAMILY[loss_type]
    kind = "grpo" if loss_type == "gspo" else loss_type
    expected = trl_grpo(d, kind, d.advantage, old=old, **theirs)
    given = {"advantages": d.advantage, "ref_logp": d.ref, "beta": 0.05, **ours}
    if old:
        given["old_logp"] = d.old
    assert_same(d, getattr(objectives, name)(*packed(d), **given), expected)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "cispo"])
def test_policy_options(loss_type):
    """Token advantages, corrected KL and importance weights; two-sided clipping where it exists."""
    d = problem()
    name, theirs, ours = FAMILY[loss_type]
    extra = {} if loss_type == "cispo" else {"delta": 1.4}
    expected = trl_grpo(
        d,
        loss_type,
        padded(d, d.token_advantage),
        correction=True,
        weight=padded(d, d.token_weight),
        **theirs,
        **extra,
    )
    loss = getattr(objectives, name)(
        *packed(d),
        advantages=d.token_advantage,
        old_logp=d.old,
        ref_logp=d.ref,
        beta=0.05,
        kl_correction=True,
        token_weight=d.token_weight,
        **ours,
        **extra,
    )
    assert_same(d, loss, expected)


def test_sequence_weights_of_gspo():
    d = problem()
    _, theirs, ours = FAMILY["gspo"]
    expected = trl_grpo(d, "grpo", d.advantage, weight=d.weight[:, None], **theirs)
    given = {"advantages": d.advantage, "old_logp": d.old, "ref_logp": d.ref, "beta": 0.05, **ours}
    assert_same(d, objectives.gspo(*packed(d), token_weight=d.weight, **given), expected)


def test_dapo_over_several_micro_batches():
    """`num_items_in_batch` of the whole accumulation window is our ``normalizer``."""
    d = problem()
    items = torch.tensor(100)
    expected = trl_grpo(d, "dapo", d.advantage, beta=0.0, items=items)
    loss = objectives.dapo(*packed(d), advantages=d.advantage, old_logp=d.old, normalizer=items)
    assert_same(d, loss, expected)
