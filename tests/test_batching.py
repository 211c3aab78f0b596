"""Bin packing against naive packers, and the packed collator."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from varstream import batching

BF16 = torch.ones(1, dtype=torch.bfloat16)
PACKERS = [batching.best_fit_decreasing, batching.first_fit_decreasing, batching.next_fit]
ALL_PACKERS = [*PACKERS, batching.lpfhp]


@st.composite
def problems(draw):
    """(lengths, capacity, max_depth) with zeros, repeats and full documents."""
    capacity = draw(st.sampled_from([1, 2, 7, 63, 64, 65, 1000, 4096, 4097]))
    some = st.integers(0, capacity) | st.sampled_from([0, 1, capacity, (capacity + 1) // 2])
    lengths = draw(st.lists(some, max_size=120))
    return lengths, capacity, draw(st.none() | st.integers(1, 9))


def decreasing(lengths):
    return sorted(range(len(lengths)), key=lambda i: -lengths[i])  # stable


def naive_best_fit(lengths, capacity, max_depth):
    """The definition, in quadratic time: least room that fits, then the bin used last."""
    bins, room, used = [], [], []
    for clock, i in enumerate(decreasing(lengths)):
        fitting = [
            b
            for b in range(len(bins))
            if room[b] >= lengths[i] and (max_depth is None or len(bins[b]) < max_depth)
        ]
        if fitting:
            best = min(fitting, key=lambda b: (room[b], -used[b]))
        else:
            best = len(bins)
            bins.append([]), room.append(capacity), used.append(0)
        bins[best].append(i)
        room[best] -= lengths[i]
        used[best] = clock
    return bins


def naive_in_order(lengths, capacity, max_depth, documents, only_last):
    """First fit over all bins, or over the last one (next fit)."""
    bins, room = [], []
    for i in documents:
        start = max(len(bins) - 1, 0) if only_last else 0
        for b in range(start, len(bins)):
            if room[b] >= lengths[i] and (max_depth is None or len(bins[b]) < max_depth):
                break
        else:
            b = len(bins)
            bins.append([]), room.append(capacity)
        bins[b].append(i)
        room[b] -= lengths[i]
    return bins


def as_lists(packing):
    return [b.tolist() for b in packing.bins]


@settings(deadline=None, max_examples=300)
@given(problems())
def test_packers_equal_their_definitions(problem):
    lengths, capacity, depth = problem
    best, first, following = (as_lists(p(lengths, capacity, depth)) for p in PACKERS)
    assert best == naive_best_fit(lengths, capacity, depth)
    assert first == naive_in_order(lengths, capacity, depth, decreasing(lengths), False)
    assert following == naive_in_order(lengths, capacity, depth, range(len(lengths)), True)


@settings(deadline=None, max_examples=100)
@given(problems(), st.sampled_from(ALL_PACKERS), st.integers(0, 3))
def test_invariants(problem, packer, seed):
    lengths, capacity, depth = problem
    for packing in (
        packer(lengths, capacity, depth),
        packer(lengths, capacity, depth).shuffled(seed),
    ):
        bins = packing.bins
        assert sorted(i for b in bins for i in b.tolist()) == list(range(len(lengths)))
        tokens = [sum(lengths[i] for i in b) for b in bins]
        assert all(0 <= t <= capacity for t in tokens)
        assert all(len(b) >= 1 and b.dtype == np.int64 for b in bins)
        assert packing.tokens.tolist() == tokens
        assert packing.depth == max((len(b) for b in bins), default=0)
        assert depth is None or packing.depth <= depth
        assert packing.lower_bound <= len(bins)
        assert packing.attention_cost.tolist() == [sum(lengths[i] ** 2 for i in b) for b in bins]
        if len(bins):
            assert packing.fill == pytest.approx(sum(lengths) / (len(bins) * capacity))


@settings(deadline=None, max_examples=60)
@given(problems(), st.integers(21, 30))
def test_huge_capacities_pack_the_same(problem, shift):
    """Above a table's size the packer keeps rooms in a map: scaled problems must agree."""
    lengths, capacity, depth = problem
    scale = (2**31 - 1) // capacity if shift == 30 else 2**shift // capacity
    scaled = batching.best_fit_decreasing([n * scale for n in lengths], capacity * scale, depth)
    assert as_lists(scaled) == as_lists(batching.best_fit_decreasing(lengths, capacity, depth))


