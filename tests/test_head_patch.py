"""fuse_head: losses, gradients and logits of the model itself, without an (N, V) tensor."""

import copy
import importlib
import inspect
import pickle

import pytest
import torch
from models import FAMILIES, VOCAB, family_classes, loss_and_gradients, make_model, make_twin
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, Trainer, TrainingArguments
from transformers.modeling_outputs import CausalLMOutputWithPast

import varstream as vs
from varstream.integrations.transformers.head import FAMILIES as HEADS
from varstream.integrations.transformers.head import fuse_head, unfuse_head
from varstream.integrations.transformers.lazy_logits import LazyLogits, Projection
from varstream.streaming import UnsupportedModelError
from varstream.testing import assert_exact, peak_memory, relative_error, worst_gradient

B, S = 3, 11
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "attention_dropout": 0.0,
}
# Logits of a size at which a bound or a factor matters.
EXTRA = {
    "gemma2": {"final_logit_softcapping": 1.5},
    "gemma3_text": {"final_logit_softcapping": 0.7},
    "cohere": {"logit_scale": 0.3},
    "cohere2": {"logit_scale": 3.0},
    "granite": {"logits_scaling": 4.0},
}


def make_family(kind):
    package = HEADS[kind][0]
    config = AutoConfig.for_model(kind, **(SIZES | EXTRA.get(kind, {})))
    module = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
    (cls,) = {
        c
        for name, c in vars(module).items()
        if name.endswith("ForCausalLM") and getattr(c, "config_class", None) is type(config)
    }
    model = cls(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def batch(**more):
    ids = torch.randint(1, VOCAB, (B, S))
    labels = ids.masked_fill(torch.rand(B, S) < 0.3, -100)
    return {"input_ids": ids, "labels": labels} | more


def pair(model, **options):
    return model, fuse_head(copy.deepcopy(model), **options)


def compare(model, inputs, tolerance=1e-12, **options):
    dense, fused = pair(model, **options)
    loss, grads = loss_and_gradients(dense, **inputs)
    got, got_grads = loss_and_gradients(fused, **inputs)
    assert_exact(got, loss, tolerance)
    name, error = worst_gradient(got_grads.items(), grads)
    assert error <= tolerance, f"{name}: {error:.2e}"
    assert_exact(fused(**inputs).logits, dense(**inputs).logits, tolerance, "logits")


@pytest.fixture
def computed(monkeypatch):
    """How often logits were computed."""
    calls = []
    original = Projection.of
    monkeypatch.setattr(Projection, "of", lambda *a: calls.append(1) or original(*a))
    return calls


# --- losses and gradients -------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"gpt2", "mixtral", "qwen3_moe"}))
def test_twins(family):
    compare(make_twin(family), batch(), chunk_size=7)


@pytest.mark.parametrize("kind", HEADS)
def test_families(kind):
    compare(make_family(kind).double(), batch(), tolerance=1e-6)


def test_scaling_matters():
    """Were the bound or the factor left out, the comparison above would notice."""
    for kind in EXTRA:
        model, inputs = make_family(kind).double(), batch()
        logits = model(**inputs).logits
        plain = model.lm_head(model.model(inputs["input_ids"]).last_hidden_state)
        assert relative_error(logits, plain) > 1e-2, kind


@pytest.mark.parametrize("count", [7, torch.tensor(13)])
def test_num_items_in_batch(count):
    compare(make_twin(), batch(num_items_in_batch=count))


def test_num_items_in_batch_of_one_element():
    """As data parallelism scatters it; the loss stays a scalar, where the model's own is (1,)."""
    dense, fused = pair(make_twin())
    inputs = batch(num_items_in_batch=torch.tensor([5.0], dtype=torch.float64))
    assert_exact(fused(**inputs).loss, dense(**inputs).loss[0])


def test_shift_labels_and_ignore_index():
    inputs = batch()
    labels = nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    compare(make_twin(), inputs | {"shift_labels": labels})
    fused = fuse_head(make_twin())
    want = fused(**inputs).loss
    assert_exact(fused(**(inputs | {"shift_labels": labels})).loss, want)
    other = inputs["labels"].masked_fill(inputs["labels"] == -100, -7)
    assert_exact(fused(inputs["input_ids"], labels=other, ignore_index=-7).loss, want)


@pytest.mark.parametrize(
    "keep", [4, torch.tensor([2, 5, 9]), torch.tensor([[1, 2], [0, 3], [9, 10]]), "mask"]
)
def test_logits_to_keep(keep):
    inputs = batch()
    if isinstance(keep, str):
        keep = torch.rand(B, S) < 0.5
        labels = inputs["labels"][keep]
    else:
        labels = inputs["labels"][:, : keep if isinstance(keep, int) else keep.shape[-1]]
    inputs["shift_labels"] = labels
    compare(make_twin(), inputs | {"logits_to_keep": keep})


def test_attention_mask_and_embeddings():
    inputs = batch()
    mask = torch.ones(B, S, dtype=torch.int64)
    mask[1, 7:] = mask[2, 3:] = 0
    model = make_twin()
    compare(model, inputs | {"attention_mask": mask})
    embeds = model.model.embed_tokens(inputs.pop("input_ids")).detach()
    compare(model, inputs | {"inputs_embeds": embeds})


def test_positional_arguments_and_bias():
    model = make_twin("llama")
    model.lm_head.bias = nn.Parameter(torch.randn(VOCAB, dtype=torch.float64))
    inputs = batch()
    compare(model, inputs)
    mask = torch.ones(B, S, dtype=torch.int64)
    arguments = inputs["input_ids"], mask, None, None, None, inputs["labels"]
    assert_exact(fuse_head(copy.deepcopy(model))(*arguments).loss, model(*arguments).loss)


def test_nothing_trained_is_zero():
    model = fuse_head(make_twin())
    inputs = batch()
    inputs["labels"][:] = -100
    loss, grads = loss_and_gradients(model, **inputs)
    assert loss == 0 and not any(g.any() for g in grads.values() if g is not None)
    with torch.no_grad():
        assert model(**inputs).loss.isnan()  # as transformers: an evaluation's mean leaves it out


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_autocast(kind):
    """bfloat16 autocast: a float32 loss, no further from float64 than the model's own."""
    dense, fused = pair(make_family(kind))
    inputs = batch()
    exact, reference = loss_and_gradients(copy.deepcopy(dense).double(), **inputs)
    results = []
    for model in (dense, fused):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            output = model(**inputs)
        assert output.loss.dtype == torch.float32 and output.logits.dtype == torch.bfloat16
        output.loss.backward()
        results.append((output, {n: p.grad for n, p in model.named_parameters()}))
    assert torch.equal(results[0][0].logits, results[1][0].logits)
    assert relative_error(results[1][0].loss, exact) <= 1e-3
    for name, grad in reference.items():
        plain, ours = (relative_error(r[1][name], grad) for r in results)
        assert ours <= 2 * plain + 1e-3, f"{name}: {ours:.2e} against {plain:.2e}"


# --- logits on demand -----------------------------------------------------------------------------


def test_no_logits_are_formed():
    model = fuse_head(make_model(vocab_size=20011, hidden_size=16, num_attention_heads=2))
    inputs = {k: v.repeat(1, 100) for k, v in batch().items()}  # 3300 rows, 264 MB of logits
    rows = inputs["labels"].numel()

    def step():
        model.zero_grad()
        output = model(**inputs)
        output.loss.backward()
        return output, list(output.items())

    assert peak_memory(step) < rows * 20011 * 4 / 2


def test_ways_to_ask(computed):
    """What each way of reading an output gives, and what it costs."""
    dense, fused = pair(make_twin())
    inputs = batch()
    want = dense(**inputs).logits
    output = fused(**inputs)
    assert isinstance(output, CausalLMOutputWithPast)
    assert list(output) == list(output.keys()) == ["loss", "logits", "past_key_values"]
    assert output["loss"] is output.loss is output[0] and output.get("loss") is output.loss
    lazy = dict(output.items())["logits"]
    assert type(lazy) is type(list(output.values())[1]) is LazyLogits
    assert lazy.shape == want.shape and lazy.dtype == want.dtype and lazy.requires_grad
    assert "LazyLogits(shape=(3, 11, 61)" in repr(lazy)
    assert not computed
    assert torch.equal(output.logits, want) and type(output.logits) is torch.Tensor
    assert output["logits"] is output.logits is output[1] is output.to_tuple()[1]
    assert output.get("logits") is output[:2][1] is dict(output)["logits"] is output.logits
    assert output.get("attentions", 5) == 5 and output.attentions is None
    assert len(computed) == 1
    with pytest.raises(KeyError, match="attentions"):
        output["attentions"]
    assert torch.equal(fused(**inputs).to_tuple()[1], want)
    assert torch.equal(fused(**inputs, return_dict=False)[1], want)


@pytest.mark.parametrize("how", ["attribute", "items", "items_float32"])
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_gradients_through_logits(how, kind):
    dense, fused = pair(make_twin() if kind == "llama" else make_family(kind).double())
    inputs = batch()
    # Float32 in the classes' own norms, or asked for.
    tolerance = 1e-6 if kind != "llama" or how == "items_float32" else 1e-12

    def objective(model):
        output = model(**inputs)
        logits = output.logits
        if model is fused and how != "attribute":
            logits = dict(model(**inputs).items())["logits"]
        if how == "items_float32":
            logits = logits.float()
        return (logits.sin().sum() + 3 * output.loss).double()

    parameters = [p for p in dense.parameters()]
    expected = torch.autograd.grad(objective(dense), parameters)
    actual = torch.autograd.grad(objective(fused), list(fused.parameters()))
    for got, want in zip(actual, expected, strict=True):
        assert_exact(got, want, tolerance)


def test_frozen_head():
    """The graph of lazy logits asks for no gradient that nobody wants."""
    dense, fused = pair(make_twin())
    inputs = batch()
    for model in (dense, fused):
        model.lm_head.weight.requires_grad_(False)
    lazy = dict(fused(**inputs).items())["logits"]
    weight = fused.model.norm.weight
    (got,) = torch.autograd.grad(lazy.square().sum(), weight)
    (want,) = torch.autograd.grad(dense(**inputs).logits.square().sum(), dense.model.norm.weight)
    assert_exact(got, want)
    compare(dense, inputs)


def test_lazy_logits_as_memory(computed):
    """What reads memory past the dispatcher gets the values, under no_grad."""
    dense, fused = pair(make_twin())
    inputs = batch()
    with torch.no_grad():
        want = dense(**inputs).logits
        lazy = dict(fused(**inputs).items())["logits"]
    assert not lazy.requires_grad and not computed
    assert (lazy.numpy() == want.numpy()).all() and lazy.tolist() == want.tolist()
    assert torch.equal(lazy.detach().clone(), want) and torch.equal(torch.from_dlpack(lazy), want)
    assert torch.equal(pickle.loads(pickle.dumps(lazy)), want)
    assert torch.equal(copy.deepcopy(lazy), want)
    assert torch.equal(lazy.argmax(-1), want.argmax(-1)) and torch.equal(lazy[:, -1], want[:, -1])
    assert len(computed) == 1


def test_inference_mode():
    dense, fused = pair(make_twin())
    inputs = batch()
    with torch.inference_mode():
        output = fused(**inputs)
        assert_exact(output.loss, dense(**inputs).loss)
    assert torch.equal(output.logits, dense(**inputs).logits)


def test_output_pickles_and_copies_as_the_plain_class():
    dense, fused = pair(make_twin())
    inputs = batch(use_cache=False)
    with torch.no_grad():
        want = dense(**inputs)
        for make in (lambda o: pickle.loads(pickle.dumps(o)), copy.copy, copy.deepcopy):
            got = make(fused(**inputs))
            assert type(got) is CausalLMOutputWithPast and torch.equal(got.logits, want.logits)
            assert_exact(got.loss, want.loss)


def test_logits_of_changed_weights_are_refused():
    model = fuse_head(make_twin())
    early, late, used = model(**batch()), model(**batch()), model(**batch())
    lazy = dict(late.items())["logits"]
    total = dict(used.items())["logits"].sum()
    before = early.logits.clone()
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
    assert torch.equal(early.logits, before)
    for read in (lambda: late.logits, lambda: lazy.sum(), lambda: total.backward()):
        with pytest.raises(RuntimeError, match="read after lm_head.weight.*changed in place"):
            read()
    model = fuse_head(make_twin())
    output = model(**batch())
    model.lm_head.weight.untyped_storage().resize_(0)  # as sharded training does
    with pytest.raises(RuntimeError, match="freed"):
        output.logits  # noqa: B018


# --- the rest of the ecosystem --------------------------------------------------------------------


def test_without_labels_nothing_changes():
    dense, fused = pair(make_model())
    ids = torch.randint(1, VOCAB, (B, S))
    output = fused(ids)
    assert type(output) is CausalLMOutputWithPast and torch.equal(output.logits, dense(ids).logits)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(fused.generate(ids, **options), dense.generate(ids, **options))


def test_signature():
    """Trainers drop columns that a forward doesn't name, and look for **kwargs."""
    fused = fuse_head(make_model())
    parameters = inspect.signature(fused.forward).parameters
    original = inspect.signature(type(fused).forward).parameters
    assert list(parameters) == [name for name in original if name != "self"]


def test_hidden_states_and_cache_are_passed_on():
    dense, fused = pair(make_twin())
    inputs = batch(output_hidden_states=True, use_cache=True)
    want, got = dense(**inputs), fused(**inputs)
    assert len(got.hidden_states) == len(want.hidden_states) == 3
    assert got.past_key_values.get_seq_length() == S
    assert list(got.keys()) == list(want.keys())


def test_copies_and_checkpoints(tmp_path):
    model = fuse_head(make_model())
    inputs = batch()
    want = model(**inputs).loss.detach()
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(**inputs).loss, want)
        assert again.forward.args[0] is again  # not the original
        unfuse_head(again)
        assert type(again(**inputs)) is CausalLMOutputWithPast
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert type(loaded(**inputs)) is CausalLMOutputWithPast
    assert_exact(fuse_head(loaded)(**inputs).loss, want, 1e-6)


