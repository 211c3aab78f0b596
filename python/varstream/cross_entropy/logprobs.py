"""``token_logprobs`` and its backward on a GPU, as ``reference.token_logprobs``."""

from __future__ import annotations

import torch
from torch import Tensor

from varstream.cross_entropy.loss import walk
from varstream.cross_entropy.rows import select_rows
from varstream.cross_entropy.softmax import RowTerms, SoftmaxCall
from varstream.cross_entropy.softmax import RowValues as KernelValues
from varstream.reference.head import Chunking, Head
from varstream.reference.head_rows import columns
from varstream.reference.token_logprobs import RowGradients, RowValues, Wanted, of_losses

_NOTHING = (False, False, False)


def _weights(class_weight: Tensor | None) -> Tensor | None:
    return None if class_weight is None else class_weight.float().contiguous()


def token_logprobs(
    x: Tensor,
    head: Head,
    target: Tensor,
    ignore_index: int,
    chunking: Chunking,
    class_weight: Tensor | None,
    want: Wanted,
) -> RowValues:
    """Arguments and results as the reference's; NaN for targets outside ``[0, V)``."""
    valid = columns(target) != ignore_index
    rows = select_rows(valid.any(1), chunking.max_rows)
    flags = {"logp": True, "lse": True, **want._asdict()}
    call = SoftmaxCall(
        head,
        rows,
        rows.gather(columns(target).long()),
        RowTerms(),
        KernelValues.empty(rows, valid.shape[1], {name for name, on in flags.items() if on}),
        _weights(class_weight) if want.class_sum else None,
    )
    walk(x, call, chunking, _NOTHING)
    values = call.values

    def per_row(compact: Tensor | None) -> Tensor:
        return valid.new_empty((0,), dtype=head.acc) if compact is None else rows.scatter(compact)

    assert values.logp is not None
    logp = torch.where(valid, rows.poison(rows.scatter(values.logp)), 0)
    argmax = valid.new_empty((0,), dtype=torch.int64)
    if values.argmax is not None:
        argmax = rows.scatter(values.argmax, -1)
    return RowValues(
        logp.view(target.shape),
        per_row(values.entropy),
        per_row(values.lse),
        per_row(values.class_sum),
        per_row(values.log_sum_sq),
        argmax,
    )


def token_logprobs_bwd(
    upstream: RowGradients,
    x: Tensor,
    head: Head,
    target: Tensor,
    entropy: Tensor | None,
    ignore_index: int,
    chunking: Chunking,
    class_weight: Tensor | None,
    needs: tuple[bool, bool, bool],
    weight_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as the reference's; the kernels form the entropy again."""
    valid = columns(target) != ignore_index
    up, live = of_losses(upstream, valid, valid.any(1), entropy, head.acc)
    rows = select_rows(live, chunking.max_rows)
    call = SoftmaxCall(
        head,
        rows,
        rows.gather(columns(target).long()),
        RowTerms(up.nll, up.smooth, up.lse, up.entropy).gathered(rows),
        KernelValues(),
        _weights(class_weight) if up.smooth is not None else None,
        None,
        x.dtype,
    )
    return walk(x, call, chunking, needs, weight_grad).result()
