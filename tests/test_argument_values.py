"""Values that fit no C++ type, containers that are none, devices and tensors without values:
refused by the argument's name."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

import varstream as vs
from varstream import batching
from varstream._checks import check_float, check_int

OUT, LSE = torch.zeros(3, 2, 4), torch.zeros(2, 3)
HUGE = 10**400
SPARSE, META = torch.ones(2).to_sparse(), torch.ones(2, dtype=torch.int64, device="meta")


def loss(**options):
    return vs.linear_cross_entropy(torch.ones(3, 4), torch.ones(5, 4), torch.arange(3), **options)


def collate(**example):
    return batching.PackedCollator(extra=["w"])([{"input_ids": [1, 2], "w": [1, 2]} | example])


CASES = {
    "int": (ValueError, "max_tokens must fit an int of 64 bits", lambda: pack(max_tokens=2**63)),
    "low": (ValueError, "ignore_index must fit an int of", lambda: loss(ignore_index=-HUGE)),
    "float": (ValueError, "temperature must be finite as a float", lambda: loss(temperature=HUGE)),
    "divisor": (ValueError, "normalizer must be finite as a", lambda: loss(normalizer=HUGE)),
    "divisor_float32": (
        ValueError,
        r"normalizer must be <= 3.40.*e\+38, got 1e\+300",
        lambda: loss(normalizer=1e300),
    ),
    "outs": (
        TypeError,
        "outs must be a list or tuple of tensors, got Tensor",
        lambda: vs.merge_attention(OUT[None], [LSE]),
    ),
    "lses": (
        TypeError,
        "lses must be a list or tuple of tensors, got NoneType",
        lambda: vs.merge_attention([OUT], None),
    ),
    "outs_items": (
        TypeError,
        r"outs\[0\] must be a torch.Tensor, got float",
        lambda: vs.merge_attention([1.0], [LSE]),
    ),
    "device": (
        ValueError,
        "device must be a device such as 'cpu', got 'tpu9'",
        lambda: vs.cu_seqlens([1], device="tpu9"),
    ),
    "device_type": (
        ValueError,
        "device must be a device such as 'cpu', got 3.5",
        lambda: vs.cu_seqlens(torch.tensor([1]), device=3.5),
    ),
    "device_gone": (
        ValueError,
        "device must be available here, got 'cuda:99'",
        lambda: vs.cu_seqlens([1], device="cuda:99"),
    ),
    "plan": (
        ValueError,
        "device must be a device such as 'cpu', got 'tpu9'",
        lambda: vs.plan_memory(LlamaConfig(), 10, device="tpu9"),
    ),
    "plan_type": (
        ValueError,
        "device must be a device such as 'cpu', got None",
        lambda: vs.plan_memory(LlamaConfig(), 10, device=None),
    ),
    "sparse": (
        ValueError,
        "lengths must be a dense, strided tensor, got torch.sparse_coo",
        lambda: batching.next_fit(SPARSE, 4),
    ),
    "meta": (
        ValueError,
        "lengths must hold values, got a tensor on the meta device",
        lambda: batching.next_fit(META, 4),
    ),
    "sparse_column": (
        ValueError,
        "w of example 0 must be a dense, strided tensor",
        lambda: collate(w=SPARSE),
    ),
    "meta_mask": (
        ValueError,
        "attention_mask of example 0 must hold values",
        lambda: collate(attention_mask=META),
    ),
}


def pack(**options):
    return vs.pack(torch.ones(1, 2, 3), torch.ones(1, 2), **options)


@pytest.mark.parametrize(("error", "message", "call"), CASES.values(), ids=CASES)
def test_refused_by_name(error, message, call):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("argument", ["extra", "ignored"])
@pytest.mark.parametrize("value", [None, 3, 1.5, torch.tensor(1), torch.ones(2)], ids=repr)
def test_collator_names(argument, value):
    kind = type(value).__name__
    with pytest.raises(TypeError, match=f"{argument} must be a sequence of names, got {kind}"):
        batching.PackedCollator(**{argument: value})


@pytest.mark.parametrize("argument", ["extra", "ignored"])
def test_collator_names_are_strings(argument):
    with pytest.raises(TypeError, match=rf"{argument}\[1\] must be a str, got int"):
        batching.PackedCollator(**{argument: ["a", 3]})


def test_the_largest_values_are_taken():
    assert check_int("n", 2**63 - 1) == 2**63 - 1
    assert check_int("n", -(2**63)) == -(2**63)
    assert check_float("x", 2**1023) == 2.0**1023
    largest = float(np.finfo(np.float32).max)
    assert loss(normalizer=largest).item() >= 0
    assert vs.cu_seqlens([1], device=torch.device("cpu")).tolist() == [0, 1]
    names = (name for name in ["w"])
    assert batching.PackedCollator(extra=names).extra == ("w",)
