"""Embeddings without kept activations: the gradients of one large forward, at a sub-batch's
memory."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from encoder_models import FIRST_KEPT, MASK, VOCAB, assert_gradients, make
from torch import nn

import varstream as vs
from varstream import batching
from varstream.objectives import cached_embeddings, contrastive
from varstream.testing import assert_exact, peak_memory


class Towers(nn.Module):
    """A small encoder of rows with dropout."""

    def __init__(self, width=5, inner=16, p=0.0, dtype=torch.float64):
        super().__init__()
        self.first = nn.Linear(width, inner, dtype=dtype)
        self.dropout = nn.Dropout(p)
        self.last = nn.Linear(inner, 4, bias=False, dtype=dtype)
        self.calls = []

    def forward(self, x):
        self.calls.append(torch.is_grad_enabled())
        return self.last(self.dropout(self.first(x).tanh()))


def split(rows, *sizes):
    return list(rows.split(sizes))


def grads(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


def assert_same(found, expected, tolerance=1e-12):
    for a, b in zip(found, expected, strict=True):
        assert_exact(a, b, tolerance)


QUERIES, KEYS = torch.randn(9, 5, dtype=torch.float64), torch.randn(13, 5, dtype=torch.float64)


@pytest.mark.parametrize("sizes", [(9,), (4, 5), (1, 0, 7, 1), (1,) * 9])
def test_gradients_of_one_forward(sizes):
    model = Towers()
    want = grads(model, contrastive(model(QUERIES), model(KEYS), symmetric=True))
    model.calls.clear()
    queries = cached_embeddings(model, split(QUERIES, *sizes))
    keys = cached_embeddings(model, split(KEYS, 6, 7))
    loss = contrastive(queries, keys, symmetric=True)
    assert model.calls == [False] * (len(sizes) + 2)
    assert_same(grads(model, loss), want)
    assert model.calls == [False] * (len(sizes) + 2) + [True] * (len(sizes) + 2)


def test_plain_backward_adds_to_the_gradients():
    model = Towers()
    want = grads(model, contrastive(model(QUERIES), model(KEYS)))
    for times in (1, 2):
        queries, keys = (cached_embeddings(model, [rows]) for rows in (QUERIES, KEYS))
        contrastive(queries, keys).backward()
        assert_same([p.grad for p in model.parameters()], [times * g for g in want])


def test_a_graph_around_it():
    """Rows used twice, beside an ordinary use of the same encoder."""
    model = Towers()

    def loss(rows, others):
        return contrastive(rows, others) + rows.square().sum() + model(KEYS[:3]).sum()

    want = grads(model, loss(model(QUERIES), model(KEYS)))
    parts = [cached_embeddings(model, split(r, 3, len(r) - 3)) for r in (QUERIES, KEYS)]
    assert_same(grads(model, loss(*parts)), want)


def test_dropout_is_replayed():
    model = Towers(p=0.4)
    torch.manual_seed(5)
    parts = [model(rows) for rows in split(KEYS, 6, 5, 2)]
    after = torch.rand(3)
    want = grads(model, contrastive(parts[0], torch.cat(parts)))
    torch.manual_seed(5)
    keys = cached_embeddings(model, split(KEYS, 6, 5, 2))
    assert torch.equal(torch.rand(3), after)
    loss = contrastive(keys[:6], keys)
    state = torch.get_rng_state()
    assert_same(grads(model, loss), want)
    assert torch.equal(torch.get_rng_state(), state)


def test_backward_again():
    model = Towers(p=0.4)
    loss = cached_embeddings(model, split(KEYS, 6, 7)).square().sum()
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    torch.rand(7)
    assert_same(grads(model, loss), first, 0.0)


@pytest.mark.parametrize("inside", [False, True])
def test_autocast(inside):
    """The repetition is under the autocast of the forward, wherever the backward is called."""
    model = Towers(dtype=torch.float32)
    rows = KEYS.float()

    def step(embed):
        with torch.autocast("cpu", torch.bfloat16):
            found = embed()
            loss = contrastive(found[:5], found)
            if inside:
                return found, grads(model, loss)
        return found, grads(model, loss)

    plain, want = step(lambda: model(rows))
    cached, got = step(lambda: cached_embeddings(model, [rows]))
    assert cached.dtype == torch.bfloat16 and torch.equal(cached, plain)
    assert_same(got, want, 0.0)
    _, parts = step(lambda: cached_embeddings(model, split(rows, 6, 7)))
    assert_same(parts, want, 2e-2)


def test_sums_are_wide():
    """Sub-batches' gradients are rounded once, not after each addition."""
    model = Towers(dtype=torch.bfloat16)
    exact = copy.deepcopy(model).double()
    rows = KEYS.bfloat16().repeat(20, 1)
    cached_embeddings(model, list(rows.split(1))).float().sum().backward()
    exact(rows.double()).sum().backward()
    for p, q in zip(model.parameters(), exact.parameters(), strict=True):
        assert p.grad.dtype == torch.bfloat16
        assert_exact(p.grad, q.grad, 2 * torch.finfo(torch.bfloat16).eps)


