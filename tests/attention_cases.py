"""What the attention tests share: options, inputs, the back ends and their rule of agreement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import cu_seqlens
from torch import Tensor

import varstream as vs
from varstream.testing import assert_error_ratio, assert_exact, dense_attention

HEADS = 4
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (3, 2)},
    "left_window": {"window": (300, 0)},
    "right_window": {"window": (-1, 5)},
    "open_right": {"window": (20, -1)},
    "softcap": {"softcap": 2.0, "causal": True},
    "alibi": {"alibi_slopes": torch.linspace(0.1, 1, HEADS)},
    "sinks": {"sinks": True, "causal": True},
    "scale": {"softmax_scale": 0.3, "causal": True},
    "no_scale": {"softmax_scale": 0.0, "causal": True},
    "negative_scale": {"softmax_scale": -0.5, "causal": True},
    "everything": {
        "sinks": True,
        "softcap": 3.0,
        "window": (50, 0),
        "causal": True,
        "alibi_slopes": torch.linspace(0.1, 1, HEADS),
    },
}
LSE_TOLERANCE, LSE_ROUNDING = 1e-5, 5e-7  # absolute; and relative, four roundings to float32


@dataclass(frozen=True)
class Backend:
    """Where varlen_attention runs, and how near it must come to dense attention in float64.

    A back end with float64 agrees to rounding. The others run in bfloat16 and float16, where the
    output follows the error-ratio rule and the LSE, in float32, the two tolerances above.
    """

    name: str
    device: str
    dtypes: tuple[torch.dtype, ...]

    @property
    def exact(self) -> bool:
        return torch.float64 in self.dtypes

    def here(self, value: Any) -> Any:
        """A tensor on this back end's device; anything else as it is."""
        return value.to(self.device) if isinstance(value, Tensor) else value

    def attention(self, *tensors: Tensor, **keywords: Any) -> tuple[Tensor, Tensor]:
        """varlen_attention of tensors that lie on the CPU; out and lse come back there."""
        moved = {name: self.here(value) for name, value in keywords.items()}
        arguments = [self.here(t) for t in tensors]
        out, lse = vs.varlen_attention(*arguments, return_lse=True, **moved)
        return out.cpu(), lse.cpu()


LOW = (torch.bfloat16, torch.float16)
BACKENDS = {
    "cpu": Backend("cpu", "cpu", (torch.float64,)),
    "emulated": Backend("emulated", "cpu", LOW),
    "cuda": Backend("cuda", "cuda", LOW),
}
MARKS = {"cpu": [], "emulated": [pytest.mark.emulated], "cuda": [pytest.mark.gpu]}


def on(*names: str) -> Callable[[Any], Any]:
    """Run a test on these back ends only (its argument ``backend``; all of them without this)."""
    values = [pytest.param(name, marks=MARKS[name], id=name) for name in names]
    return pytest.mark.parametrize("backend", values, indirect=True)


def make(lq, lk, options, dtype=torch.float64, heads=HEADS, kv_heads=2, head_dim=16, value_dim=16):
    """q, k, v and the keywords of a case; sinks become a leaf that wants a gradient."""
    q = torch.randn(sum(lq), heads, head_dim, dtype=dtype).requires_grad_()
    k = torch.randn(sum(lk), kv_heads, head_dim, dtype=dtype).requires_grad_()
    v = torch.randn(sum(lk), kv_heads, value_dim, dtype=dtype).requires_grad_()
    options = dict(options)
    if options.get("sinks") is True:
        options["sinks"] = torch.randn(heads, dtype=dtype).requires_grad_()
    inputs = [q, k, v, *([options["sinks"]] if "sinks" in options else [])]
    return q, k, v, options, inputs


def gradients(out, lse, inputs, dout, dlse):
    finite = lse.masked_fill(lse == -torch.inf, 0.0)
    loss = (out * dout).sum() + (finite * dlse).sum()
    return torch.autograd.grad(loss, inputs)


