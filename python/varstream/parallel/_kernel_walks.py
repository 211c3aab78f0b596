"""The walks of a sharded head on a GPU: products by torch, row kernels and one gather between them.

As ``varstream.cross_entropy`` does it for one process, with a chunk's input gradient summed over
the ranks. Which rows take part is known on the device; the ranks know it alike.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from varstream.cross_entropy.gradients import Gradients
from varstream.cross_entropy.loss import summed_loss
from varstream.cross_entropy.products import ChunkBuffer, product_out
from varstream.cross_entropy.rows import DeviceRows, select_rows
from varstream.cross_entropy.softmax import RowTerms
from varstream.cross_entropy.softmax import RowValues as KernelValues
from varstream.ops._head import HeadCall
from varstream.parallel._checks import ShardCall
from varstream.parallel._kernels import ShardedSoftmax, sharded
from varstream.parallel._shards import Shards
from varstream.reference.cross_entropy import Loss, Scales
from varstream.reference.head_gradient import Upstream
from varstream.reference.head_rows import columns
from varstream.reference.token_logprobs import RowValues, Wanted

Needs = tuple[bool, bool, bool]


class RowChoice(NamedTuple):
    """What the ranks agree on before they walk."""

    valid: Tensor  # (N, K) targets that aren't ignored
    live: Tensor  # (N,) rows that take part


class ShardGradients(Gradients):
    """Gradients being summed over chunks; a chunk of dX in float32 also over the ranks."""

    def __init__(
        self, x: Tensor, weight: Tensor, rows: DeviceRows, needs: Needs, shards: Shards
    ) -> None:
        super().__init__(x, weight, rows, needs)
        self.shards = shards

    def add(self, part: slice, x: Tensor, g: Tensor) -> None:
        if not self.need_input:
            return self._add_classes(x, g)
        found = x.new_empty(x.shape, dtype=torch.float32)
        product_out(g, self.weight_operand, found)
        done = self.shards.start_sum(found)
        self._add_classes(x, g)  # while the ranks exchange
        done.wait()
        # Rounded once, after the sum: the shards' parts may be larger than it.
        self._place(part, found.to(self.input.dtype))


def loss(shard: ShardCall, scales: Scales, chosen: RowChoice, metrics: bool, needs: Needs) -> Loss:
    """As ``cross_entropy.loss``; ``scales`` are 0 at ignored targets."""
    call = shard.call
    rows = _rows(call, chosen)
    wanted = {
        "logp": True,
        "lse": scales.lse_sq is not None,
        "class_sum": scales.smooth is not None,
        "argmax": metrics,
    }
    softmax = sharded(
        call,
        shard.shards,
        rows,
        columns(call.target),
        RowTerms(scales.nll, scales.smooth),
        _empty(rows, chosen, wanted),
        class_weight=scales.class_weight,
        lse_sq_scale=scales.lse_sq,
        gradient=call.input.dtype if any(needs) else None,
    )
    grads = _walk(call, softmax, needs)
    return summed_loss(softmax.call, rows.gather(chosen.valid), call.target, grads, metrics)


def values(
    shard: ShardCall, class_weight: Tensor | None, want: Wanted, chosen: RowChoice
) -> RowValues:
    """As ``cross_entropy.logprobs``: 0 (argmax -1) at ignored rows."""
    call = shard.call
    rows = _rows(call, chosen)
    wanted = {"logp": True, "lse": True, **want._asdict()}
    softmax = sharded(
        call,
        shard.shards,
        rows,
        columns(call.target),
        RowTerms(),
        _empty(rows, chosen, wanted),
        class_weight=class_weight if want.class_sum else None,
    )
    _walk(call, softmax, (False, False, False))
    found = softmax.call.values

    assert found.logp is not None
    empty = found.logp.new_empty((0,))

    def per_row(compact: Tensor | None) -> Tensor:
        return empty if compact is None else rows.scatter(compact)

    logp = torch.where(chosen.valid, rows.scatter(found.logp), 0)
    return RowValues(
        logp.view(call.target.shape),
        per_row(found.entropy),
        per_row(found.lse),
        per_row(found.class_sum),
        per_row(found.log_sum_sq),
        empty.long() if found.argmax is None else rows.scatter(found.argmax, -1),
    )


def gradients(
    shard: ShardCall, up: Upstream, chosen: RowChoice, class_weight: Tensor | None, needs: Needs
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``values`` under upstream gradients (N, ...); the entropy is formed again."""
    call = shard.call
    rows = _rows(call, chosen)
    softmax = sharded(
        call,
        shard.shards,
        rows,
        columns(call.target),
        RowTerms(up.nll, up.smooth, up.lse, up.entropy),
        KernelValues(),
        class_weight=class_weight if up.smooth is not None else None,
        gradient=call.input.dtype,
    )
    return _walk(call, softmax, needs).result()


def _rows(call: HeadCall, chosen: RowChoice) -> DeviceRows:
    # Without targets no row takes part, and the kernels have no table of them to write.
    return select_rows(chosen.live, call.max_rows if chosen.valid.shape[1] else 0)


def _empty(rows: DeviceRows, chosen: RowChoice, wanted: dict[str, bool]) -> KernelValues:
    names = {name for name, on in wanted.items() if on}
    return KernelValues.empty(rows, chosen.valid.shape[1], names)


def _walk(call: HeadCall, softmax: ShardedSoftmax, needs: Needs) -> ShardGradients:
    """Every chunk of rows: the product, two launches around a gather, the gradients' products."""
    weight, rows, x = call.linear_weight, softmax.call.rows, call.input.contiguous()
    grads = ShardGradients(x, weight, rows, needs, softmax.shards)
    dtype = call.logits_dtype or torch.float32
    buffer = ChunkBuffer(rows.largest_chunk(call.chunk_size), weight.shape[0], x, dtype)
    for part in rows.chunks(call.chunk_size):
        x_c = torch.ops.varstream.pack(x, rows.index[part])
        softmax.run(part, buffer.fill(x_c, weight))
        if softmax.call.gradient is not None:
            grads.add(part, x_c, buffer.gradient(x_c.shape[0]))
    return grads
