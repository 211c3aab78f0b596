"""Calls without gradients: what streams, what runs the model's own forward, and lazy logits."""

import copy

import pytest
import torch
from models import FAMILIES, make_model, make_twin, packed_row
from peft import LoraConfig, get_peft_model
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

import varstream as vs
from varstream.integrations.transformers.lazy_logits import LazyLogits
from varstream.planner import twins
from varstream.testing import assert_exact, relative_error
from varstream.testing.float64 import exact_routers


def padded_batch(lengths: list[int]) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 50, (len(lengths), max(lengths)))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def pair(family: str = "qwen3", chunk: int = 3):
    """A float64 twin and its streamed copy."""
    twin = make_twin(family).eval()
    return twin, vs.stream(copy.deepcopy(twin), chunk_size=chunk)


def layer_calls(model, path: str = "model.layers.0.mlp"):
    """The rows of every call of a module."""
    rows: list[int] = []
    model.get_submodule(path).register_forward_pre_hook(
        lambda module, args: rows.append(args[0].shape[:-1].numel())
    )
    return rows


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_losses_and_logits_are_the_models_own(family, mode):
    twin, streamed = pair(family)
    inputs = padded_batch([7, 1, 11])
    with mode(), exact_routers(twin):
        want, got = twin(**inputs, use_cache=False), streamed(**inputs)
    real = inputs["attention_mask"].bool()
    assert_exact(got.loss, want.loss)
    assert_exact(got.logits[real], want.logits[real])
    if FAMILIES[family][1].get("output_router_logits"):
        assert_exact(got.aux_loss, want.aux_loss)
        for ours, theirs in zip(got.router_logits, want.router_logits, strict=True):
            assert_exact(ours[real.flatten()], theirs[real.flatten()])
    assert got.past_key_values is None


def test_evaluation_computes_real_tokens_in_chunks_and_no_logits(monkeypatch):
    twin, streamed = pair()
    rows, inputs = layer_calls(streamed), padded_batch([7, 1, 11])
    computed = []
    monkeypatch.setattr(LazyLogits, "compute", lambda self: computed.append(self))
    with torch.no_grad():
        output = streamed(**inputs)
    assert sum(rows) == 19 and max(rows) <= 3
    assert isinstance(dict(output.items())["logits"], LazyLogits) and not computed
    assert isinstance(output, ModelOutput) and isinstance(output, CausalLMOutputWithPast)


@pytest.mark.parametrize("items", [None, torch.tensor(0.0), torch.tensor(3.0)])
def test_a_batch_without_a_target_is_left_out_of_a_mean(items):
    """NaN, as transformers has it, where nothing is counted; a step trained on it adds nothing."""
    twin, streamed = pair()
    inputs = padded_batch([3, 2]) | {"num_items_in_batch": items}
    inputs["labels"].fill_(-100)
    with torch.no_grad():
        want, got = twin(**inputs).loss, streamed(**inputs).loss
    assert torch.equal(got.isnan(), want.isnan()) and (items == 3 or bool(got.isnan()))
    streamed.train()(**inputs).loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in streamed.parameters())


def test_a_row_without_a_real_token():
    _, streamed = pair()
    inputs = padded_batch([3, 2])
    inputs["attention_mask"].zero_(), inputs["labels"].fill_(-100)
    with torch.no_grad():
        output = streamed(**inputs)
    assert output.loss.isnan() and not output.logits.any()
    assert output.logits.shape == (2, 3, streamed.config.vocab_size)


def test_autocast_logits_have_its_dtype():
    streamed = vs.stream(make_model("qwen3").eval(), chunk_size=3)
    inputs = padded_batch([7, 2])
    with torch.no_grad():
        want = streamed(**inputs).logits
        with torch.autocast("cpu", torch.bfloat16):
            output = streamed(**inputs)
    assert output.logits.dtype == torch.bfloat16 and output.loss.dtype == torch.float32
    assert relative_error(output.logits.float(), want) < 0.03


@pytest.mark.parametrize(
    "asked",
    [
        {"use_cache": True},
        {"output_hidden_states": True},
        {"logits_to_keep": 0, "output_attentions": True},
        {"labels": None},
        {"logits_to_keep": 11},
        {"anything": 1},
    ],
)
def test_what_streaming_does_not_give_comes_from_the_model_itself(asked):
    model = make_model("qwen3", attn_implementation="eager").eval()
    streamed = vs.stream(copy.deepcopy(model), chunk_size=3)
    inputs = padded_batch([7, 1, 11]) | asked
    with torch.no_grad():
        want, got = model(**inputs), streamed(**inputs)
    assert got.keys() == want.keys()
    assert torch.equal(want.logits, got.logits)
    assert want.loss is None or torch.equal(want.loss, got.loss)


def test_a_loss_of_ones_own_is_evaluated_by_the_model_itself():
    model, streamed = pair()
    inputs = padded_batch([7, 1, 11])
    for each in (model, streamed):
        each.loss_function = lambda logits, labels, **_: logits.sum()
    with torch.no_grad():
        assert torch.equal(model(**inputs).loss, streamed(**inputs).loss)


