"""How a streamed model behaves: original forwards where nothing streams, undoing, generate, hooks,
refusals."""

import copy
import pickle

import pytest
import torch
import transformers
from models import SIZES, loss_and_gradients, make_model, make_twin, packed_row
from torch import nn

import varstream as vs
from varstream.integrations.transformers import fuse_head
from varstream.streaming import UnsupportedModelError
from varstream.testing import assert_exact, worst_gradient


def test_sequence_index_must_say_what_the_rows_say():
    model = vs.stream(make_model(), chunk_size=5)
    row = packed_row([4, 1, 3])
    index = torch.tensor([[0, 0, 0, 0, 1, 2, 2, 2]], dtype=torch.int32)
    assert torch.equal(model(**row, seq_idx=index).loss, model(**row).loss)
    for wrong in ([[0] * 8], [[0, 0, 1, 1, 1, 2, 2, 2]], [list(range(8))]):
        with pytest.raises(ValueError, match="seq_idx must change where documents begin"):
            model(**row, seq_idx=torch.tensor(wrong))
    ids = torch.randint(50, (2, 4))
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    model(input_ids=ids, attention_mask=mask, labels=ids, seq_idx=torch.zeros_like(ids))


def test_generate_is_unchanged():
    model = make_model().eval()
    streamed = vs.stream(copy.deepcopy(model), chunk_size=3)
    ids = torch.randint(1, 50, (2, 5))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), streamed.generate(ids, **options))


def test_unstream_restores_everything():
    model = make_model()
    before = {name: dict(m.__dict__) for name, m in model.named_modules()}
    keys = list(model.state_dict())
    assert vs.stream(model, chunk_size=4) is model
    assert list(model.state_dict()) == keys
    vs.stream(model, chunk_size=5)  # again: replaces the first
    assert vs.unstream(model) is model
    for name, module in model.named_modules():
        assert module.__dict__.keys() == before[name].keys(), name
    with pytest.raises(ValueError, match="LlamaForCausalLM is not a streamed"):
        vs.unstream(model)


def test_a_forward_wrapped_after_us_is_not_thrown_away():
    model = vs.stream(make_model())
    inner = model.model.forward
    model.model.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    with pytest.raises(ValueError, match="LlamaModel.forward was replaced after vs.stream"):
        vs.unstream(model)
    model.model.forward = inner
    vs.unstream(model)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_stream_on_their_own(copier):
    model = vs.stream(make_model(), chunk_size=4)
    twin = copier(model)
    inputs = packed_row([5, 6])
    twin(**inputs).loss.backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in twin.parameters())
    vs.unstream(twin)


def test_gradient_checkpointing_flags_do_not_recompute_twice():
    model = vs.stream(make_model(), chunk_size=4)
    model.gradient_checkpointing_enable()
    rows = 0

    def count(module, args, output):
        nonlocal rows
        rows += args[0].shape[1]

    model.model.layers[0].self_attn.o_proj.register_forward_hook(count)
    model.train()
    model(**packed_row([5, 6])).loss.backward()
    assert rows == 2 * 11  # forward and recomputation


def test_parameter_hooks_fire_once():
    model = vs.stream(make_model(), chunk_size=2)
    fired = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: fired.append(name))
    model(**packed_row([5, 6])).loss.backward()
    assert sorted(fired) == sorted(name for name, _ in model.named_parameters())


def test_autograd_grad_and_input_gradients():
    model = vs.stream(make_twin(), chunk_size=4)
    inputs = packed_row([5, 6])
    embeds = model.model.embed_tokens(inputs.pop("input_ids")).detach().requires_grad_()
    loss = model(inputs_embeds=embeds, **inputs).loss
    (grad,) = torch.autograd.grad(loss, embeds, retain_graph=True)
    loss.backward()
    assert_exact(embeds.grad, grad)


