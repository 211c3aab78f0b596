"""Per-token log-probabilities composed from ATen calls: four matrix products, any upstream.

The forward keeps what is per row only, ``token_logprobs_bwd`` rebuilds the logits chunk by chunk in
the one ``(C, V)`` buffer of a call.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from varstream.reference.cross_entropy import chunk_buffer, chunk_rows
from varstream.reference.head import (
    Chunking,
    ClassSums,
    Head,
    Softmax,
    cap_scratch,
    logits_of,
    row_slices,
    softmax_in_place,
)
from varstream.reference.head_gradient import (
    Gradients,
    Upstream,
    capped_gradient_,
    logit_gradient_,
)
from varstream.reference.head_rows import (
    check_targets,
    columns,
    only,
    select_rows,
    take,
    take_any,
)


class Wanted(NamedTuple):
    """Which of the values beside ``logp`` and ``lse`` are wanted; the others come back empty."""

    entropy: bool = False
    class_sum: bool = False
    argmax: bool = False
    log_sum_sq: bool = False


class RowValues(NamedTuple):
    """Results of ``token_logprobs``, in the op's order; 0 (argmax -1) at ignored rows."""

    logp: Tensor  # like target, log p(target)
    entropy: Tensor  # (N,) of p
    lse: Tensor  # (N,) log-sum-exp of the logits
    class_sum: Tensor  # (N,) sum_c w_c log p_c
    log_sum_sq: Tensor  # (N,) log sum_c p_c^2
    argmax: Tensor  # (N,) int64


class RowGradients(NamedTuple):
    """Upstream gradients of the differentiable ``RowValues``, in acc dtype; None is 0."""

    logp: Tensor | None  # like target
    entropy: Tensor | None  # (N,)
    lse: Tensor | None  # (N,)
    class_sum: Tensor | None  # (N,)


def token_logprobs(
    x: Tensor,
    head: Head,
    target: Tensor,
    ignore_index: int,
    chunking: Chunking,
    class_weight: Tensor | None,
    want: Wanted,
) -> RowValues:
    """Values of each row; arguments as in ``linear_cross_entropy``, ``class_weight`` (V,) is w."""
    valid = columns(check_targets(target, ignore_index, head.weight.shape[0]))
    rows = select_rows(valid.any(1))
    chunking.check_composed(head, rows.count)
    sums = ClassSums(head, class_weight) if want.class_sum else None
    size = chunk_rows(chunking.chunk_size, head)
    buffer = chunk_buffer(head, rows, size)
    logp = buffer.new_zeros(valid.shape)
    lse = buffer.new_zeros(rows.total)
    entropy, class_sum, log_sum_sq = (
        buffer.new_zeros(rows.total if wanted else 0)
        for wanted in (want.entropy, want.class_sum, want.log_sum_sq)
    )
    argmax = torch.full((rows.total if want.argmax else 0,), -1, device=x.device)
    split = head.softcap > 0 or want.entropy or want.log_sum_sq
    for part in rows.chunks(size):
        x_c = take(x, part, head.acc)
        t = take(columns(target), part, torch.int64)
        t = t.masked_fill(~take(valid, part, torch.bool), 0)
        z = buffer[: t.shape[0]]
        head.product(x_c, z)
        found = [_block(z[b], x_c[b], t[b], head, sums, want) for b in row_slices(z, split)]
        softs, entropies, class_sums, norms = zip(*found, strict=True)
        logp[part] = torch.cat([s.logp for s in softs])
        lse[part] = torch.cat([s.lse for s in softs])
        if want.argmax:
            argmax[part] = torch.cat([s.argmax for s in softs])
        for wanted, out, values in (
            (want.entropy, entropy, entropies),
            (want.class_sum, class_sum, class_sums),
            (want.log_sum_sq, log_sum_sq, norms),
        ):
            if wanted:
                out[part] = torch.cat(values)
    logp = only(logp, valid, head.acc).view(target.shape)
    return RowValues(logp, entropy, lse, class_sum, log_sum_sq, argmax)