def doubled(value: Any) -> Any:
    """Floating tensors in float64, everything else as it is."""
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().double() if floating else value


def assert_forward(
    backend: Backend, got: tuple[Tensor, Tensor], *tensors: Tensor, **keywords: Any
) -> None:
    """Assert that ``got``, (out, lse), agrees with dense attention of these arguments."""
    out, lse = got
    q, k, v, *cu = tensors
    exact_keywords = {name: doubled(value) for name, value in keywords.items()}
    if "keep" in keywords:
        exact_keywords["keep"] = [doubled(t) for t in keywords["keep"]]
    want, want_lse = dense_attention(*(doubled(t) for t in (q, k, v)), *cu, **exact_keywords)
    if backend.exact:
        assert_exact(out, want, name="out")
        assert_exact(lse, want_lse, name="lse")
        return
    assert out.dtype == q.dtype and lse.dtype == torch.float32
    plain, _ = dense_attention(*(t.detach() for t in (q, k, v)), *cu, **keywords)
    assert_error_ratio(out, plain, want, 2.0, "out")
    assert_rows(out, plain, want)
    assert_lse(lse.detach(), want_lse.detach())


def assert_lse(lse: Tensor, want: Tensor) -> None:
    """Assert that a float32 LSE agrees with a float64 one, -inf in the same places."""
    seen = want != -torch.inf
    assert torch.equal(lse != -torch.inf, seen), "lse is -inf where it should not be, or is not"
    error = (lse - want)[seen].abs()
    allowed = LSE_TOLERANCE + LSE_ROUNDING * want[seen].abs()
    assert (error <= allowed).all(), f"lse is off by {error.max():.3e}"


def assert_rows(out: Tensor, plain: Tensor, want: Tensor) -> None:
    """No row (of Dv values) may be further off than twice the worst one of plain PyTorch.

    A single wrong row hides in the norm over all of them.
    """
    ours, theirs = ((t.detach().double() - want).norm(dim=-1) for t in (out, plain))
    if not ours.numel():
        return
    noise = torch.finfo(out.dtype).eps / 8 * want.norm(dim=-1).max()
    row, head = divmod(int(ours.argmax()), ours.shape[1])
    assert ours.max() <= 2.0 * theirs.max() + noise, (
        f"row {row} of head {head} is off by {ours.max():.3e}, plain PyTorch by {theirs.max():.3e}"
    )


def check(backend: Backend, lq, lk, options, **shape) -> None:
    """A case on a back end: results, and on an exact one gradients."""
    if backend.exact:
        check_exact(lq, lk, options, **shape)
        return
    cu = cu_seqlens(lq), cu_seqlens(lk)
    for dtype in backend.dtypes:
        q, k, v, keywords, _ = make(lq, lk, options, dtype=dtype, **shape)
        with torch.no_grad():
            got = backend.attention(q, k, v, *cu, **keywords)
            assert_forward(backend, got, q, k, v, *cu, **keywords)


def check_exact(lq, lk, options, **shape) -> None:
    q, k, v, options, inputs = make(lq, lk, options, **shape)
    cu_q, cu_k = cu_seqlens(lq), cu_seqlens(lk)
    out, lse = vs.varlen_attention(q, k, v, cu_q, cu_k, return_lse=True, **options)
    want, want_lse = dense_attention(q, k, v, cu_q, cu_k, **options)
    assert_exact(out, want, name="out")
    assert_exact(lse, want_lse, name="lse")
    dout = torch.randn_like(out)
    for dlse in (torch.zeros_like(lse), torch.randn_like(lse)):
        got = gradients(out, lse, inputs, dout, dlse)
        expected = gradients(want, want_lse, inputs, dout, dlse)
        for name, g, w in zip(("dq", "dk", "dv", "dsinks"), got, expected, strict=False):
            assert_exact(g, w, name=name)
        out, lse = vs.varlen_attention(q, k, v, cu_q, cu_k, return_lse=True, **options)
        want, want_lse = dense_attention(q, k, v, cu_q, cu_k, **options)