def test_a_call_without_labels_makes_the_cache_that_transformers_makes():
    model, streamed = pair()
    ids = torch.randint(50, (2, 9))
    with torch.no_grad():
        want, got = model(ids), streamed(ids)
    assert torch.equal(want.logits, got.logits) and got.past_key_values is not None
    with pytest.raises(ValueError, match="makes and reads no cache while it is trained"):
        streamed.train()(ids, use_cache=True)


def test_a_call_that_forgoes_the_cache_streams():
    """As trainers score with a reference: logits are asked for, and no cache."""
    model, streamed = pair()
    inputs = padded_batch([7, 1, 11])
    real, rows = inputs["attention_mask"].bool(), layer_calls(streamed)
    del inputs["labels"]
    with torch.no_grad():
        want, got = model(**inputs).logits, streamed(**inputs, use_cache=False).logits
    assert max(rows) <= 3
    assert_exact(got[real], want[real])


def test_a_hook_on_the_head_fires():
    model, streamed = pair()
    fired = []
    streamed.lm_head.register_forward_hook(lambda *_: fired.append(1))
    inputs = padded_batch([7, 1, 11])
    with torch.no_grad():
        assert torch.equal(model(**inputs).loss, streamed(**inputs).loss) and fired


def test_routers_that_nobody_asks_for():
    model, streamed = pair("mixtral")
    inputs = padded_batch([7, 1, 11]) | {"output_router_logits": False}
    with torch.no_grad():
        want, got = model(**inputs, use_cache=False), streamed(**inputs)
    assert type(got).__mro__[2] is type(want) and got.aux_loss is None
    assert_exact(got.loss, want.loss)


def test_router_logits_without_a_loss_for_them(monkeypatch):
    monkeypatch.setattr("varstream.streaming.head.balances_load", lambda model: False)
    model, streamed = pair("mixtral")
    inputs = padded_batch([7, 1, 11])
    with torch.no_grad():
        assert torch.equal(model(**inputs).loss, streamed(**inputs).loss)


def test_tuples_and_shifted_labels():
    model, streamed = pair()
    inputs = padded_batch([7, 1, 11])
    shifted = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    with torch.no_grad():
        want, (loss, logits) = model(**inputs), streamed(**inputs, return_dict=False)
        assert_exact(streamed(**inputs, shift_labels=shifted).loss, want.loss)
    real = inputs["attention_mask"].bool()
    assert_exact(loss, want.loss)
    assert_exact(logits[real], want.logits[real])


def test_an_adapter_on_the_head():
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    adapted = get_peft_model(make_twin("qwen3"), config).double().eval()
    streamed = vs.stream(copy.deepcopy(adapted), chunk_size=3)
    inputs = padded_batch([7, 1, 11])
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        want, got = adapted(**inputs), streamed(**inputs)
    assert_exact(got.loss, want.loss)
    assert_exact(got.logits[real], want.logits[real])


@pytest.mark.parametrize(
    ("lengths", "told_by"),
    [
        ([4, 1, 7, 3], "position_ids"),
        ([4, 1, 7, 3], "cu_seq_lens"),
        ([4, 1, 7, 3], "both, with a mask of ones"),
        ([15], "cu_seq_lens"),
    ],
)
def test_packed_documents_stay_apart(lengths, told_by):
    """transformers' own forward makes a cache by default, and then looks past their edges."""
    twin = make_twin("qwen3")
    row = packed_row(lengths)
    ids = row["input_ids"]
    with torch.no_grad():
        want = torch.cat([twin(part).logits for part in ids.split(lengths, 1)], 1)
    inputs = {"input_ids": ids}
    if told_by != "cu_seq_lens":
        inputs["position_ids"] = row["position_ids"]
    if told_by != "position_ids":
        cu = vs.cu_seqlens(lengths)
        inputs |= {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu}
    if "mask" in told_by:
        inputs["attention_mask"] = torch.ones_like(ids)
    streamed = vs.stream(twin, chunk_size=5)
    rows = layer_calls(streamed)
    with torch.no_grad():
        got = streamed(**inputs)
        hidden = streamed.model(**inputs).last_hidden_state
    assert got.past_key_values is None and max(rows) <= 5
    assert_exact(got.logits, want)
    assert_exact(streamed.lm_head(hidden), want)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_budget_of_training_does_not_refuse_an_evaluation(mode, monkeypatch):
    """Automatic chunks, planned within the call."""
    monkeypatch.setattr(twins, "_traces", {})
    model = make_model("qwen3")
    plan = vs.plan_memory(model.config, 64, dtype=torch.float32)
    streamed = vs.stream(model, memory_budget=plan.peak_bytes)
    twins._traces.clear()
    ids = torch.randint(50, (1, 500))
    with mode():
        assert streamed(ids, labels=ids).loss.isfinite()
    assert twins._traces
    with pytest.raises(ValueError, match="memory_budget is too small"):
        streamed(ids.repeat(1, 20), labels=ids.repeat(1, 20))
