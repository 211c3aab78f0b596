"""The contrastive loss against its dense form: values, gradients, memory, refusals."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from varstream.objectives import contrastive
from varstream.testing import assert_error_ratio, assert_exact, peak_memory

Q, K, D = 7, 11, 6
POSITIVES = torch.tensor([3, 10, 0, 5, 8, 2, 1])
SOME = torch.tensor([3, -100, 0, 5, -100, 2, 1])


def embeddings(dtype=torch.float64, queries=Q, keys=K, width=D):
    return [
        torch.randn(n, width, dtype=torch.float64).to(dtype).requires_grad_()
        for n in (queries, keys)
    ]


def dense(
    queries, keys, temperature=0.05, similarity="cosine", positives=None, symmetric=False, **_
):
    """With all logits, in the dtype of the rows."""
    if similarity == "cosine":
        queries, keys = normalize(queries, dim=1), normalize(keys, dim=1)
    own = torch.arange(queries.shape[0])
    target = own if positives is None else positives.long()
    loss = cross_entropy(queries @ keys.t() / temperature, target)
    if not symmetric:
        return loss
    back = keys[target.clamp(min=0)] @ queries.t() / temperature
    return (loss + cross_entropy(back, own.where(target >= 0, -100))) / 2


CASES = {
    "default": {},
    "temperature": {"temperature": 0.7},
    "dot": {"similarity": "dot", "temperature": 1.5},
    "positives": {"positives": POSITIVES},
    "int32": {"positives": POSITIVES.int()},
    "ignored": {"positives": SOME},
    "shared": {"positives": torch.tensor([4, 4, 0, 0, 0, 10, 4])},
    "symmetric": {"symmetric": True},
    "symmetric_positives": {"symmetric": True, "positives": POSITIVES, "similarity": "dot"},
    "symmetric_ignored": {"symmetric": True, "positives": SOME},
    "chunks": {"chunk_size": 2, "symmetric": True, "temperature": 0.3},
}


def both(options, leaves):
    got, want = contrastive(*leaves, **options), dense(*leaves, **options)
    return got, want, *(torch.autograd.grad(loss, leaves) for loss in (got, want))


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_equals_the_dense_loss(options):
    got, want, found, expected = both(options, embeddings())
    assert got.shape == () and got.dtype == torch.float64
    assert_exact(got, want)
    for a, b in zip(found, expected, strict=True):
        assert_exact(a, b)


def test_gradcheck():
    for options in ({"temperature": 0.5}, {"temperature": 0.5, "symmetric": True}):
        assert torch.autograd.gradcheck(
            lambda q, k, options=options: contrastive(q, k, **options), embeddings()
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["default", "dot", "symmetric"])
def test_low_precision(name, dtype):
    options = CASES[name] | {"temperature": 0.5}
    leaves = embeddings(dtype, 64, 80, 32)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    got, common, found, plain = both(options, leaves)
    want = dense(*exact, **options)
    assert got.dtype == torch.float32
    assert_error_ratio(got, common, want)
    for a, b, c, leaf in zip(found, plain, torch.autograd.grad(want, exact), leaves, strict=True):
        assert a.dtype == leaf.dtype
        assert_error_ratio(a, b, c)


@pytest.mark.parametrize("size", [1e-7, 1e4])
def test_lengths_beyond_float16(size):
    queries, keys = (x.detach() for x in embeddings(torch.float64, 64, 80, 32))
    rows = [(x * size).half() for x in (queries, keys)]
    got = contrastive(*rows, temperature=0.5)
    assert_exact(got, dense(*(x.double() for x in rows), temperature=0.5), 1e-3)


def test_autocast():
    queries, keys = embeddings(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = contrastive(queries, keys.bfloat16(), symmetric=True)
    loss.backward()
    assert loss.dtype == torch.float32 and keys.grad.dtype == torch.float32
    assert_exact(loss, dense(queries, keys, symmetric=True), 2e-2)


def test_learned_temperature():
    """As the text says it is written."""
    leaves = [*embeddings(), torch.tensor(2.3, dtype=torch.float64, requires_grad=True)]

    def rows(queries, keys, scale):
        return normalize(queries, dim=1) * scale.exp(), normalize(keys, dim=1)

    options = {"similarity": "dot", "temperature": 1.0}
    pairs = (contrastive, dense)
    losses = [loss(*rows(*leaves), **options) for loss in pairs]
    for a, b in zip(*(torch.autograd.grad(loss, leaves) for loss in losses), strict=True):
        assert_exact(a, b)


@pytest.mark.parametrize("symmetric", [False, True])
def test_rows_of_zeros_are_similar_to_nothing(symmetric):
    """An empty text's embedding: no gradient, and the others' as in the dense loss."""
    queries, keys = embeddings()
    with torch.no_grad():
        queries[2] = 0
        keys[4] = 0
    options = {"symmetric": symmetric}
    got, want, found, expected = both(options, [queries, keys])
    assert_exact(got, want)
    assert not found[0][2].any() and not found[1][4].any()
    for a, b, zero in zip(found, expected, (2, 4), strict=True):
        rest = torch.arange(a.shape[0]) != zero
        assert_exact(a[rest], b[rest])
    assert contrastive(queries * torch.nan, keys).isnan()


def test_nothing_to_compare():
    queries, keys = embeddings()
    for symmetric in (False, True):
        none = contrastive(queries[:0], keys, symmetric=symmetric)
        ignored = contrastive(queries, keys, positives=torch.full((Q,), -100), symmetric=symmetric)
        for loss in (none, ignored):
            assert loss == 0
            assert not any(g.any() for g in torch.autograd.grad(loss, [queries, keys]))
    assert contrastive(queries[:1], keys[:1]) == 0


def test_frozen_keys():
    queries, keys = embeddings()
    want = torch.autograd.grad(dense(queries, keys), queries)[0]
    loss = contrastive(queries, keys.detach())
    assert_exact(torch.autograd.grad(loss, queries)[0], want)
    with torch.no_grad():
        assert not contrastive(queries, keys).requires_grad


def test_memory_is_that_of_a_chunk():
    queries, keys = embeddings(torch.float32, 2048, 2048, 16)
    whole = 2048 * 2048 * 4
    for symmetric in (False, True):
        peak = peak_memory(
            lambda symmetric=symmetric: contrastive(
                queries, keys, chunk_size=64, symmetric=symmetric
            ).backward()
        )
        assert peak < whole / 4
    assert peak_memory(lambda: dense(queries, keys).backward()) > whole


def test_compiles():
    for options in (CASES["default"], CASES["symmetric_positives"]):
        leaves = embeddings()
        compiled = torch.compile(contrastive, fullgraph=True, backend="aot_eager")
        got = compiled(*leaves, **options)
        assert_exact(got, dense(*leaves, **options))
        wanted = torch.autograd.grad(dense(*leaves, **options), leaves)
        for a, b in zip(torch.autograd.grad(got, leaves), wanted, strict=True):
            assert_exact(a, b)


def test_no_second_derivative():
    queries, keys = embeddings()
    (grad,) = torch.autograd.grad(contrastive(queries, keys), queries, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.square().sum().backward()


WRONG = {
    "kind": (TypeError, "queries must be a torch.Tensor, got list", {"queries": [1.0]}),
    "queries": (ValueError, r"queries must have 2 dimensions \(Q, d\)", {"queries": (Q,)}),
    "keys": (ValueError, r"keys must have 2 dimensions \(K, d\)", {"keys": (K, D, 1)}),
    "width": (ValueError, r"keys must have size 6 in dimension 1 \(K, d\)", {"keys": (K, 5)}),
    "dtype": (
        ValueError,
        "keys must have the dtype of queries",
        {"keys": torch.zeros(K, D, dtype=torch.float32)},
    ),
    "integers": (
        ValueError,
        "queries must have dtype float64, float32, bfloat16, float16, got int64",
        {"queries": torch.zeros(Q, D, dtype=torch.int64)},
    ),
    "few": (
        ValueError,
        "keys must have a row for each of the 7 queries, or positives must be given, got 6 rows",
        {"keys": (6, D)},
    ),
    "none": (
        ValueError,
        r"keys must have at least one row \(K, d\), got none",
        {"queries": (0, D), "keys": (0, D)},
    ),
    "temperature": (ValueError, "temperature must be above 0, got 0.0", {"temperature": 0.0}),
    "tensor": (TypeError, "temperature must be a number", {"temperature": torch.tensor(1.0)}),
    "similarity": (
        ValueError,
        "similarity must be 'cosine' or 'dot', got 'l2'",
        {"similarity": "l2"},
    ),
    "symmetric": (TypeError, "symmetric must be a bool, got int", {"symmetric": 1}),
    "chunk_size": (ValueError, "chunk_size must be >= 1, got 0", {"chunk_size": 0}),
    "shape": (
        ValueError,
        r"positives must have size 7 in dimension 0 \(Q,\)",
        {"positives": torch.zeros(6, dtype=torch.int64)},
    ),
    "floating": (
        ValueError,
        "positives must have dtype int64, int32, got float32",
        {"positives": torch.zeros(Q)},
    ),
    "range": (
        ValueError,
        r"positives must be in \[0, K\) = \[0, 11\) or -100, got 11",
        {"positives": POSITIVES + 1},
    ),
    "negative": (ValueError, "or -100, got -1", {"positives": POSITIVES - 1}),
    "group": (ValueError, "group needs gather=True", {"group": "world"}),
    "gather": (TypeError, "gather must be a bool, got int", {"gather": 1}),
    "initialised": (
        ValueError,
        "group must be a process group of torch.distributed, which has to be initialised",
        {"gather": True},
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors(name):
    kind, message, changes = WRONG[name]
    queries, keys = embeddings()
    arguments = {"queries": queries, "keys": keys} | {
        key: torch.zeros(value, dtype=torch.float64) if isinstance(value, tuple) else value
        for key, value in changes.items()
    }
    with pytest.raises(kind, match=message):
        contrastive(**arguments)