def test_unfuse():
    model = make_model()
    keys = set(model.__dict__)
    assert unfuse_head(fuse_head(fuse_head(model, chunk_size=3))) is model
    assert set(model.__dict__) == keys
    with pytest.raises(ValueError, match="LlamaForCausalLM has no fused head"):
        unfuse_head(model)
    fuse_head(model).forward = lambda *a, **k: None
    with pytest.raises(ValueError, match="forward was replaced after fuse_head"):
        unfuse_head(model)


@pytest.mark.slow
def test_compiled():
    dense, fused = pair(make_twin(num_hidden_layers=1))
    inputs = batch(use_cache=False)
    want, grads = loss_and_gradients(dense, **inputs)
    fused.compile(backend="eager")
    got, got_grads = loss_and_gradients(fused, **inputs)
    assert_exact(got, want)
    assert worst_gradient(got_grads.items(), grads)[1] <= 1e-12
    assert torch.equal(fused(**inputs).logits, dense(**inputs).logits)


def data(rows=6):
    ids = torch.randint(1, VOCAB, (rows, S))
    return [{"input_ids": row, "labels": row} for row in ids]


def arguments(tmp_path, **more):
    common = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    return TrainingArguments(str(tmp_path), per_device_train_batch_size=2, **(common | more))


def test_trainer(tmp_path, computed):
    """bfloat16 training walks over every output to cast it; the logits stay uncomputed."""
    losses = []
    rows = data()
    options = {"bf16": True, "max_steps": 2, "gradient_accumulation_steps": 2, "logging_steps": 1}
    for model in pair(make_model()):
        trainer = Trainer(model, arguments(tmp_path, **options), train_dataset=rows)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert not computed
    assert len(losses[0]) == 2 and losses[1] == pytest.approx(losses[0], rel=1e-2)