def test_torch_compile_leaves_the_chunk_loop_alone():
    model = vs.stream(make_twin(), chunk_size=4)
    compiled = torch.compile(model, backend="aot_eager")
    for lengths in ([5, 9], [6, 2, 3]):
        inputs = packed_row(lengths)
        _, grads = loss_and_gradients(model, **inputs)
        expected = {name: grad.clone() for name, grad in grads.items()}
        model.zero_grad()
        compiled(**inputs).loss.backward()
        name, error = worst_gradient(((n, p.grad) for n, p in model.named_parameters()), expected)
        assert error <= 1e-12, f"{name}: {error:.2e}"


def test_compiled_layers_are_as_exact():
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    twin, inputs = make_twin(), packed_row([7, 4])
    streamed = vs.stream(copy.deepcopy(twin), chunk_size=6, compile="eager")
    _, grads = loss_and_gradients(vs.stream(twin, chunk_size=6), **inputs)
    _, got = loss_and_gradients(streamed, **inputs)
    name, error = worst_gradient(got.items(), grads)
    assert error <= 1e-12, f"{name}: {error:.2e}"
    assert counters["stats"]["unique_graphs"] > 0
    with pytest.raises(ValueError, match="compile must be a bool or one of"):
        vs.stream(twin, compile="no such backend")


def test_all_labels_ignored_gives_zero():
    model = vs.stream(make_model(), chunk_size=4)
    inputs = packed_row([5, 6])
    inputs["labels"][:] = -100
    loss = model(**inputs).loss
    loss.backward()
    assert loss.item() == 0.0
    assert all((p.grad == 0).all() for p in model.parameters())


def test_all_padding_batch():
    model = vs.stream(make_model(), chunk_size=4)
    ids = torch.randint(50, (2, 5))
    loss = model(ids, attention_mask=torch.zeros_like(ids), labels=ids).loss
    loss.backward()
    assert loss.item() == 0.0
    assert all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)


IDS = torch.randint(50, (2, 6))
BAD_CALLS = {
    "both": (
        {"inputs_embeds": torch.zeros(2, 6, 32)},
        "exactly one of input_ids and inputs_embeds",
    ),
    "mask_4d": (
        {"attention_mask": torch.ones(2, 1, 6, 6)},
        r"attention_mask must be 2-D of shape \(2, 6\)",
    ),
    "mask_shape": (
        {"attention_mask": torch.ones(2, 7)},
        r"attention_mask must be 2-D of shape \(2, 6\), got \(2, 7\)",
    ),
    "mask_type": (
        {"attention_mask": {"full_attention": None}},
        "attention_mask must be a torch.Tensor, got dict",
    ),
    "positions": (
        {"position_ids": torch.zeros(2, 5, dtype=torch.int64)},
        r"position_ids must have shape \(2, 6\)",
    ),
    "hidden": ({"output_hidden_states": True}, "output_hidden_states=True is not available"),
    "attentions": ({"output_attentions": True}, "output_attentions=True is not available"),
    "noncausal": ({"is_causal": False}, "is_causal=False is not available"),
    "unknown": ({"mystery": 3}, "can't honour the argument mystery"),
    "cu_batch": (
        {"cu_seq_lens_q": IDS[0].int(), "cu_seq_lens_k": IDS[0].int()},
        "cu_seq_lens_q needs a batch of 1",
    ),
    "cu_alone": ({"cu_seq_lens_q": IDS[0].int()}, "must be given together"),
    "ids_dims": ({"input_ids": IDS[0]}, r"input_ids must have 2 dimensions \(B, S\)"),
    "ids_type": ({"input_ids": [1]}, "input_ids must be a torch.Tensor, got list"),
    "positions_dtype": ({"position_ids": torch.zeros(2, 6)}, "position_ids must have dtype int64"),
    "additive": (
        {"attention_mask": torch.full((2, 6), -1e9)},
        "attention_mask of dtype torch.float32 must hold 0 and 1",
    ),
    "cu_type": (
        {"cu_seq_lens_q": [0, 6], "cu_seq_lens_k": [0, 6]},
        "cu_seq_lens_q must be a torch.Tensor, got list",
    ),
    "labels_dtype": ({"labels": IDS.float()}, "labels must have dtype int64, int32, got float32"),
    "shift_shape": ({"shift_labels": IDS.t()}, "shift_labels must have size 2 in dimension 0"),
    "shift_dims": ({"shift_labels": IDS[0]}, "shift_labels must have 2 dimensions"),
    "labels": ({"labels": IDS[:, :5]}, "labels must have size 6 in dimension 1"),
}


