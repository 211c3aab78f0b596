"""Embeddings of a batch that is too large to keep the encoder's activations of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from varstream._checks import check_tensor
from varstream._random_state import RandomState, random_state_kept
from varstream.streaming.gradients import GradientSums

Encode = Callable[[Any], Tensor]


@torch._disable_dynamo  # the loop over sub-batches stays outside compiled graphs
def cached_embeddings(
    encode: Encode, batches: Iterable[Any], *, params: Iterable[Tensor] | None = None
) -> Tensor:
    """Embed sub-batches one after the other, keeping no activations of any.

    The forward runs ``encode`` without a graph. The backward, which has the gradient of every
    embedding by then, runs it again on each sub-batch, with a graph and with the random numbers and
    the autocast state of its first run, and sums the parameters' gradients. A loss over the whole
    batch, such as ``objectives.contrastive``, so gets the gradients of one large forward at the
    memory of one sub-batch, for one forward more.

    Args:
        encode: ``encode(batch) -> (n, d)`` embeddings; a module, or any function. It must give the
            same again, apart from random numbers of torch's global generators (dropout), act on
            each sub-batch for itself, and not change state (running averages would move twice).
            Wrap what calls this in DistributedDataParallel or, as one unit, in ``fully_shard``; not
            ``encode``.
        batches: the sub-batches, whatever ``encode`` takes, such as dicts of token ids and masks;
            at least one. They are kept until the backward and must not require gradients.
        params: the tensors whose gradients are wanted, such as ``model.parameters()``; gradients of
            others used inside are not formed. ``None``: all of ``encode``, which is then a module.

    Returns:
        ``(N, d)``, the rows of all sub-batches in order; differentiable with respect to ``params``,
        once. Each gets its summed gradient in one piece, so hooks fire once.

    Raises:
        TypeError, ValueError: an argument, or what ``encode`` returns, breaks its contract.
        RuntimeError: ``encode`` gave other shapes in the backward, or a second derivative is asked
            for.

    Source: GradCache (arXiv 2101.06983), as an autograd function instead of a training step.
    """
    unique = _check_params(encode, params)
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise TypeError(f"batches must be a list of sub-batches, got {type(batches).__name__}")
    work = _Work(encode, list(batches), [p.device for p in unique])
    if not work.batches:
        raise ValueError("batches must hold at least one sub-batch, got none")
    for i, batch in enumerate(work.batches):
        for tensor in _tensors(batch):
            if tensor.requires_grad:
                raise ValueError(
                    f"batches[{i}] must not require gradients: none are computed for it; detach "
                    f"it, got a tensor of shape {tuple(tensor.shape)} with requires_grad=True"
                )
            work.devices.append(tensor.device)
    found: Tensor = _Cached.apply(work, *unique)
    return found


def _check_params(encode: Any, params: Any) -> list[Tensor]:
    """A list of tensors, each once however often it was named."""
    if not callable(encode):
        raise TypeError(f"encode must be a module or a function, got {type(encode).__name__}")
    if isinstance(encode, nn.parallel.DistributedDataParallel):
        raise ValueError(
            "encode must not be a DistributedDataParallel, whose forward would run once more in "
            "the backward; wrap a module whose forward calls cached_embeddings"
        )
    if params is None:
        if not isinstance(encode, nn.Module):
            raise TypeError(
                "params must be given where encode isn't a module, "
                f"got None and a {type(encode).__name__}"
            )
        params = encode.parameters()
    if isinstance(params, Tensor | Mapping | str) or not isinstance(params, Iterable):
        raise TypeError(f"params must be a list of tensors, got {type(params).__name__}")
    params = list(params)  # module.parameters() can be walked once only
    for i, param in enumerate(params):
        check_tensor(f"params[{i}]", param)
    return list({id(p): p for p in params}.values())


def _tensors(batch: Any) -> Iterator[Tensor]:
    """The tensors of a sub-batch, a nest of lists, tuples and mappings."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping | list | tuple):
        for value in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(value)