def test_fill_on_a_heavy_tail():
    lengths = np.random.default_rng(0).lognormal(np.log(300), 1.0, 100_000)
    packing = batching.best_fit_decreasing(np.clip(lengths.astype(np.int64), 1, 4096), 4096)
    assert len(packing.bins) <= packing.lower_bound * 1.0005 + 1
    assert packing.fill > 0.999


@pytest.mark.parametrize("packer", ALL_PACKERS)
def test_nothing_to_pack(packer):
    packing = packer([], 8)
    assert len(packing.bins) == 0
    assert (packing.fill, packing.depth, packing.lower_bound) == (1.0, 0, 0)
    assert packing.attention_cost.tolist() == []
    assert len(packing.shuffled(0).bins) == 0
    assert as_lists(packer([0, 0], 8)) == [[0, 1]]
    assert packer([0, 0], 8).lower_bound == 1


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor, lambda v: np.array(v, "u8")])
def test_kinds_of_lengths(kind):
    lengths = [5, 3, 0, 8]
    assert as_lists(batching.best_fit_decreasing(kind(lengths), 8)) == [[3], [0, 1, 2]]


def test_result_does_not_alias_the_argument():
    lengths = np.array([4, 2])
    packing = batching.best_fit_decreasing(lengths, 8)
    lengths[:] = 0
    assert packing.tokens.tolist() == [6]


def test_bins_are_a_sequence():
    packing = batching.next_fit([1] * 10, 3)
    assert [b.tolist() for b in packing.bins[1:3]] == [[3, 4, 5], [6, 7, 8]]
    assert packing.bins[-1].tolist() == [9]
    assert "4 bins of 10 documents" in repr(packing.bins)
    assert "10 documents in 4 bins of 3" in repr(packing)
    with pytest.raises(IndexError):
        packing.bins[4]


def test_shuffle_is_seeded_and_keeps_bins():
    packing = batching.best_fit_decreasing(np.arange(1, 60), 64)
    one, same, other = packing.shuffled(1), packing.shuffled(1), packing.shuffled(2)
    assert as_lists(one) == as_lists(same) != as_lists(other)
    assert sorted(as_lists(one)) == sorted(as_lists(packing)) != as_lists(one)


@pytest.mark.parametrize("packer", ALL_PACKERS)
@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "lengths must be at most the capacity 8, got 9 at index 2", ([1, 8, 9], 8)),
        (ValueError, "lengths must be >= 0, got -3 at index 1", ([1, -3], 8)),
        (TypeError, "lengths must hold integers, got float64", ([1.0], 8)),
        (TypeError, "lengths must hold integers, got bool", ([True], 8)),
        (TypeError, "lengths must be a list, array or tensor of integers, got int", (3, 8)),
        (TypeError, "lengths must be a list, array or tensor of integers, got str", ("12", 8)),
        (ValueError, r"lengths must have 1 dimension \(n,\), got shape \(1, 1\)", ([[1]], 8)),
        (ValueError, r"lengths must be below 2\*\*63", (np.array([2**63], "u8"), 8)),
        (TypeError, "capacity must be an int, got float", ([1], 8.0)),
        (TypeError, "capacity must be an int, got NoneType", ([1], None)),
        (TypeError, "lengths must have a dtype that NumPy has, got torch.bfloat16", (BF16, 8)),
        (TypeError, "lengths must hold numbers, got lists of unequal", ([[1], [2, 3]], 8)),
        (TypeError, "lengths must hold numbers, got <U1", (["1"], 8)),
        (ValueError, r"capacity must be 1 to 2\*\*31 - 1 .*, got 0", ([1], 0)),
        (ValueError, r"capacity must be 1 to 2\*\*31 - 1 .*, got 2147483648", ([1], 2**31)),
        (ValueError, r"capacity must be 1 to 2\*\*31 - 1 .*, got 1000", ([1], 10**30)),
        (ValueError, r"max_depth must be 1 to 2\*\*62, got 0", ([1], 8, 0)),
        (TypeError, "max_depth must be an int, got str", ([1], 8, "2")),
    ],
)
def test_packing_errors(packer, error, message, arguments):
    with pytest.raises(error, match=message):
        packer(*arguments)


