"""pack, unpack and cu_seqlens: exactness, isolation, autograd, compilation, error contract."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import varstream as vs

MASKS = {
    "right": [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]],
    "left": [[0, 0, 1, 1], [0, 1, 1, 1]],
    "holes": [[1, 0, 1, 0], [0, 1, 0, 1], [1, 1, 0, 1]],
    "empty_rows": [[0, 0, 0], [1, 1, 0], [0, 0, 0]],
    "all_padding": [[0, 0], [0, 0]],
    "no_padding": [[1, 1], [1, 1]],
    "no_sequences": np.zeros((0, 4)).tolist(),
    "no_positions": [[], []],
    "one_token": [[1]],
    "one_huge_many_tiny": [[1] * 31] + [[1] + [0] * 30] * 6,
}
DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int16,
    torch.int64,
    torch.uint32,
    torch.float8_e4m3fn,
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
]


def mask_of(name: str) -> Tensor:
    rows = MASKS[name]
    width = len(rows[0]) if rows else 4
    return torch.tensor(rows, dtype=torch.bool).reshape(len(rows), width)


def random_rows(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.rand(*shape) * 100).to(dtype)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().unsqueeze(-1).view(torch.uint8)


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_pack_keeps_real_rows_in_order(name: str, bounded: bool):
    mask = mask_of(name)
    x = random_rows(*mask.shape, 3)
    total = int(mask.sum())
    bounds = {"max_tokens": total + 5, "max_seqlen": mask.shape[1]} if bounded else {}

    packed = vs.pack(x, mask, **bounds)

    lengths = mask.sum(1)
    assert torch.equal(packed.values[:total], x[mask])
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.cu_seqlens.tolist() == [0, *lengths.cumsum(0).tolist()]
    assert torch.equal(packed.indices[:total], mask.flatten().nonzero().squeeze(1))
    assert packed.indices.dtype == torch.int64
    assert (packed.batch, packed.seqlen) == tuple(mask.shape)
    if bounded:
        assert packed.values.shape[0] == total + 5
        assert (packed.indices[total:] == -1).all()
        assert (packed.values[total:] == 0).all()
        assert packed.max_seqlen == mask.shape[1]
    else:
        assert packed.max_seqlen == (int(lengths.max()) if len(lengths) else 0)
    back = vs.unpack(packed, fill=-1.0)
    assert torch.equal(back, torch.where(mask[..., None], x, -1.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("trailing", [(), (1,), (3,), (2, 5), (0,)], ids=str)
def test_any_dtype_and_trailing_shape(dtype: torch.dtype, trailing: tuple[int, ...]):
    mask = mask_of("holes")
    x = random_rows(*mask.shape, *trailing, dtype=dtype)
    for bounds in ({}, {"max_tokens": 9, "max_seqlen": 4}):
        packed = vs.pack(x, mask, **bounds)
        total = int(mask.sum())
        assert packed.values.dtype == dtype
        assert torch.equal(bits(packed.values)[:total], bits(x)[mask])
        again = vs.pack(vs.unpack(packed), mask, **bounds)
        assert torch.equal(bits(again.values), bits(packed.values))


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.bfloat16, torch.float64]
)
def test_mask_dtypes_agree(dtype: torch.dtype):
    mask = mask_of("right")
    x = random_rows(*mask.shape, 2)
    assert torch.equal(vs.pack(x, mask.to(dtype)).values, vs.pack(x, mask).values)


def test_segment_ids_are_a_mask():
    mask = torch.tensor([[1, 1, 2, 0], [3, 3, 3, 3]])
    assert vs.pack(mask, mask).values.tolist() == [1, 1, 2, 3, 3, 3, 3]


def test_strided_input_and_other_values():
    mask = mask_of("holes")
    x = random_rows(5, mask.shape[1], mask.shape[0]).permute(2, 1, 0)
    packed = vs.pack(x, mask)
    assert torch.equal(packed.values, x[mask])
    other = random_rows(int(mask.sum()), 2, 2, dtype=torch.float32)
    assert torch.equal(vs.unpack(packed, other)[mask], other)
    strided = random_rows(4, int(mask.sum())).t()
    assert torch.equal(vs.unpack(packed, strided)[mask], strided)


@pytest.mark.parametrize("bounded", [False, True])
def test_padding_never_leaks_and_gets_no_gradient(bounded: bool):
    mask = mask_of("holes")
    bounds = {"max_tokens": 10, "max_seqlen": 4} if bounded else {}
    x = random_rows(*mask.shape, 3).masked_fill(~mask[..., None], float("nan"))
    x.requires_grad_()
    packed = vs.pack(x, mask, **bounds)
    assert packed.values.isfinite().all()
    # NaN gradients of inert rows must not reach x either.
    weight = torch.ones_like(packed.values)
    weight[int(mask.sum()) :] = float("nan")
    (grad,) = torch.autograd.grad(packed.values, x, weight)
    assert torch.equal(grad, mask[..., None].expand_as(grad).to(grad.dtype))


def test_unpack_gradient_of_inert_rows_is_zero():
    mask = mask_of("right")
    total = int(mask.sum())
    packed = vs.pack(mask, mask, max_tokens=total + 2, max_seqlen=4)
    values = random_rows(total + 2, 3).requires_grad_()
    out = vs.unpack(packed, values)
    (grad,) = torch.autograd.grad(out, values, torch.full_like(out, 2.0))
    assert (grad[:total] == 2).all()
    assert (grad[total:] == 0).all()


def test_gradcheck_and_double_backward():
    indices = torch.tensor([4, -1, 0, 2])
    x = random_rows(6, 2).requires_grad_()
    values = random_rows(4, 2).requires_grad_()

    def pack(x):
        return torch.ops.varstream.pack(x, indices)

    def unpack(values):
        return torch.ops.varstream.unpack(values, indices, 6, 0.5)

    for fn, arg in ((pack, x), (unpack, values)):
        assert torch.autograd.gradcheck(fn, arg)
        assert torch.autograd.gradgradcheck(fn, arg)


@pytest.mark.parametrize("shape", [(6,), (6, 3), (6, 2, 4)], ids=str)
def test_opcheck(shape: tuple[int, ...]):
    x = random_rows(*shape).requires_grad_()
    for indices in (torch.tensor([4, 0, 2]), torch.tensor([4, -1, 0]), torch.tensor([]).long()):
        torch.library.opcheck(torch.ops.varstream.pack.default, (x, indices))
        values = random_rows(len(indices), *shape[1:]).requires_grad_()
        torch.library.opcheck(torch.ops.varstream.unpack.default, (values, indices, 6, 0.0))
    transposed = random_rows(*reversed(shape)).permute(*reversed(range(len(shape))))
    torch.library.opcheck(torch.ops.varstream.pack.default, (transposed, torch.tensor([1, 0])))


def test_fullgraph_compile_without_recompiles():
    def step(x, mask):
        packed = vs.pack(x, mask, max_tokens=x.shape[0] * x.shape[1], max_seqlen=x.shape[1])
        return vs.unpack(packed, packed.values * 2, fill=1.0).square().sum(), packed.cu_seqlens

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=False):
        for batch, length in ((2, 5), (3, 7)):
            _compare_compiled(step, compiled, batch, length)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, length in ((4, 2), (5, 11), (7, 31), (2, 13)):
            _compare_compiled(step, compiled, batch, length)


def _compare_compiled(step, compiled, batch: int, length: int) -> None:
    mask = torch.rand(batch, length) < 0.6
    x = random_rows(batch, length, 3)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    want, want_cu = step(a, mask)
    got, got_cu = compiled(b, mask)
    torch.testing.assert_close(got, want)
    assert torch.equal(got_cu, want_cu)
    want.backward()
    got.backward()
    torch.testing.assert_close(b.grad, a.grad)


def test_direct_calls_are_checked():
    x = random_rows(4, 2)
    with pytest.raises(ValueError, match=r"indices must be below the 4 rows, got 4"):
        torch.ops.varstream.pack(x, torch.tensor([0, 4]))
    with pytest.raises(ValueError, match=r"indices must be below the 1 rows, got 2"):
        torch.ops.varstream.unpack(x[:2], torch.tensor([0, 2]), 1, 0.0)
    with pytest.raises(ValueError, match=r"indices must be int64 of shape \(n,\)"):
        torch.ops.varstream.pack(x, torch.tensor([0], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"values must have one row per index, 1"):
        torch.ops.varstream.unpack(x, torch.tensor([0]), 4, 0.0)
    with pytest.raises(ValueError, match=r"rows must be >= 0, got -1"):
        torch.ops.varstream.unpack(x[:0], torch.tensor([]).long(), -1, 0.0)
    assert torch.ops.varstream.pack(x[:0], torch.tensor([-1, -7])).tolist() == [[0, 0], [0, 0]]


X = torch.zeros(2, 3, 4)
MASK = torch.tensor([[True, True, False], [True, False, False]])


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "x must be a torch.Tensor, got list", lambda: vs.pack([1], MASK)),
        (ValueError, "x must have at least 2 dimensions", lambda: vs.pack(X[0, 0], MASK)),
        (TypeError, "attention_mask must be a torch.Tensor", lambda: vs.pack(X, None)),
        (ValueError, "attention_mask must have 2 dimensions", lambda: vs.pack(X, MASK[None])),
        (
            ValueError,
            "attention_mask must have size 3 in dimension 1",
            lambda: vs.pack(X, MASK[:, :2]),
        ),
        (ValueError, "attention_mask must have dtype", lambda: vs.pack(X, MASK.to(torch.cfloat))),
        (ValueError, "attention_mask must be on cpu", lambda: vs.pack(X, MASK.to("meta"))),
        (
            ValueError,
            "must hold 0 and 1, got -inf .an additive mask",
            lambda: vs.pack(X, torch.zeros(2, 3).masked_fill(MASK, float("-inf"))),
        ),
        (
            TypeError,
            "max_tokens must be an int, got float",
            lambda: vs.pack(X, MASK, max_tokens=3.0),
        ),
        (
            TypeError,
            "max_seqlen must be an int, got bool",
            lambda: vs.pack(X, MASK, max_seqlen=True),
        ),
        (ValueError, "max_tokens must be >= 0, got -1", lambda: vs.pack(X, MASK, max_tokens=-1)),
        (
            ValueError,
            "max_tokens must be at least the 3 real tokens, got 2",
            lambda: vs.pack(X, MASK, max_tokens=2),
        ),
        (
            ValueError,
            "max_seqlen must be at least the longest sequence, 2, got 1",
            lambda: vs.pack(X, MASK, max_seqlen=1),
        ),
        (TypeError, "validate must be a bool, got int", lambda: vs.pack(X, MASK, validate=1)),
        (TypeError, "packed must be a varstream.Packed, got Tensor", lambda: vs.unpack(X)),
        (
            ValueError,
            r"values must have the 3 rows of packed \(total, ...\), got \(2, 3, 4\)",
            lambda: vs.unpack(vs.pack(X, MASK), X),
        ),
        (TypeError, "values must be a torch.Tensor", lambda: vs.unpack(vs.pack(X, MASK), [1])),
        (
            TypeError,
            "fill must be a number, got str",
            lambda: vs.unpack(vs.pack(X, MASK), fill="0"),
        ),
        (
            ValueError,
            "fill must be a value of the dtype of values .torch.int64., got 0.5",
            lambda: vs.unpack(vs.pack(X.long(), MASK), fill=0.5),
        ),
        (
            ValueError,
            "fill must be a value of the dtype of values .torch.uint8., got -100",
            lambda: vs.unpack(vs.pack(X.byte(), MASK), fill=-100),
        ),
        (TypeError, "lengths must be a list, array or tensor", lambda: vs.cu_seqlens(3)),
        (TypeError, "lengths must hold integers, got float64", lambda: vs.cu_seqlens([1.5])),
        (TypeError, "lengths must hold integers, got bool", lambda: vs.cu_seqlens([True])),
        (
            TypeError,
            "lengths must hold integers, got torch.float32",
            lambda: vs.cu_seqlens(X[0, 0]),
        ),
        (ValueError, "lengths must have 1 dimension", lambda: vs.cu_seqlens([[1, 2]])),
        (ValueError, "lengths must be >= 0, got -2 at index 1", lambda: vs.cu_seqlens([1, -2, -3])),
        (ValueError, "lengths must sum to less than", lambda: vs.cu_seqlens([2**31 - 1, 1])),
    ],
)
def test_errors_name_argument_contract_and_value(error, message, call):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    "lengths",
    [
        [3, 0, 1],
        (3, 0, 1),
        np.array([3, 0, 1], dtype=np.uint16),
        torch.tensor([3, 0, 1]),
        torch.tensor([3, 0, 1], dtype=torch.uint8),
    ],
    ids=lambda v: type(v).__name__,
)
def test_cu_seqlens(lengths):
    cu = vs.cu_seqlens(lengths)
    assert cu.dtype == torch.int32
    assert cu.tolist() == [0, 3, 3, 4]


def test_cu_seqlens_edges():
    assert vs.cu_seqlens([]).tolist() == [0]
    assert vs.cu_seqlens([2**31 - 1]).tolist() == [0, 2**31 - 1]
    assert vs.cu_seqlens([1], device="meta").device.type == "meta"