# --- what a repetition needs ----------------------------------------------------------------------


@dataclass
class _Work:
    """What forward and backward of one call share."""

    encode: Encode
    batches: list[Any]
    devices: list[torch.device]  # of parameters and sub-batches, with repetitions

    def accelerators(self) -> list[torch.device]:
        """Devices with random numbers of their own, apart from the CPU."""
        return [d for d in dict.fromkeys(self.devices) if d.type not in ("cpu", "meta")]

    def autocast(self) -> list[torch.autocast]:
        """Contexts that restore the autocast state of now."""
        kinds = dict.fromkeys(["cpu", *(d.type for d in self.accelerators())])
        return [
            torch.autocast(
                kind,
                dtype=torch.get_autocast_dtype(kind),
                enabled=torch.is_autocast_enabled(kind),
            )
            for kind in kinds
        ]


class _Cached(torch.autograd.Function):
    """All sub-batches' embeddings; saves the sub-batches and the generators' states.

    Parameters are inputs, so their gradients leave once however many sub-batches there were.
    """

    @staticmethod
    def forward(ctx: Any, work: _Work, *params: Tensor) -> Tensor:
        ctx.work, ctx.params = work, params
        ctx.autocast = work.autocast()
        ctx.save_for_backward(*params)  # so that autograd notices changes in place
        ctx.randomness = []
        parts: list[Tensor] = []
        for i, batch in enumerate(work.batches):
            ctx.randomness.append(RandomState(work.devices))
            part = work.encode(batch)
            _check_part(i, part, parts)
            parts.append(part)
        ctx.counts = [part.shape[0] for part in parts]
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # only create_graph=True runs a backward with gradients on
            raise RuntimeError(
                "cached embeddings have no second derivative: create_graph=True is refused"
            )
        _ = ctx.saved_tensors  # raises where a parameter was changed in place
        work, needed = ctx.work, ctx.needs_input_grad[1:]
        wanted = [p for p, need in zip(ctx.params, needed, strict=True) if need]
        sums = GradientSums(wanted)
        with ExitStack() as stack:
            stack.enter_context(random_state_kept(work.devices))
            for context in ctx.autocast:
                stack.enter_context(context)
            stack.enter_context(sums.taken())
            grads = grad.split(ctx.counts)
            for i, (batch, part) in enumerate(zip(work.batches, grads, strict=True)):
                ctx.randomness[i].restore()
                with torch.enable_grad():
                    again = work.encode(batch)
                _check_repetition(i, again, part)
                sums.backward([(again, part)])
        finished = iter(sums.finish())
        return None, *(next(finished) if need else None for need in needed)


def _check_part(i: int, part: Any, before: list[Tensor]) -> None:
    if not isinstance(part, Tensor):
        raise TypeError(
            f"encode must return a torch.Tensor (n, d), got {type(part).__name__} for batches[{i}]"
        )
    if part.dim() != 2 or not part.is_floating_point():
        raise ValueError(
            f"encode must return floating embeddings (n, d), got {part.dtype} of shape "
            f"{tuple(part.shape)} for batches[{i}]"
        )
    first = before[0] if before else part
    if (part.shape[1], part.dtype, part.device) != (first.shape[1], first.dtype, first.device):
        raise ValueError(
            f"encode must return the same width, dtype and device for all sub-batches, got "
            f"{part.shape[1]}, {part.dtype}, {part.device} for batches[{i}] and {first.shape[1]}, "
            f"{first.dtype}, {first.device} for batches[0]"
        )


def _check_repetition(i: int, again: Any, like: Tensor) -> None:
    if not isinstance(again, Tensor) or (again.shape, again.dtype) != (like.shape, like.dtype):
        got = f"{again.dtype} {tuple(again.shape)}" if isinstance(again, Tensor) else type(again)
        raise RuntimeError(
            f"encode must give the same again in the backward: {like.dtype} {tuple(like.shape)} "
            f"for batches[{i}], got {got}"
        )
