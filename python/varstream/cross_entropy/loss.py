"""``linear_cross_entropy`` on a GPU: the loss and its gradient in one walk over the rows.

As ``reference.cross_entropy``, with torch's products and row kernels: three products a chunk, one
launch between them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from varstream.cross_entropy.chunk_rule import chunk_rows
from varstream.cross_entropy.gradients import Gradients
from varstream.cross_entropy.products import ChunkBuffer
from varstream.cross_entropy.rows import DeviceRows, select_rows
from varstream.cross_entropy.softmax import RowTerms, RowValues, SoftmaxCall
from varstream.reference.cross_entropy import Loss, Scales, live_rows
from varstream.reference.head import Chunking, Head
from varstream.reference.head_rows import columns, only


def linear_cross_entropy(
    x: Tensor,
    head: Head,
    target: Tensor,
    ignore_index: int,
    chunking: Chunking,
    scales: Scales,
    metrics: bool,
    needs: tuple[bool, bool, bool],
) -> Loss:
    """Arguments and results as the reference's; a target outside ``[0, V)`` makes the loss NaN."""
    valid = columns(target) != ignore_index
    nll = smooth = None  # (N, K) and (N,): 0 at ignored ones
    if valid.shape[1] != 1 or scales.nll is not None:
        given = valid if scales.nll is None else columns(scales.nll)
        nll = only(given, valid, head.acc)
    if scales.smooth is not None:
        smooth = only(scales.smooth, valid.any(1), head.acc)
    live = live_rows(valid, nll, smooth, keep=metrics or scales.lse_sq is not None)
    rows = select_rows(live, chunking.max_rows)
    wanted = {"logp"}
    if scales.lse_sq is not None:
        wanted.add("lse")
    if smooth is not None:
        wanted.add("class_sum")
    if metrics:
        wanted.add("argmax")
    call = SoftmaxCall(
        head,
        rows,
        rows.gather(columns(target).long()),
        RowTerms(nll, smooth).gathered(rows),
        RowValues.empty(rows, valid.shape[1], wanted),
        None if scales.class_weight is None else scales.class_weight.float().contiguous(),
        None if scales.lse_sq is None else scales.lse_sq.float(),
        x.dtype if any(needs) else None,
    )
    grads = walk(x, call, chunking, needs)
    return summed_loss(call, rows.gather(valid), target, grads, metrics)


def walk(
    x: Tensor,
    call: SoftmaxCall,
    chunking: Chunking,
    needs: tuple[bool, bool, bool],
    weight_grad: Tensor | None = None,
) -> Gradients:
    """Every chunk of rows through product, row kernel and the gradients' products."""
    weight, rows = call.head.weight, call.rows
    dtype = chunking.logits_dtype or torch.float32
    classes, width = weight.shape
    size = chunking.chunk_size or chunk_rows(rows.bound, width, classes, dtype.itemsize)
    grads = Gradients(x, weight, rows, needs, weight_grad)
    buffer = ChunkBuffer(rows.largest_chunk(size), classes, x, dtype)
    x = x.contiguous()
    for part in rows.chunks(size):
        x_c = torch.ops.varstream.pack(x, rows.index[part])
        call.run(part, buffer.fill(x_c, weight))
        if call.gradient is not None:
            grads.add(part, x_c, buffer.gradient(x_c.shape[0]))
    return grads


def summed_loss(
    call: SoftmaxCall, valid: Tensor, target: Tensor, grads: Gradients, metrics: bool
) -> Loss:
    """The sums over rows; ``valid`` (B, K) in order."""
    rows, terms, values = call.rows, call.terms, call.values
    assert values.logp is not None
    # Rows past the count hold zeros already; their targets are ignored ones.
    logp = torch.where(valid, values.logp, 0)
    loss = _weighted(-logp, terms.nll)
    if values.class_sum is not None:
        loss = loss + _weighted(-values.class_sum, terms.smooth)
    lse_sq = loss.new_zeros(())
    if values.lse is not None and call.lse_sq_scale is not None:
        lse_sq = values.lse.square().sum()
        loss = loss + lse_sq * call.lse_sq_scale
    empty = logp.new_empty((0,))
    return Loss(
        rows.poison(loss),
        *grads.result(),
        lse_sq,
        rows.scatter(logp).view(target.shape) if metrics else empty,
        _argmax(rows, values) if metrics else empty.long(),
    )


def _argmax(rows: DeviceRows, values: RowValues) -> Tensor:
    assert values.argmax is not None
    return rows.scatter(values.argmax, -1)


def _weighted(values: Tensor, factor: Tensor | None) -> Tensor:
    """Sum of ``values`` times ``factor``; a factor of 0 leaves nothing of an infinite value."""
    if factor is None:
        return values.sum()
    return torch.where(factor == 0, 0, values * factor).sum()
