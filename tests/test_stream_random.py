"""Dropout in streamed models: the backward draws what the forward drew, and leaves the generators
as it found them."""

import copy

import peft
import pytest
import torch
from models import VOCAB, loss_and_gradients, make_twin, packed_row

import varstream as vs
from varstream.testing import assert_exact, relative_error, worst_gradient

LENGTHS = [5, 1, 13, 6]


def adapted(**options):
    """A twin whose LoRA adapters drop their inputs, the head's too."""
    config = peft.LoraConfig(
        r=3, lora_dropout=0.4, target_modules=["q_proj", "k_proj", "up_proj", "lm_head"], **options
    )
    model = peft.get_peft_model(make_twin(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return model


PHI3 = {"resid_pdrop": 0.3, "embd_pdrop": 0.2, "attention_dropout": 0.0}
NOISE = {"router_jitter_noise": 0.2, "output_router_logits": False}
MODELS = {
    "attention": lambda: make_twin("llama", attention_dropout=0.3),
    "attention_window": lambda: make_twin("gemma2", attention_dropout=0.3),
    "residual": lambda: make_twin("gpt2", resid_pdrop=0.3),
    "embedding": lambda: make_twin("gpt2", embd_pdrop=0.3),
    "all_three": lambda: make_twin("gpt2", resid_pdrop=0.2, embd_pdrop=0.1, attn_pdrop=0.2),
    "after_fused_qkv": lambda: make_twin("phi3", **PHI3),
    "router_noise": lambda: make_twin(
        "mixtral", router_jitter_noise=0.2, output_router_logits=False
    ),
    "adapters": adapted,
}


def seeded(model, row, seed=3):
    torch.manual_seed(seed)
    return model(**row, use_cache=False).loss


def gradients(model, row, seed=3):
    model.zero_grad(set_to_none=True)
    seeded(model, row, seed).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", MODELS)
def test_finite_differences(name):
    """Along a random direction of all parameters that leans uphill, under one seed."""
    model = vs.stream(MODELS[name](), chunk_size=7, head_chunk_size=5)
    row = packed_row(LENGTHS)
    grads = gradients(model, row)
    assert relative_error(seeded(model, row, seed=4), seeded(model, row)) > 1e-4  # it does drop
    step, steps = 1e-5, {n: torch.randn_like(g) + g / g.norm() for n, g in grads.items()}
    losses = []
    with torch.no_grad():
        for factor in (1.0, -2.0):
            for n, p in model.named_parameters():
                if n in steps:
                    p.add_(steps[n], alpha=factor * step)
            with torch.enable_grad():
                losses.append(seeded(model, row).detach())
    slope = sum((steps[n] * g).sum() for n, g in grads.items())
    assert relative_error((losses[0] - losses[1]) / (2 * step), slope) <= 1e-6


@pytest.mark.parametrize("name", ["residual", "embedding", "after_fused_qkv", "adapters"])
def test_one_chunk_drops_as_the_dense_model(name):
    """The same numbers are drawn in the same order where one chunk holds one whole document;
    attention's own dropout, which no kernel draws like another, is off."""
    dense = MODELS[name]()
    ids = torch.randint(VOCAB, (1, 17))
    row = {"input_ids": ids, "labels": ids}
    want, want_grads = seeded(dense, row).detach(), gradients(dense, row)
    streamed = vs.stream(dense, chunk_size=1000)
    assert_exact(seeded(streamed, row), want)
    worst, error = worst_gradient(gradients(streamed, row).items(), want_grads)
    assert error <= 1e-12, f"{worst}: {error:.2e}"


@pytest.mark.parametrize("name", ["all_three", "adapters"])
def test_generators_are_left_as_without_recomputation(name):
    model = vs.stream(MODELS[name](), chunk_size=7)
    row = packed_row(LENGTHS)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    loss = model(**row).loss
    after = torch.get_rng_state()
    assert not torch.equal(before, after)
    loss.backward()
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("name", ["all_three", "adapters"])
def test_what_others_draw_in_between_changes_nothing(name):
    model = vs.stream(MODELS[name](), chunk_size=7)
    row = packed_row(LENGTHS)
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss = seeded(model, row)
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    torch.manual_seed(99)
    torch.rand(7)
    for got, want in zip(torch.autograd.grad(loss, parameters), first, strict=True):
        assert torch.equal(got, want)


def test_chunks_drop_apart():
    """Not the same mask in every chunk: two equal documents, a chunk each, come out different."""
    model = vs.stream(make_twin("gpt2", resid_pdrop=0.5), chunk_size=6)
    ids = torch.randint(VOCAB, (1, 6)).repeat(1, 2)
    hidden = model.transformer(ids, position_ids=torch.arange(6).repeat(2)[None]).last_hidden_state
    assert relative_error(hidden[:, 6:], hidden[:, :6]) > 0.1
    model.eval()
    hidden = model.transformer(ids, position_ids=torch.arange(6).repeat(2)[None]).last_hidden_state
    assert_exact(hidden[:, 6:], hidden[:, :6])


# --- what is switched between forward and backward ------------------------------------------------


@pytest.mark.parametrize("mode", [True, False], ids=["to_eval", "to_train"])
def test_mode_changed_before_the_backward(mode):
    """The recomputation runs in the mode of the forward, and leaves the modules in theirs."""
    model = vs.stream(MODELS["all_three"](), chunk_size=7).train(mode)
    row = packed_row(LENGTHS)
    want = {n: g.clone() for n, g in gradients(model, row).items()}
    model.zero_grad(set_to_none=True)
    loss = seeded(model, row)
    model.train(not mode)
    loss.backward()
    worst, error = worst_gradient(((n, p.grad) for n, p in model.named_parameters()), want)
    assert error <= 1e-12, f"{worst}: {error:.2e}"
    assert all(m.training is not mode for m in model.modules())


@pytest.mark.parametrize("disabled", [True, False])
def test_adapters_switched_before_the_backward(disabled):
    model = adapted()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    streamed = vs.stream(copy.deepcopy(model), chunk_size=7)
    row = packed_row(LENGTHS)
    model.eval(), streamed.eval()
    results = []
    for m in (model, streamed):
        m.base_model.enable_adapter_layers()
        if disabled:
            m.base_model.disable_adapter_layers()
        loss = m(**row, use_cache=False).loss
        if disabled:
            m.base_model.enable_adapter_layers()
        else:
            m.base_model.disable_adapter_layers()
        for parameter in m.parameters():
            parameter.requires_grad_(True)
        loss.backward()
        results.append({n: p.grad for n, p in m.named_parameters()})
    worst, error = worst_gradient(results[1].items(), results[0])
    assert error <= 1e-12, f"{worst}: {error:.2e}"


def test_deterministic_models_are_exact_in_training_mode():
    """No dropout: training and evaluation mode are the same function."""
    model = vs.stream(make_twin("qwen3"), chunk_size=7)
    row = packed_row(LENGTHS)
    want, _ = loss_and_gradients(model.eval(), **row)
    got, _ = loss_and_gradients(model.train(), **row)
    assert_exact(got, want)
