"""Autocast of the operators' operands, and operands on the meta device, which it doesn't know."""

import pytest
import torch
from cases import cu_seqlens

import varstream as vs
from varstream.ops._autocast import cast_for_autocast, float_for_autocast


def test_what_is_cast():
    x, wide, count = torch.ones(2), torch.ones(2).double(), torch.ones(2, dtype=torch.int64)
    given = (None, x, wide, count, [1.0])
    assert cast_for_autocast(*given) == float_for_autocast(*given) == given
    with torch.autocast("cpu", dtype=torch.bfloat16):
        none, low, *rest = cast_for_autocast(*given)
        assert none is None and low.dtype == torch.bfloat16
        assert all(a is b for a, b in zip(rest, given[2:], strict=True))
        none, back, *rest = float_for_autocast(None, low, *given[2:])
        assert none is None and back.dtype == torch.float32
        assert all(a is b for a, b in zip(rest, given[2:], strict=True))


def test_integers_are_refused_under_autocast_too():
    x = torch.ones(3, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(ValueError, match="x must have dtype float64, .* got int64"):
            vs.ops.linear_bias_gelu(x.long(), x)
        with pytest.raises(ValueError, match="weight must have the dtype of x"):
            vs.ops.linear_bias_gelu(x, x.long())
        with pytest.raises(TypeError, match="k must be a torch.Tensor, got NoneType"):
            vs.varlen_attention(torch.ones(3, 2, 8), None, None, cu_seqlens([3]))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_meta_tensors(dtype):
    """Shapes without memory, inside autocast of the CPU or not."""
    x, wide = torch.empty(5, 8, device="meta"), torch.empty(6, 8, device="meta")
    q, cu = torch.empty(5, 4, 8, device="meta"), cu_seqlens([2, 3]).to("meta")
    target = torch.empty(5, dtype=torch.int64, device="meta")
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        out = vs.varlen_attention(q, q, q, cu, max_seqlen_q=3)
        h = vs.ops.linear_bias_gelu(x, wide)
        y = vs.ops.bias_residual_layer_norm(x, None, x, None, None, 1e-5)
        losses = vs.linear_cross_entropy(x, wide, target, reduction="none")
    shapes = [tuple(t.shape) for t in (out, h, y, losses)]
    assert shapes == [(5, 4, 8), (5, 6), (5, 8), (5,)]
    assert all(t.is_meta and t.dtype == torch.float32 for t in (out, h, y, losses))
