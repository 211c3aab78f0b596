"""``torch.func`` transforms and forward mode are refused by name: torch would drop the tangent."""

import pytest
import torch
from cases import cu_seqlens

import varstream as vs
from varstream.integrations import flash_attn

CU = cu_seqlens([3, 2])
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])
X = torch.randn(5, 2, 8)
PACKED = vs.pack(torch.zeros(2, 3, 4), MASK)
ROWS, WEIGHT, TARGET = torch.ones(5, 4), torch.ones(6, 4), torch.arange(5)
LSE = torch.zeros(2, 5)
CALLS = {
    "attention": ("q", X, lambda q: vs.varlen_attention(q, X, X, CU)),
    "values": ("v", X, lambda v: vs.varlen_attention(X, X, v, CU)),
    "sinks": ("sinks", torch.zeros(2), lambda s: vs.varlen_attention(X, X, X, CU, sinks=s)),
    "backward": (
        "dout",
        X,
        lambda dout: vs.varlen_attention_backward(
            dout, X, X, X, X, LSE, CU, dk=torch.zeros_like(X), dv=torch.zeros_like(X)
        ),
    ),
    "merge": (r"outs\[0\]", X, lambda out: vs.merge_attention([out], [LSE])[0]),
    "pack": ("x", torch.randn(2, 3, 4), lambda x: vs.pack(x, MASK).values),
    "unpack": ("values", torch.randn(5, 4), lambda v: vs.unpack(PACKED, v)),
    "gelu": ("x", torch.randn(5, 4), lambda x: vs.ops.linear_bias_gelu(x, WEIGHT)),
    "norm": (
        "residual",
        torch.randn(5, 4),
        lambda r: vs.ops.bias_residual_layer_norm(ROWS, None, r, None, None, 1e-5),
    ),
    "normalizer": (
        "normalizer",
        torch.tensor(2.0),
        lambda n: vs.linear_cross_entropy(ROWS, WEIGHT, TARGET, normalizer=n),
    ),
    "face": ("q", torch.randn(1, 3, 2, 8), lambda q: flash_attn.flash_attn_func(q, q, q)),
}


@pytest.mark.parametrize(("name", "value", "call"), CALLS.values(), ids=CALLS)
def test_transforms_and_forward_mode_are_refused(name, value, call):
    with pytest.raises(TypeError, match=f"^{name} must be a plain tensor: torch.func.* vmap"):
        torch.func.vmap(call)(torch.stack([value, value]))
    with pytest.raises(TypeError, match=f"^{name} must be a plain tensor: torch.func.* grad"):
        torch.func.grad(lambda x: call(x).sum())(value)
    with pytest.raises(TypeError, match=f"^{name} must be a plain tensor: torch.func"):
        torch.func.jvp(call, (value,), (value,))
    with torch.autograd.forward_ad.dual_level():
        with pytest.raises(TypeError, match=f"^{name} must be a plain tensor: forward-mode"):
            call(torch.autograd.forward_ad.make_dual(value, value))
        call(value)