def test_frozen_and_unused_parameters():
    model = Towers()
    unused = nn.Parameter(torch.ones(2))
    model.first.weight.requires_grad_(False)
    twice = [*model.parameters(), *model.parameters(), unused, unused]
    cached_embeddings(model, [KEYS], params=twice).sum().backward()
    (want,) = torch.autograd.grad(model(KEYS).sum(), model.last.weight)
    assert model.first.weight.grad is None
    assert_exact(model.last.weight.grad, want)
    assert unused.grad.shape == (2,) and not unused.grad.any()
    with torch.no_grad():
        assert not cached_embeddings(model, [KEYS]).requires_grad
    model.requires_grad_(False)
    assert not cached_embeddings(model, [KEYS]).requires_grad


def test_hooks_see_one_gradient():
    model, seen = Towers(), []
    weight = model.last.weight
    weight.register_hook(lambda grad: seen.append("tensor"))
    weight.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))
    cached_embeddings(model, split(KEYS, 6, 5, 2)).sum().backward()
    assert seen == ["tensor", "accumulated"]


def test_a_function_over_some_parameters():
    model = Towers()

    def encode(batch):
        return model(batch["rows"]) * batch["scale"]

    batches = [{"rows": KEYS[:4], "scale": 2.0}, {"rows": KEYS[4:], "scale": 2.0}]
    found = cached_embeddings(encode, iter(batches), params=[model.last.weight])
    (got,) = torch.autograd.grad(found.square().sum(), model.last.weight)
    (want,) = torch.autograd.grad((2 * model(KEYS)).square().sum(), model.last.weight)
    assert_exact(got, want)


# --- a padding-free encoder -----------------------------------------------------------------------


def pooled(model):
    """Means over real tokens of what an encoder gives."""

    def encode(batch):
        mask = batch["attention_mask"][..., None]
        hidden = model(**batch).last_hidden_state
        return (hidden * mask).sum(1) / mask.sum(1)

    return encode


def test_padding_free_encoder_with_token_budget():
    """Sub-batches of at most 12 real tokens against one padded forward of the padded model."""
    dense = make(pooler=False)
    model = vs.padding_free(copy.deepcopy(dense))
    mask = MASK.repeat(3, 1)
    inputs = {"input_ids": torch.randint(2, VOCAB, mask.shape), "attention_mask": mask}
    packing = batching.next_fit(mask.sum(1), 12)
    batches = [{name: x[bin] for name, x in inputs.items()} for bin in packing.bins]
    assert len(batches) > 5

    def loss(rows):
        return contrastive(rows[:7], rows[7:], symmetric=True)

    found = cached_embeddings(pooled(model), batches, params=model.parameters())
    want = pooled(dense)(inputs)
    assert_exact(found, want)
    got = loss(found)
    got.backward()
    loss(want).backward()
    assert_gradients(
        {name: p.grad for name, p in model.named_parameters()},
        {name: p.grad for name, p in dense.named_parameters()},
    )


def test_padding_free_encoder_with_dropout():
    model = vs.padding_free(
        make(pooler=False, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3)
    )
    ids = torch.randint(2, VOCAB, FIRST_KEPT.shape)
    inputs = {"input_ids": ids, "attention_mask": FIRST_KEPT}
    batches = [{name: x[part] for name, x in inputs.items()} for part in ([0, 1], [2], [3])]
    torch.manual_seed(3)
    want = torch.cat([pooled(model)(batch) for batch in batches])
    contrastive(want[:2], want).backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    torch.manual_seed(3)
    found = cached_embeddings(pooled(model), batches, params=model.parameters())
    contrastive(found[:2], found).backward()
    assert torch.equal(found, want)
    assert_gradients({name: p.grad for name, p in model.named_parameters()}, expected)