def test_trainer_evaluation(tmp_path, computed):
    results = []
    rows = data()
    for model in pair(make_model()):
        args = arguments(tmp_path, per_device_eval_batch_size=4)
        metrics = lambda p: {"size": p.predictions.size, "sum": float(p.predictions.sum())}  # noqa: E731
        trainer = Trainer(model, args, eval_dataset=rows, compute_metrics=metrics)
        results.append(trainer.evaluate())
        count = len(computed)
        trainer.compute_metrics = None
        assert trainer.evaluate()["eval_loss"] == results[-1]["eval_loss"]  # the loss alone
        assert len(computed) == count
        predictions = trainer.predict(rows).predictions
        assert predictions[0].shape == (6, S, VOCAB) or predictions.shape == (6, S, VOCAB)
    assert results[0]["eval_size"] == results[1]["eval_size"] == 6 * S * VOCAB
    for key in ("eval_loss", "eval_sum"):
        assert results[1][key] == pytest.approx(results[0][key], rel=1e-5)


@pytest.fixture
def group():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_data_parallel(group):
    """DDP looks for unused parameters in the graph behind the outputs."""
    dense, fused = pair(make_twin())
    inputs = batch()
    _, grads = loss_and_gradients(dense, **inputs)
    wrapped = nn.parallel.DistributedDataParallel(fused, find_unused_parameters=True)
    wrapped(**inputs).loss.backward()
    got = ((n, p.grad) for n, p in fused.named_parameters())
    assert worst_gradient(got, grads)[1] <= 1e-12


