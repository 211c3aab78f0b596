"""``linear_cross_entropy``: the public call, and its op's kernel, fake and autograd formula.

The op returns the summed loss together with the gradients of that sum, so its backward only
multiplies them by the upstream scalar, which carries the normaliser and any loss scale.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from varstream import _load
from varstream._checks import acc_dtype, check_float, values_visible
from varstream.ops._head import HeadCall, OnceOnly, check_head, direct_call, may_overwrite
from varstream.ops.token_logprobs import gradient_fakes, logprobs
from varstream.reference import cross_entropy as reference

NAME = "linear_cross_entropy"
REDUCTIONS = ("mean", "sum", "none")


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    temperature: float = 1.0,
    z_loss: float = 0.0,
    token_weight: Tensor | None = None,
    normalizer: int | float | Tensor | None = None,
    options: Any = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Cross-entropy of a linear layer's output, computed in chunks of rows: no ``(N, V)`` tensor.

    ``logits = softcap(logit_scale * (input linear_weight^T + linear_bias)) / temperature`` with
    ``softcap(z) = softcap * tanh(z / softcap)`` when positive; the loss of a row is
    ``logsumexp(logits) - logits[target]``.

    Args:
        input: ``(N, d)`` float64, float32, bfloat16 or float16; any strides, N may be 0.
        linear_weight: ``(V, d)`` in the dtype of ``input``.
        target: ``(N,)`` int64 or int32, classes in ``[0, V)`` or ``ignore_index``.
        linear_bias: ``(V,)`` in the dtype of ``input``.
        weight: class weights; not supported yet.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        ignore_index: rows with this target take no part: they are never read, add nothing to the
            loss and have zero gradients.
        label_smoothing: not supported yet.
        logit_scale: factor on the linear layer's output.
        softcap: bound of the logits, 0 for none.
        temperature: divisor of the logits, above 0.
        z_loss: not supported yet.
        token_weight: not supported yet.
        normalizer: divisor of ``"mean"`` in place of the number of valid rows, such as a count over
            several micro-batches or ranks: a number, or a tensor of one element on any device,
            which is not read on the host.
        options: accepted for the signature of torch's function only; must be ``None``.
        chunk_size: rows per chunk. ``None``: 512 on the CPU, 2048 on a GPU, fewer (down to 64)
            where a chunk's logits would pass 256 MiB or 1 GiB. The result doesn't depend on it
            beyond rounding.

    Returns:
        The loss in float32 (float64 for float64 inputs), a scalar or ``(N,)`` for ``"none"``. With
        every row ignored it is 0 and all gradients are zeros. Gradients of tensors that don't
        require them are not computed. It can be differentiated once.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a wrong shape, dtype, device, mixed dtypes, a target outside ``[0, V)``
            (checked on the CPU always), or a ``normalizer`` without ``reduction="mean"``.
        NotImplementedError: an argument that isn't supported yet, by name.

    Source: for ``"mean"`` and ``"sum"`` the gradient is formed in the forward pass, three matrix
    products as in a plain head; ``"none"`` recomputes the logits in the backward, four.
    """
    _refuse(weight, label_smoothing, z_loss, token_weight, options)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
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
    if normalizer is not None:
        _check_normalizer(normalizer, reduction)
    if reduction == "none":
        return 0.0 - logprobs(call, return_entropy=False)[0]  # not neg: ignored rows are +0
    loss_sum, count = _loss_sum(call)
    if reduction == "sum":
        return loss_sum
    return loss_sum / _divisor(loss_sum, count, normalizer)


# --- checks ---------------------------------------------------------------------------------------


def _refuse(
    weight: Any, label_smoothing: Any, z_loss: Any, token_weight: Any, options: Any
) -> None:
    given = {
        "weight": weight is not None,
        "label_smoothing": check_float("label_smoothing", label_smoothing) != 0.0,
        "z_loss": check_float("z_loss", z_loss) != 0.0,
        "token_weight": token_weight is not None,
        "options": options is not None,
    }
    for name, present in given.items():
        if present:
            raise NotImplementedError(f"{name} is not supported by linear_cross_entropy yet")


def _check_normalizer(normalizer: Any, reduction: str) -> None:
    if reduction != "mean":
        raise ValueError(f"normalizer needs reduction='mean', got reduction={reduction!r}")
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            shape = tuple(normalizer.shape)
            raise ValueError(f"normalizer must have one element, got shape {shape}")
    elif not isinstance(normalizer, torch.SymInt):
        check_float("normalizer", normalizer, low=0.0)


def _divisor(loss_sum: Tensor, count: Tensor, normalizer: int | float | Tensor | None) -> Tensor:
    """What the summed loss () is divided by, in its dtype; 1 where no row is valid: 0 stays 0."""
    if normalizer is None:
        return count.clamp(min=1)
    if not isinstance(normalizer, Tensor):
        normalizer = torch.full_like(loss_sum, normalizer, requires_grad=False)
    normalizer = normalizer.detach().reshape(()).to(loss_sum)
    if values_visible(count, normalizer) and int(count) > 0 and not float(normalizer) > 0:
        raise ValueError(f"normalizer must be above 0, got {float(normalizer)}")
    return torch.where(count == 0, torch.ones_like(normalizer), normalizer)


# --- op -------------------------------------------------------------------------------------------


def _loss_sum(call: HeadCall) -> tuple[Tensor, Tensor]:
    """Summed loss () and number of valid rows (); forms the gradients autograd will ask for."""
    recording = torch.is_grad_enabled()
    operands = call.input, call.linear_weight, call.linear_bias
    needs = (t is not None and recording and t.requires_grad for t in operands)
    loss_sum, count, *_ = torch.ops.varstream.linear_cross_entropy(*call, *needs)
    return loss_sum, count


@_load.composed_kernel(NAME)
def _kernel(*args: Any) -> tuple[Tensor, ...]:
    call = direct_call(NAME, *args[:9])
    return reference.linear_cross_entropy(
        call.input, call.head(), call.target, call.ignore_index, call.chunk_size, args[9:]
    )


@_load.fake_kernel(NAME)
def _fake(*args: Any) -> tuple[Tensor, ...]:
    call = HeadCall(*args[:9])
    x, weight = call.input, call.linear_weight
    return (
        x.new_empty((), dtype=acc_dtype(x.dtype)),
        x.new_empty((), dtype=torch.int64),
        *(gradient_fakes(x, weight, *args[9:])),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    loss_sum, _, *grads = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*grads)
    ctx.save_for_backward(loss_sum, *grads)
    ctx.dtype, ctx.needs = inputs[0].dtype, inputs[-3:]


def _backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    loss_sum, *grads = ctx.saved_tensors
    dinput, dweight, dbias = (
        _scaled(grad, upstream, ctx.dtype, loss_sum) if need and upstream is not None else None
        for need, grad in zip(ctx.needs, grads, strict=True)
    )
    return dinput, dweight, dbias, *([None] * 9)


def _scaled(grad: Tensor, upstream: Tensor, dtype: torch.dtype, loss_sum: Tensor) -> Tensor:
    """A finished gradient times the upstream scalar, in place when nobody can ask for it again."""
    with torch.no_grad():
        grad = (grad.mul_(upstream) if may_overwrite(grad) else grad * upstream).to(dtype)
    # Under create_graph=True; loss_sum leads back to the op's inputs without keeping them alive.
    return OnceOnly.apply(NAME, grad, loss_sum) if torch.is_grad_enabled() else grad


_load.autograd(NAME, _setup_context)(_backward)