def test_shuffle_errors():
    packing = batching.next_fit([1], 1)
    with pytest.raises(TypeError, match="seed must be an int, got float"):
        packing.shuffled(0.5)
    with pytest.raises(ValueError, match="seed must be >= 0, got -1"):
        packing.shuffled(-1)


# --- PackedCollator -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_collator_output(kind):
    examples = [
        {"input_ids": kind([5, 6, 7])},
        {"input_ids": kind([8]), "labels": kind([9])},
        {"input_ids": kind([1, 2]), "labels": kind([-100, 4])},
    ]
    batch = batching.PackedCollator()(examples)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 1, 2]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, -100, 4]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 3, 4, 6]
    assert batch["cu_seq_lens_q"].dtype == batch["cu_seq_lens_k"].dtype == torch.int32
    for name in ("input_ids", "labels", "position_ids"):
        assert batch[name].dtype == torch.int64
    assert batch["max_length_q"] == batch["max_length_k"] == 3
    assert type(batch["max_length_q"]) is int
    assert set(batch) == {
        *("input_ids", "labels", "position_ids"),
        *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
    }


def test_collator_leaves_examples_alone():
    tokens = torch.tensor([5, 6])
    batching.PackedCollator()([{"input_ids": tokens, "labels": tokens}])
    assert tokens.tolist() == [5, 6]


def test_collator_drops_masked_tokens_and_keeps_empty_documents():
    examples = [
        {"input_ids": [0, 0, 5, 6], "attention_mask": [0, 0, 1, 1]},
        {"input_ids": [], "attention_mask": []},
        {"input_ids": [7, 0], "labels": [7, 3], "attention_mask": torch.tensor([True, False])},
    ]
    batch = batching.PackedCollator()(examples)
    assert batch["input_ids"].tolist() == [[5, 6, 7]]
    assert batch["labels"].tolist() == [[-100, 6, -100]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 2, 2, 3]
    nothing = batching.PackedCollator()([{"input_ids": []}])
    assert nothing["input_ids"].shape == (1, 0)
    assert nothing["max_length_q"] == 0


def test_collator_options():
    collate = batching.PackedCollator(
        ignore_index=-1, first_position=2, max_length=16, extra=["advantages"], ignored=["text"]
    )
    batch = collate([{"input_ids": [3, 4], "advantages": [0.5, 1.5], "text": "ab"}])
    assert batch["labels"].tolist() == [[-1, 4]]
    assert batch["position_ids"].tolist() == [[2, 3]]
    assert batch["max_length_q"] == batch["max_length_k"] == 16
    assert batch["advantages"].tolist() == [[0.5, 1.5]]


@pytest.mark.parametrize(
    ("columns", "dtype"),
    [
        (([1, 2], []), torch.int64),
        (([], [1, 2]), torch.int64),
        ((torch.tensor([1, 2]), torch.tensor([])), torch.int64),
        ((np.array([1, 2], np.int32), []), torch.int32),
        (([True, False], []), torch.bool),
        (([0.5, 1.5], []), torch.float32),
        (([1, 2], [0.5]), torch.float32),
        (([], []), torch.float32),
        ((np.array([0.5, 1.5]), [0.5]), torch.float64),
        ((torch.tensor([0.5, 1.5]).half(), []), torch.float16),
    ],
)
def test_collator_keeps_the_dtype_of_extra_columns(columns, dtype):
    examples = [{"input_ids": [7] * len(c), "extra": c} for c in columns]
    row = batching.PackedCollator(extra=["extra"])(examples)["extra"]
    assert row.dtype == dtype
    assert row.tolist() == [[v for c in columns for v in np.asarray(c).tolist()]]


def test_collator_joins_wide_columns_and_empty_documents():
    examples = [{"input_ids": [], "extra": []}, {"input_ids": [1, 2], "extra": [[3, 4], [5, 6]]}]
    row = batching.PackedCollator(extra=["extra"])(examples)["extra"]
    assert row.tolist() == [[[3, 4], [5, 6]]]