def test_memory_of_one_sub_batch():
    """Peak of a step against the activations of one forward: those of a part, whatever the rows."""
    model = Towers(width=8, inner=512, dtype=torch.float32)
    rows = torch.randn(512, 8)

    def peak(embed, rows):
        def step():
            found = embed(rows)
            contrastive(found, found, chunk_size=16).backward()

        step()  # gradients exist from now on
        return peak_memory(step)

    def cached(rows):
        return cached_embeddings(model, list(rows.split(32)))

    one = peak(model, rows[:32])
    weights = sum(p.numel() for p in model.parameters()) * 4
    # Embeddings, their gradients and the logits' chunk, and what sums the parameters' gradients.
    rest = 512 * 4 * 4 * 12 + 16 * 512 * 4 * 4 + 4 * weights
    assert peak(cached, rows) < one + rest
    assert peak(model, rows) > 3 * (one + rest)


# --- distributed data parallel --------------------------------------------------------------------


class Step(nn.Module):
    """What is wrapped in place of the encoder."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, queries, keys):
        return contrastive(
            *(cached_embeddings(self.encoder, list(rows.split(4))) for rows in (queries, keys))
        )


def test_data_parallel(monkeypatch):
    """Gradients leave once, so the reducer of DistributedDataParallel is content."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = Towers()
        want = grads(model, contrastive(model(QUERIES), model(KEYS)))
        step = nn.parallel.DistributedDataParallel(Step(model))
        step(QUERIES, KEYS).backward()
        assert_same([p.grad for p in model.parameters()], want)
        with pytest.raises(ValueError, match="encode must not be a DistributedDataParallel"):
            cached_embeddings(nn.parallel.DistributedDataParallel(model), [KEYS])
    finally:
        dist.destroy_process_group()


def test_outside_compiled_graphs():
    model = Towers()
    want = cached_embeddings(model, [KEYS])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step = torch.compile(lambda rows: cached_embeddings(model, [rows]) * 2, backend="eager")
        assert_exact(step(KEYS), 2 * want)


# --- refusals -------------------------------------------------------------------------------------


def encode_of(*results):
    """Returns one result after the other."""
    left = list(results)
    return lambda batch: left.pop(0)


ROWS = torch.zeros(2, 3)
WRONG = {
    "encode": (TypeError, "encode must be a module or a function, got int", 3, [ROWS], []),
    "params": (TypeError, "params must be given where encode isn't", len, [ROWS], None),
    "params_kind": (TypeError, "params must be a list of tensors, got Tensor", len, [ROWS], ROWS),
    "params_item": (TypeError, r"params\[1\] must be a torch.Tensor", len, [ROWS], [ROWS, 1]),
    "tensor": (TypeError, "batches must be a list of sub-batches, got Tensor", len, ROWS, []),
    "mapping": (TypeError, "sub-batches, got dict", len, {"rows": ROWS}, []),
    "empty": (ValueError, "batches must hold at least one sub-batch, got none", len, [], []),
    "grad": (
        ValueError,
        r"batches\[1\] must not require gradients: .* tensor of shape \(2, 3\)",
        len,
        [ROWS, {"x": [ROWS, ROWS.clone().requires_grad_()]}],
        [],
    ),
    "kind": (TypeError, r"encode must return a torch.Tensor \(n, d\), got int", len, [ROWS], []),
    "dim": (
        ValueError,
        r"encode must return floating embeddings \(n, d\), got torch.float32 of shape \(2,\)",
        encode_of(ROWS[:, 0]),
        [ROWS],
        [],
    ),
    "integers": (ValueError, "got torch.int64", encode_of(ROWS.long()), [ROWS], []),
    "width": (
        ValueError,
        r"the same width, dtype and device .* got 2, .* for batches\[1\] and 3, ",
        encode_of(ROWS, ROWS[:, :2]),
        [ROWS, ROWS],
        [],
    ),
    "dtype": (ValueError, "float64, cpu for", encode_of(ROWS, ROWS.double()), [ROWS] * 2, []),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors(name):
    kind, message, encode, batches, params = WRONG[name]
    with pytest.raises(kind, match=message):
        cached_embeddings(encode, batches, params=params)


def test_errors_of_the_backward():
    weight = torch.ones(3, requires_grad=True)
    for again, got in (
        (ROWS[:1] * weight, r"float32 \(1, 3\)"),
        (ROWS.double(), "float64"),
        (7, ""),
    ):
        found = cached_embeddings(encode_of(ROWS * weight, again), [ROWS], params=[weight])
        message = rf"the same again in the backward: torch.float32 \(2, 3\) for batches\[0\].*{got}"
        with pytest.raises(RuntimeError, match=message):
            found.sum().backward()
    found = cached_embeddings(lambda x: x * weight, [ROWS], params=[weight])
    with pytest.raises(RuntimeError, match="cached embeddings have no second derivative"):
        torch.autograd.grad(found.sum(), weight, create_graph=True)
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.sum().backward()
