"""Buckets of distances are those of transformers' own models."""

import pytest
import torch

from varstream.encoder.buckets import deberta_buckets, mpnet_buckets

deberta = pytest.importorskip("transformers.models.deberta.modeling_deberta")
deberta_v2 = pytest.importorskip("transformers.models.deberta_v2.modeling_deberta_v2")
mpnet = pytest.importorskip("transformers.models.mpnet.modeling_mpnet")


def matrix(buckets, n):
    """Entry (i, j) of the distances j - i, for a sequence of n."""
    at = torch.arange(n)
    return buckets[buckets.shape[0] // 2 + at[None, :] - at[:, None]]


@pytest.mark.parametrize(("rows", "farthest"), [(32, 128), (32, 20), (8, 9), (64, 1000)])
@pytest.mark.parametrize("longest", [1, 2, 40, 600])
def test_mpnet(longest, rows, farthest):
    at = torch.arange(longest)
    want = mpnet.MPNetEncoder.relative_position_bucket(
        at[None, :] - at[:, None], num_buckets=rows, max_distance=farthest
    )
    got = mpnet_buckets(longest, rows, farthest)
    assert got.dtype == torch.int64 and got.shape == (2 * longest - 1,)
    assert torch.equal(matrix(got, longest), want)
    assert torch.equal(matrix(mpnet_buckets(longest + 7, rows, farthest), longest), want)


@pytest.mark.parametrize(("buckets", "farthest"), [(256, 512), (32, 512), (4, 100), (20, 12)])
@pytest.mark.parametrize("longest", [1, 2, 40, 600])
def test_deberta_v2(longest, buckets, farthest):
    rows = torch.zeros(1, longest, 4)
    back = deberta_v2.build_relative_position(rows, rows, buckets, farthest)[0]
    want = (back + buckets).clamp(0, 2 * buckets - 1)  # content to position, for (i, j)
    got = deberta_buckets(longest, buckets, farthest)
    assert got.dtype == torch.int64 and got.shape == (2 * longest - 1,)
    assert torch.equal(matrix(got, longest), want)
    # position to content: gathered with (j, i) of the negated distance, and transposed
    assert torch.equal(matrix(got, longest), (buckets - back).clamp(0, 2 * buckets - 1).t())


@pytest.mark.parametrize("farthest", [512, 24, 1])
@pytest.mark.parametrize("longest", [1, 2, 40, 600])
def test_deberta(longest, farthest):
    rows = torch.zeros(1, longest, 4)
    back = deberta.build_relative_position(rows, rows)[0]
    span = deberta.compute_attention_span(rows, rows, farthest)
    # the models take the middle of their table and number its rows from there
    want = (back + span).clamp(0, 2 * span - 1) + farthest - span
    assert torch.equal(matrix(deberta_buckets(longest, -1, farthest), longest), want)
    assert torch.equal(
        deberta_buckets(longest, 0, farthest), deberta_buckets(longest, -1, farthest)
    )


def test_no_length():
    assert mpnet_buckets(0).tolist() == [0]
    assert deberta_buckets(0, -1, 5).tolist() == [5]


BAD = {
    "rows": (ValueError, lambda: mpnet_buckets(4, 6), "num_buckets must be a multiple of 4, got 6"),
    "few": (ValueError, lambda: mpnet_buckets(4, 0), "num_buckets must be >= 4, got 0"),
    "near": (ValueError, lambda: mpnet_buckets(4, 32, 8), "max_distance must be >= 9, got 8"),
    "longest": (ValueError, lambda: mpnet_buckets(-1), "longest must be >= 0, got -1"),
    "type": (TypeError, lambda: deberta_buckets(4.0, 8, 8), "longest must be an int, got float"),
    "two": (ValueError, lambda: deberta_buckets(4, 3, 9), "position_buckets must be at least 4"),
    "wide": (ValueError, lambda: deberta_buckets(4, 16, 9), r"below .* = 16, got 16"),
    "none": (ValueError, lambda: deberta_buckets(4, 8, 0), "max_relative_positions must be >= 1"),
}


@pytest.mark.parametrize(("error", "call", "message"), BAD.values(), ids=BAD)
def test_errors(error, call, message):
    with pytest.raises(error, match=message):
        call()
