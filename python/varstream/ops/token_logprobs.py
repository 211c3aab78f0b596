"""``token_logprobs``: the public call, and its op's kernels, fakes and autograd formula."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from varstream import _load
from varstream._checks import acc_dtype, check_bool
from varstream.ops._head import HeadCall, check_head, direct_call, refuse_second_derivative
from varstream.reference import cross_entropy as reference

NAME = "token_logprobs"


def token_logprobs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each row's target under a linear head, without an ``(N, V)`` tensor.

    ``p = softmax(softcap(logit_scale * (input linear_weight^T + linear_bias)) / temperature)``.

    Args:
        input: ``(N, d)`` float64, float32, bfloat16 or float16; any strides, N may be 0.
        linear_weight: ``(V, d)`` in the dtype of ``input``.
        target: ``(N,)`` int64 or int32, classes in ``[0, V)`` or ``ignore_index``.
        linear_bias: ``(V,)`` in the dtype of ``input``.
        logit_scale: factor on the linear layer's output.
        softcap: logits become ``softcap * tanh(logits / softcap)`` when positive.
        temperature: divisor of the logits, above 0.
        ignore_index: rows with this target are never read; their results and gradients are 0.
        chunk_size: rows per chunk, by default as in ``linear_cross_entropy``.
        return_entropy: also return the entropy of p.

    Returns:
        ``log p[target]`` ``(N,)`` in float32 (float64 for float64 inputs), natural log, and with
        ``return_entropy`` the entropy ``-sum p log p`` ``(N,)``. Both are differentiable once, with
        any upstream gradient; rows whose upstream gradient is 0 cost nothing in the backward.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a wrong shape, dtype, device, mixed dtypes, or a target outside ``[0, V)``
            (checked on the CPU always).
        NotImplementedError: class probabilities as target.

    Source: the backward rebuilds the logits chunk by chunk; the entropy's gradient with respect to
    the logits is ``-p (log p + entropy)``.
    """
    check_bool("return_entropy", return_entropy)
    call = check_head(
        input,
        linear_weight,
        target,
        linear_bias=linear_bias,
        ignore_index=ignore_index,
        logit_scale=logit_scale,
        softcap=softcap,
        temperature=temperature,
        chunk_size=chunk_size,
    )
    logp, entropy = logprobs(call, return_entropy)
    return (logp, entropy) if return_entropy else logp


def logprobs(call: HeadCall, return_entropy: bool) -> tuple[Tensor, Tensor]:
    """The op on checked arguments: log-probabilities (N,), entropy (N,) or empty."""
    logp, entropy, _ = torch.ops.varstream.token_logprobs(*call, return_entropy)
    return logp, entropy


# --- kernels and fakes ----------------------------------------------------------------------------


@_load.composed_kernel(NAME)
def _kernel(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = direct_call(NAME, *args[:9])
    return reference.token_logprobs(
        call.input, call.head(), call.target, call.ignore_index, call.chunk_size, args[9]
    )


@_load.fake_kernel(NAME)
def _fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, return_entropy = args[0], args[9]
    logp = x.new_empty(x.shape[:1], dtype=acc_dtype(x.dtype))
    return logp, logp.new_empty(x.shape[:1] if return_entropy else (0,)), torch.empty_like(logp)


@_load.composed_kernel(f"{NAME}_bwd")
def _bwd_kernel(
    dlogp: Tensor, dentropy: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, bias, target, _, entropy, *scalars = args
    call = direct_call(f"{NAME}_bwd", x, weight, bias, target, *scalars[:5])
    for name, given in (("dlogp", dlogp), ("dentropy", dentropy), ("entropy", entropy)):
        if given is not None and given.shape != x.shape[:1]:
            raise RuntimeError(
                f"varstream::{NAME}_bwd: {name} must have shape ({x.shape[0]},), "
                f"got {tuple(given.shape)}"
            )
    return reference.token_logprobs_bwd(
        dlogp,
        dentropy,
        x,
        call.head(),
        target,
        entropy,
        call.ignore_index,
        call.chunk_size,
        tuple(scalars[5:]),
    )


@_load.fake_kernel(f"{NAME}_bwd")
def _bwd_fake(
    dlogp: Tensor, dentropy: Tensor | None, x: Tensor, weight: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return gradient_fakes(x, weight, *args[-3:])


def gradient_fakes(
    x: Tensor, weight: Tensor, need_input: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients as the kernels return them: of the input in its dtype, the others in acc dtype."""
    acc = acc_dtype(x.dtype)
    return (
        x.new_empty(x.shape if need_input else (0,)),
        x.new_empty(weight.shape if need_weight else (0,), dtype=acc),
        x.new_empty(weight.shape[:1] if need_bias else (0,), dtype=acc),
    )


# --- autograd -------------------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, target, *scalars, return_entropy = inputs
    _, entropy, lse = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*((lse,) if return_entropy else (lse, entropy)))
    ctx.save_for_backward(x, weight, bias, target, lse, entropy)
    ctx.scalars, ctx.return_entropy = scalars, return_entropy


def _backward(
    ctx: Any, dlogp: Tensor | None, dentropy: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    x, weight, bias, target, lse, entropy = ctx.saved_tensors
    needs = tuple(ctx.needs_input_grad[:3])
    if (dlogp is None and dentropy is None) or not any(needs):
        return (None,) * 10
    if dlogp is None:
        dlogp = torch.zeros_like(lse)
    grads = torch.ops.varstream.token_logprobs_bwd(
        dlogp,
        dentropy,
        x,
        weight,
        bias,
        target,
        lse,
        entropy if ctx.return_entropy else None,
        *ctx.scalars,
        *needs,
    )
    wanted = (g.to(x.dtype) if need else None for need, g in zip(needs, grads, strict=True))
    return *wanted, *([None] * 7)


def _no_second_derivative(ctx: Any, *_: Any) -> None:
    refuse_second_derivative(NAME)


_load.autograd(NAME, _setup_context)(_backward)
_load.autograd(f"{NAME}_bwd")(_no_second_derivative)