def _block(
    z: Tensor, x: Tensor, t: Tensor, head: Head, sums: ClassSums | None, want: Wanted
) -> tuple[Softmax, Tensor | None, Tensor | None, Tensor | None]:
    """Softmax, entropy, sum_c w_c log p_c and log sum p^2 of a block of rows, from the product."""
    capped = head.softcap > 0
    if capped:
        z.mul_(head.cap_scale)
    class_sums = None
    if sums is not None:
        class_sums = sums.of_logits(z) if capped else sums.of_rows(x)
    soft = softmax_in_place(z, t, want.argmax)
    return (
        soft,
        torch.special.entr(z).sum(1) if want.entropy else None,
        None if sums is None or class_sums is None else -sums.weighted_nll(soft, class_sums),
        torch.linalg.vector_norm(z, dim=1).log() * 2 if want.log_sum_sq else None,
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
    """Gradients of the sum of each upstream gradient times its value.

    ``entropy`` (N,) is the forward's, needed with an upstream gradient of it; the rest is as in
    ``linear_cross_entropy``. The probabilities come from the rebuilt logits alone: an LSE rounded
    at the logits' own magnitude would not do where they carry a large common offset. Rows whose
    upstream gradients are all 0 are skipped like ignored ones. The weight's gradient is added to
    ``weight_grad`` where that is given.
    """
    valid = columns(check_targets(target, ignore_index, head.weight.shape[0]))
    taken = valid.any(1)
    up, live = of_losses(upstream, valid, taken, entropy, head.acc)
    rows = select_rows(live)
    chunking.check_composed(head, rows.count)
    sums = None if up.smooth is None else ClassSums(head, class_weight)
    grads = Gradients(x, head, rows, needs, sums, weight_grad)
    size = chunk_rows(chunking.chunk_size, head)
    buffer = chunk_buffer(head, rows, size)
    scratch = cap_scratch(buffer, head)
    capped = head.softcap > 0
    split = capped or up.entropy is not None
    for part in rows.chunks(size):
        x_c = take(x, part, head.acc)
        t = take(columns(target), part, torch.int64)
        t = t.masked_fill(~take(valid, part, torch.bool), 0)
        z = buffer[: t.shape[0]]
        head.product(x_c, z)
        up_c = Upstream(
            take_any(up.nll, part),
            take_any(up.smooth, part),
            take_any(up.lse, part),
            take_any(up.entropy, part),
            take_any(up.entropy_value, part),
        )
        factors = []
        for block in row_slices(z, split):
            u, t_b = z[block], t[block]
            p = logits_of(u, head, scratch)
            soft = softmax_in_place(p, t_b)
            factors.append(logit_gradient_(p, soft, t_b, up_c[block], sums, capped))
            if capped:
                capped_gradient_(u, p)
        factor = torch.cat([f for f in factors if f is not None])
        grads.add(part, x_c, z, factor, up_c.smooth)
    return grads.result()


def of_losses(
    upstream: RowGradients,
    valid: Tensor,
    taken: Tensor,
    entropy: Tensor | None,
    acc: torch.dtype,
) -> tuple[Upstream, Tensor]:
    """Upstream gradients in terms of losses, 0 at ignored targets and rows whatever stood there,
    and the mask (N,) of rows where one of them isn't 0."""
    logp, *others = upstream
    if logp is None:
        nll = torch.zeros(valid.shape, dtype=acc, device=valid.device)
    else:
        nll = -only(columns(logp), valid, acc)
    rows = [None if part is None else only(part, taken, acc) for part in others]
    live = (nll != 0).any(1)
    for part in rows:
        live = live if part is None else live | (part != 0)
    d_entropy, d_lse, d_class_sum = rows
    smooth = None if d_class_sum is None else -d_class_sum
    return Upstream(nll, smooth, d_lse, d_entropy, None if d_entropy is None else entropy), live