def test_sharded(group):
    """FSDP2 gathers the root's weights for the root's forward; a head sharded alone is refused."""
    dense, fused = pair(make_twin())
    inputs = batch()
    _, grads = loss_and_gradients(dense, **inputs)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    for layer in fused.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(fused, mesh=mesh)
    output = fused(**inputs)
    output.loss.backward()
    got = ((n, p.grad.full_tensor()) for n, p in fused.named_parameters())
    assert worst_gradient(got, grads)[1] <= 1e-12
    assert torch.equal(fused(**inputs).logits, dense(**inputs).logits)
    alone = fuse_head(make_twin())
    fully_shard(alone.lm_head, mesh=mesh)
    with pytest.raises(UnsupportedModelError, match="lm_head is a FSDPLinear"):
        alone(**inputs)


# --- refusals -------------------------------------------------------------------------------------


class Adapter(nn.Linear):
    """Stands for any wrapped projection."""


def adapt(model):
    model.lm_head = Adapter(32, VOCAB, bias=False)


def parametrize(model):
    nn.utils.parametrizations.orthogonal(model.lm_head)


def hook(model):
    model.lm_head.register_forward_hook(lambda *a: None)


def own_forward(model):
    model.lm_head.forward = lambda x: x


def my_loss(logits, labels, vocab_size, **kwargs):
    return logits.sum()


