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
from varstream.ops.attention_call import Call, check_call
from varstream.testing import assert_exact, dense_attention, relative_error

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
FLOOR = 1e-5  # what sums in float32 may be off by, for each value of a result


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


GRADIENTS = ("dq", "dk", "dv", "dsinks")


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
    assert_near(out, plain, want, 2.0, "out")
    assert_lse(lse.detach(), want_lse.detach())


def assert_backward(
    backend: Backend,
    got: tuple[Tensor, Tensor],
    inputs: list[Tensor],
    *tensors: Tensor,
    dout: Tensor | None = None,
    **keywords: Any,
) -> None:
    """Assert that gradients of ``got``, (out, lse), for ``inputs`` agree with dense attention's.

    ``inputs`` are the leaves q, k, v (and sinks); ``tensors`` what dense attention takes for q, k
    and v, the same or without the NaN that nobody sees, and then the lengths.
    """
    out, lse = got
    dout = torch.randn_like(out) if dout is None else dout
    dlse = torch.randn_like(lse)
    ours = gradients(out, lse, inputs, dout, dlse)
    assert [g.dtype for g in ours] == [t.dtype for t in inputs]

    def dense(dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in tensors[:3]]
        call = {name: doubled(t) if dtype == torch.float64 else t for name, t in keywords.items()}
        if len(inputs) > 3:
            call["sinks"] = inputs[3].detach().to(dtype).requires_grad_()
            leaves.append(call["sinks"])
        found = dense_attention(*leaves[:3], *tensors[3:], **call)
        return gradients(*found, leaves, dout.to(dtype), dlse.to(dtype))

    exact = dense(torch.float64)
    if backend.exact:
        for name, g, e in zip(GRADIENTS, ours, exact, strict=False):
            assert_exact(g, e, name=name)
        return
    ratio = 3.0 if keywords.get("softcap") else 2.0
    for name, g, p, e in zip(GRADIENTS, ours, dense(out.dtype), exact, strict=False):
        assert_near(g, p, e, ratio, name)


def assert_near(ours: Tensor, plain: Tensor, want: Tensor, ratio: float, name: str) -> None:
    """The error-ratio rule for a result of random inputs near 1, and for each of its rows.

    A single wrong row hides in the norm over all of them: none may be further off than ``ratio``
    times the worst one of plain PyTorch. Both allow FLOOR for each value: where a gradient cancels
    to nothing, plain PyTorch may have no error at all.
    """
    assert ours.shape == want.shape and ours.isfinite().all(), f"{name}: shape, or not finite"
    if not ours.numel():
        return
    noise = torch.finfo(ours.dtype).eps / 8
    a, b = ((t.detach().double() - want) for t in (ours, plain))
    allowed = ratio * b.norm() + noise * want.norm() + FLOOR * want.numel() ** 0.5
    assert a.norm() <= allowed, (
        f"{name} is off by {relative_error(ours, want):.3e}, plain PyTorch by "
        f"{relative_error(plain, want):.3e}"
    )
    if want.dim() < 3:
        return
    a, b = a.norm(dim=-1), b.norm(dim=-1)
    worst = ratio * b.max() + noise * want.norm(dim=-1).max() + FLOOR * want.shape[-1] ** 0.5
    row, head = divmod(int(a.argmax()), a.shape[1])
    assert a.max() <= worst, (
        f"{name}: row {row} of head {head} is off by {a.max():.3e}, plain PyTorch by {b.max():.3e}"
    )


def assert_lse(lse: Tensor, want: Tensor) -> None:
    """Assert that a float32 LSE agrees with a float64 one, -inf in the same places."""
    seen = want != -torch.inf
    assert torch.equal(lse != -torch.inf, seen), "lse is -inf where it should not be, or is not"
    error = (lse - want)[seen].abs()
    allowed = LSE_TOLERANCE + LSE_ROUNDING * want[seen].abs()
    assert (error <= allowed).all(), f"lse is off by {error.max():.3e}"