@pytest.mark.parametrize(
    ("column", "got"),
    [
        (BF16, "have a dtype that NumPy has, got torch.bfloat16"),
        (["a"], "hold numbers, got <U1"),
        ("a", "hold numbers, got <U1"),
        ([None], "hold numbers, got object"),
        ([[1], [2, 3]], "hold numbers, got lists of unequal lengths"),
    ],
)
def test_collator_refuses_columns_without_numbers(column, got):
    with pytest.raises(TypeError, match=f"weight of example 0 must {got}"):
        batching.PackedCollator(extra=["weight"])([{"input_ids": [1], "weight": column}])
    with pytest.raises(TypeError, match=f"attention_mask of example 0 must {got}"):
        batching.PackedCollator()([{"input_ids": [1], "attention_mask": column}])


@pytest.mark.parametrize("examples", [None, 3, iter([{"input_ids": [1]}]), {"input_ids": [[1]]}])
def test_collator_refuses_what_is_no_sequence(examples):
    with pytest.raises(TypeError, match="examples must be a sequence of mappings, got"):
        batching.PackedCollator()(examples)


def test_additive_masks():
    with pytest.raises(ValueError, match="attention_mask of example 0 .* 0 and 1, got -1.0"):
        batching.PackedCollator()([{"input_ids": [1, 2], "attention_mask": [0.0, -1.0]}])


@pytest.mark.parametrize("name", ["position_ids", "max_length_q", "labels", "attention_mask"])
def test_collator_refuses_extra_columns_that_it_makes(name):
    with pytest.raises(ValueError, match=f"handles, got '{name}'"):
        batching.PackedCollator(extra=["advantages", name])


def test_collator_in_a_data_loader():
    documents = [{"input_ids": [i] * (1 + i % 7)} for i in range(50)]
    packs = batching.best_fit_decreasing([len(d["input_ids"]) for d in documents], 16).shuffled(0)
    loader = DataLoader(documents, batch_sampler=packs.bins, collate_fn=batching.PackedCollator())
    assert len(loader) == len(packs.bins)
    seen = []
    for batch, pack in zip(loader, packs.bins, strict=True):
        assert batch["input_ids"].shape[1] <= 16
        assert len(batch["cu_seq_lens_q"]) == len(pack) + 1
        seen += batch["input_ids"][0].tolist()
    assert sorted(seen) == sorted(t for d in documents for t in d["input_ids"])


@pytest.mark.parametrize(
    ("error", "message", "examples"),
    [
        (ValueError, "examples must hold at least one example, got none", []),
        (TypeError, "example 0 must be a mapping, got list", [[1, 2]]),
        (
            ValueError,
            r"example 1 must have input_ids, got \['labels'\]",
            [{"input_ids": [1]}, {"labels": [1]}],
        ),
        (ValueError, "example 0 has the column 'text', which", [{"input_ids": [1], "text": "a"}]),
        (
            TypeError,
            "input_ids of example 0 must hold integers, got float64",
            [{"input_ids": [0.5]}],
        ),
        (ValueError, "input_ids of example 0 must have 1 dimension", [{"input_ids": [[1, 2]]}]),
        (
            ValueError,
            "labels of example 0 must have one value per token, 2, got shape .3,.",
            [{"input_ids": [1, 2], "labels": [1, 2, 3]}],
        ),
        (
            ValueError,
            "attention_mask of example 0 must have one value per token, 2",
            [{"input_ids": [1, 2], "attention_mask": [1]}],
        ),
        (
            ValueError,
            "example 1 must have at most max_length=3 tokens, got 4",
            [{"input_ids": [1]}, {"input_ids": [1, 2, 3, 4]}],
        ),
    ],
)
def test_collator_errors(error, message, examples):
    with pytest.raises(error, match=message):
        batching.PackedCollator(max_length=3)(examples)


def test_collator_option_errors():
    with pytest.raises(ValueError, match="example 0 must have advantages"):
        batching.PackedCollator(extra=["advantages"])([{"input_ids": [1]}])
    with pytest.raises(TypeError, match="extra must be a sequence of names, got the string 'mask'"):
        batching.PackedCollator(extra="mask")
    with pytest.raises(TypeError, match="ignore_index must be an int, got float"):
        batching.PackedCollator(ignore_index=-100.0)