def own_loss(model):
    model.loss_function = my_loss


CHANGES = {
    adapt: "lm_head is a Adapter, not a plain nn.Linear",
    parametrize: "lm_head is a ParametrizedLinear",
    hook: "lm_head has hooks or a forward of its own",
    own_forward: "lm_head has hooks or a forward of its own",
    own_loss: "model.loss_function is my_loss",
}


@pytest.mark.parametrize("change, message", CHANGES.items())
def test_what_the_head_would_miss_is_refused(change, message):
    model = make_model()
    change(model)
    keys = set(model.__dict__)
    with pytest.raises(UnsupportedModelError, match=message):
        fuse_head(model)
    assert set(model.__dict__) == keys
    model = fuse_head(make_model())
    change(model)
    with pytest.raises(UnsupportedModelError, match=message):
        model(**batch())
    if change is own_loss:
        assert model(torch.zeros(1, 2, dtype=torch.int64)).loss is None


def test_other_models_are_refused():
    class Mine(family_classes("llama")[0]):
        pass

    class Wrapper(nn.Module):
        def get_base_model(self):
            return None

    def patched():
        model = make_model()
        model.forward = model.forward
        return model

    mixtral = AutoConfig.for_model("mixtral", **(SIZES | {"num_local_experts": 2}))
    from transformers import MixtralForCausalLM

    cases = [
        (nn.Linear(2, 2), "Linear has model type None; fuse_head understands cohere, "),
        (MixtralForCausalLM(mixtral), "model type 'mixtral'"),
        (make_model().model, "LlamaModel is not the ForCausalLM class"),
        (
            Mine(make_model().config),
            "Mine is not the ForCausalLM class of transformers.models.llama",
        ),
        (patched(), "has a forward set on the instance; call fuse_head first"),
        (Wrapper(), "Wrapper wraps a model; pass model.get_base_model"),
        (vs.stream(make_model()), "is streamed and computes its loss without logits already"),
    ]
    for model, message in cases:
        with pytest.raises(UnsupportedModelError, match=message):
            fuse_head(model)
    with pytest.raises(UnsupportedModelError, match="has a fused head; call unfuse_head first"):
        vs.stream(fuse_head(make_model()))


def test_argument_errors():
    with pytest.raises(ValueError, match="chunk_size must be >= 1, got 0"):
        fuse_head(make_model(), chunk_size=0)
    with pytest.raises(TypeError, match="chunk_size must be an int"):
        fuse_head(make_model(), chunk_size="auto")
    model, inputs = fuse_head(make_model()), batch()
    with pytest.raises(ValueError, match="labels must have one entry for each of the 12 positions"):
        model(**inputs, logits_to_keep=4)
    with pytest.raises(ValueError, match="shift_labels must have one entry for each of the 33"):
        model(**inputs, shift_labels=inputs["labels"][:, :-1])
    with pytest.raises(ValueError, match="num_items_in_batch must be above 0, got 0"):
        model(**inputs, num_items_in_batch=0)
    with pytest.raises(TypeError, match="num_items_in_batch must be a number, got str"):
        model(**inputs, num_items_in_batch="many")
