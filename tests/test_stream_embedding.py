"""A streamed model's first input is looked up again in the backward, where that gives the same."""

import copy

import pytest
import torch
from models import loss_and_gradients, make_twin, packed_row

import varstream as vs
from varstream.streaming import recompute
from varstream.testing import worst_gradient


@pytest.fixture
def rebuilt(monkeypatch):
    """How many streamed layers of a forward keep no input."""
    seen = []
    original = recompute.Work

    def work(*args):
        made = original(*args)
        seen.append(made.rebuild is not None)
        return made

    monkeypatch.setattr(recompute, "Work", work)
    return seen


def double(module, args, output):
    return 2 * output


WAYS = {
    "plain": ("llama", None, 1),
    "scaled outside": ("granite", None, 0),
    "with positions": ("gpt2", None, 0),
    "hooked": ("llama", double, 0),
    "frozen": ("qwen3", "frozen", 1),
}


@pytest.mark.parametrize(("family", "change", "count"), WAYS.values(), ids=WAYS)
def test_only_what_the_embedding_gave_is_looked_up(rebuilt, family, change, count):
    twin, inputs = make_twin(family), packed_row([5, 9, 1])
    if change == "frozen":
        twin.get_input_embeddings().weight.requires_grad_(False)
    elif change is not None:
        twin.get_input_embeddings().register_forward_hook(change)
    streamed = vs.stream(copy.deepcopy(twin), chunk_size=4)
    _, grads = loss_and_gradients(twin, **inputs, use_cache=False)
    _, got = loss_and_gradients(streamed, **inputs)
    assert sum(rebuilt) == count
    name, error = worst_gradient(got.items(), grads)
    assert error <= 1e-12, f"{name}: {error:.2e}"


def test_given_embeddings_are_kept(rebuilt):
    model, inputs = vs.stream(make_twin(), chunk_size=4), packed_row([5, 9])
    embeds = model.model.embed_tokens(inputs.pop("input_ids"))
    model(inputs_embeds=embeds, **inputs).loss.backward()
    assert not any(rebuilt) and model.model.embed_tokens.weight.grad.any()


def test_a_weight_changed_before_the_backward_is_noticed():
    model = vs.stream(make_twin(), chunk_size=4)
    loss = model(**packed_row([5, 9])).loss
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(2)
    with pytest.raises(RuntimeError, match="the embedding's weight was changed in place"):
        loss.backward()