def check(backend: Backend, lq, lk, options, **shape) -> None:
    """A case on a back end: results and gradients."""
    if backend.exact:
        check_exact(lq, lk, options, **shape)
        return
    cu = cu_seqlens(lq), cu_seqlens(lk)
    for dtype in backend.dtypes:
        q, k, v, keywords, inputs = make(lq, lk, options, dtype=dtype, **shape)
        got = backend.attention(q, k, v, *cu, **keywords)
        assert_forward(backend, got, q, k, v, *cu, **keywords)
        assert_backward(backend, got, inputs, q, k, v, *cu, **keywords)


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
        for name, g, w in zip(GRADIENTS, got, expected, strict=False):
            assert_exact(g, w, name=name)
        out, lse = vs.varlen_attention(q, k, v, cu_q, cu_k, return_lse=True, **options)
        want, want_lse = dense_attention(q, k, v, cu_q, cu_k, **options)


# --- below the checks that Python makes: values in tensors go unseen ------------------------------

DEFAULTS = {
    "max_seqlen_q": None,
    "max_seqlen_k": None,
    "seqused_k": None,
    "causal": False,
    "window": (-1, -1),
    "softmax_scale": None,
    "softcap": 0.0,
    "alibi_slopes": None,
    "sinks": None,
    "dropout_p": 0.0,
    "deterministic": False,
    "rng_state": None,
}


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def case(backend: Backend, lq, lk, options, dtype=None, **shape):
    """q, k, v without gradients and the arguments of the operator after them."""
    q, k, v, keywords, _ = make(lq, lk, options, dtype=dtype or backend.dtypes[0], **shape)
    q, k, v = (t.detach() for t in (q, k, v))
    if "sinks" in keywords:
        keywords["sinks"] = keywords["sinks"].detach()
    arguments = DEFAULTS | {"cu_seqlens_q": cu_seqlens(lq), "cu_seqlens_k": cu_seqlens(lk)}
    return q, k, v, check_call(q, k, v, **(arguments | keywords))


def call_kernel(backend: Backend, q, k, v, call: Call):
    """out and lse of varlen_attention's operator."""
    out, lse = _operator(backend, "varlen_attention")(*map(backend.here, (q, k, v, *call)))
    return out.cpu(), lse.cpu()


def call_backward(backend: Backend, *tensors: Tensor | None, call: Call, buffers=()):
    """dq, dk, dv and dsinks of dout, q, k, v, out, lse, dlse; with buffers dk, dv and dsinks on the
    back end's device, those are added into and dq alone comes back."""
    arguments = [backend.here(t) for t in (*tensors, *call)]
    if buffers:
        name = "varlen_attention_bwd_accumulate"
        return _operator(backend, name)(*arguments, *buffers).cpu()
    return [t.cpu() for t in _operator(backend, "varlen_attention_bwd")(*arguments)]


def _operator(backend: Backend, name: str) -> Callable[..., Any]:
    library = "varstream_emulated" if backend.name == "emulated" else "varstream"
    operator: Callable[..., Any] = getattr(getattr(torch.ops, library), name)
    return operator


BIG = 2**31 - 1
# Lengths that lie, for q of 90 rows and k of 130.
LIES = {
    "falling": {"cu_seqlens_q": int32(0, 60, 20, 90), "cu_seqlens_k": int32(0, 99, 3, 130)},
    "negative": {"cu_seqlens_q": int32(-5, 10, -70, 90), "cu_seqlens_k": int32(-9, 7, -1, 130)},
    "past_the_rows": {"cu_seqlens_q": int32(0, 50, 91, 500), "cu_seqlens_k": int32(0, 131, 700, 9)},
    "extreme": {
        "cu_seqlens_q": int32(-BIG - 1, BIG, -BIG, BIG),
        "cu_seqlens_k": int32(BIG, -BIG - 1, BIG, 0),
    },
    "all_rows_thrice": {
        "cu_seqlens_q": int32(0, BIG, 0, BIG),
        "cu_seqlens_k": int32(0, BIG, 0, BIG),
    },
    "seqused": {"seqused_k": int32(-3, 1000, BIG)},
    "seqused_negative": {"seqused_k": int32(-BIG - 1, -1, 0)},
}