@pytest.mark.parametrize(("change", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_refused_calls(change, message):
    model = vs.stream(make_model(), chunk_size=4)
    with pytest.raises((TypeError, ValueError), match=message):
        model(**({"input_ids": IDS, "labels": IDS} | change))


def test_a_window_over_gaps_is_refused():
    model = vs.stream(make_model("qwen2_window"), chunk_size=4)
    mask = torch.ones_like(IDS)
    mask[0, 2] = 0
    with pytest.raises(ValueError, match="a sliding window counts as keys"):
        model(IDS, attention_mask=mask, labels=IDS)


def test_a_loss_of_the_users_own_is_refused():
    model = vs.stream(make_model(), chunk_size=4)
    model.loss_function = lambda logits, labels, **_: logits.sum()
    with pytest.raises(UnsupportedModelError, match="model.loss_function is <lambda>"):
        model(IDS, labels=IDS)


def swap(path, module):
    def change(model):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, module)

    return change


LAYER = "model.layers.1"


def subclass(path):
    """Give a module a class of the user's own, whose forward streaming would never call."""

    def change(model):
        module = model.get_submodule(path)
        module.__class__ = type("Mine", (type(module),), {"__module__": "mine"})

    return change


def instance_forward(path):
    def change(model):
        module = model.get_submodule(path)
        module.forward = module.forward

    return change


def hook(path):
    return lambda model: model.get_submodule(path).register_forward_hook(lambda *_: None)


def bidirectional(model):
    model.get_submodule(f"{LAYER}.self_attn").is_causal = False


def no_registry(model):
    model._supports_attention_backend = False


def own_attention(model):
    model.config._attn_implementation = "mine"


UNSUPPORTED = {
    "layer_class": (subclass(LAYER), f"{LAYER} is a mine.Mine, not a class of transformers"),
    "attention_class": (subclass(f"{LAYER}.self_attn"), f"{LAYER}.self_attn is a mine.Mine"),
    "layer_forward": (instance_forward(LAYER), f"{LAYER} has a forward set on the instance"),
    "backbone_forward": (instance_forward("model"), "model has a forward set on the instance"),
    "head_hook": (hook("lm_head"), "lm_head has hooks"),
    "bidirectional": (bidirectional, f"{LAYER}.self_attn isn't causal"),
    "own_attention": (own_attention, "attention implementation 'mine' isn't one"),
    "no_registry": (no_registry, "LlamaForCausalLM doesn't take its attention from"),
    "mlp_projection": (
        swap(f"{LAYER}.mlp.up_proj", nn.Conv1d(1, 1, 1)),
        f"{LAYER}.mlp.up_proj is a torch.nn.modules.conv.Conv1d, a part",
    ),
    "head": (swap("lm_head", nn.Sequential()), "lm_head is a Sequential, not a plain nn.Linear"),
    "projection": (
        swap(f"{LAYER}.self_attn.q_proj", nn.LSTM(2, 2)),
        f"{LAYER}.self_attn.q_proj is a torch.nn.modules.rnn.LSTM, a part",
    ),
    "extra": (swap(f"{LAYER}.adapter", nn.BatchNorm1d(2)), f"{LAYER}.adapter is a torch"),
    "two_attentions": (
        swap(f"{LAYER}.cross", nn.MultiheadAttention(2, 1)),
        "LlamaDecoderLayer has 2 attention modules",
    ),
    "backbone": (swap("model.extra", nn.Identity()), "model.extra is a part"),
    "beside": (swap("extra", nn.Identity()), "extra is a part that streaming"),
    "two_lists": (swap("model.more", nn.ModuleList()), "model has 2 lists of layers and 1 norms"),
    "two_norms": (swap("model.last", nn.LayerNorm(2)), "model has 1 lists of layers and 2 norms"),
    "no_attention": (
        swap(f"{LAYER}.self_attn", nn.Identity()),
        "LlamaDecoderLayer has 0 attention modules",
    ),
    "model_class": (subclass(""), "the model is a mine.Mine"),
    "model_forward": (instance_forward(""), "the model has a forward set on the instance"),
    "fused_head": (fuse_head, "the model has a fused head; call unfuse_head first"),
}


@pytest.mark.parametrize(("change", "message"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_unsupported_models_are_refused_untouched(change, message):
    model = make_model()
    change(model)
    before = {name: dict(m.__dict__) for name, m in model.named_modules()}
    with pytest.raises(UnsupportedModelError, match=message):
        vs.stream(model)
    assert {name: dict(m.__dict__) for name, m in model.named_modules()} == before


ASKING = {
    # A window that only its mask knows, sinks, attention of another kind, a mask taken apart
    "Phimoe": ({"sliding_window": 5}, r"PhimoeAttention has a mask beside .* it names \(None\)"),
    "GptOss": ({"head_dim": 8, "num_local_experts": 2}, "GptOssAttention uses s_aux"),
    "MiniMax": (
        {"layer_types": ["full_attention", "linear_attention"], "head_dim": 8},
        "MiniMaxLightningAttention doesn't take its attention from transformers' registry",
    ),
    "Doge": ({}, "DogeModel can't be run on two tokens up to its attention"),
}


@pytest.mark.parametrize("family", ASKING)
def test_what_layers_ask_of_their_attention(family):
    """Found when the model is streamed, not when it is called."""
    changes, message = ASKING[family]
    config = getattr(transformers, f"{family}Config")
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = getattr(transformers, f"{family}ForCausalLM")(config(**SIZES | tokens | changes))
    before = {name: dict(m.__dict__) for name, m in model.named_modules()}
    state = torch.get_rng_state()
    with pytest.raises(UnsupportedModelError, match=message):
        vs.stream(model)
    assert {name: dict(m.__dict__) for name, m in model.named_modules()} == before
    assert model.config._attn_implementation != "varstream_probe"
    assert torch.equal(torch.get_rng_state(), state)


def test_a_window_that_the_mask_alone_knows_may_be_off():
    changes = {"sliding_window": None, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.PhimoeConfig(**SIZES | changes, num_local_experts=2)
    vs.stream(transformers.PhimoeForCausalLM(config))


def test_what_would_be_bypassed_is_refused_at_the_call_too():
    model = vs.stream(make_model(), chunk_size=4)
    hook("lm_head")(model)
    with pytest.raises(UnsupportedModelError, match="lm_head has hooks"):
        model(IDS, labels=IDS)


def test_an_empty_batch():
    model = vs.stream(make_model(), chunk_size=4)
    ids = torch.zeros(2, 0, dtype=torch.int64)
    assert model(ids, labels=ids).loss.item() == 0.0
    assert model.model(ids).last_hidden_state.shape == (2, 0, 32)


def test_not_a_model():
    with pytest.raises(ValueError, match=r"Linear \(model type None\) has no decoder with a head"):
        vs.stream(nn.Linear(3, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"head_chunk_size": 0}, "head_chunk_size must be at least 1"),
        ({"offload": True}, "offload=True is not available"),
        ({"memory_budget": 0}, "memory_budget must be >= 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        vs.stream(make_model(), **options)
