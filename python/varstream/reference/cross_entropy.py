"""The head composed from ATen calls: chunked linear cross-entropy and per-token log-probabilities.

Every op walks the rows that take part in chunks of ``C`` and keeps one ``(C, V)`` buffer, which
holds in turn the logits, the probabilities and their gradient; nothing of shape ``(N, V)`` exists.

``linear_cross_entropy`` forms the gradient of the *summed* loss together with the loss, three
matrix products a chunk. ``token_logprobs`` keeps only what is per row and ``token_logprobs_bwd``
rebuilds the logits, four products in all, which serves any upstream gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from varstream.reference.head import (
    Gradients,
    Head,
    Rows,
    add_at_target,
    auto_chunk_size,
    capped_gradient_,
    check_targets,
    row_blocks,
    select_rows,
    softmax_in_place,
    take,
)

Triple = tuple[Tensor, Tensor, Tensor]


def _chunk_rows(chunk_size: int, head: Head) -> int:
    if chunk_size > 0:
        return chunk_size
    weight = head.weight
    return auto_chunk_size(weight.shape[0], head.acc.itemsize, weight.device.type)


def _buffer(head: Head, rows: Rows, size: int) -> Tensor:
    """The one (C, V) buffer of a call."""
    shape = rows.largest_chunk(size), head.weight.shape[0]
    return torch.empty(shape, dtype=head.acc, device=head.weight.device)


# --- loss and gradient in one pass ----------------------------------------------------------------


def linear_cross_entropy(
    x: Tensor,
    head: Head,
    target: Tensor,
    ignore_index: int,
    chunk_size: int,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Summed loss, number of valid rows, and the gradients of the summed loss.

    Args:
        x: (N, d).
        head: the projection, weight (V, d).
        target: (N,) int64 or int32.
        ignore_index: target value of rows that take no part; they are never read.
        chunk_size: rows of a chunk, 0 for the automatic rule.
        needs: which of the gradients of ``x``, weight and bias are wanted; the others are empty.

    Returns:
        loss sum () acc dtype, valid count () int64, dinput (N, d) in the dtype of ``x``, dweight
        (V, d) and dbias (V,) in acc dtype.
    """
    rows = select_rows(check_targets(target, ignore_index, head.weight.shape[0]))
    grads = Gradients(x, head, rows, needs)
    size = _chunk_rows(chunk_size, head)
    buffer = _buffer(head, rows, size)
    loss = buffer.new_zeros(())
    for part in rows.chunks(size):
        x_c = take(x, part, head.acc)
        t = take(target, part, torch.int64)
        z = buffer[: t.shape[0]]
        head.product(x_c, z)
        loss += _losses_in_place(z, t, head, any(needs)).sum()
        if any(needs):
            grads.add(part, x_c, z)
    count = torch.tensor(rows.count, dtype=torch.int64, device=x.device)
    return loss, count, *grads.result()


def _losses_in_place(z: Tensor, t: Tensor, head: Head, gradient: bool) -> Tensor:
    """Losses (C,) of a chunk; its buffer turns into their gradient up to ``gradient_scale``."""
    if head.softcap == 0:
        gap, log_sum, _ = softmax_in_place(z, t)
        if gradient:
            add_at_target(z, t, z.new_full((1,), -1.0).expand(t.shape))
        return log_sum - gap
    losses = torch.empty_like(z[:, 0])
    for u, t_b, loss_b in row_blocks(z, t, losses):
        p = u * head.cap_scale
        gap, log_sum, _ = softmax_in_place(p, t_b)
        torch.sub(log_sum, gap, out=loss_b)
        if gradient:
            add_at_target(p, t_b, p.new_full((1,), -1.0).expand(t_b.shape))
            capped_gradient_(u, p)
    return losses


# --- log-probabilities ----------------------------------------------------------------------------


def token_logprobs(
    x: Tensor,
    head: Head,
    target: Tensor,
    ignore_index: int,
    chunk_size: int,
    return_entropy: bool,
) -> Triple:
    """log p(target), the entropy of p, and the log-sum-exp of the logits, one value a row.

    Arguments as in ``linear_cross_entropy``. All (N,) in acc dtype, 0 at ignored rows; the entropy
    is empty unless asked for.
    """
    rows = select_rows(check_targets(target, ignore_index, head.weight.shape[0]))
    size = _chunk_rows(chunk_size, head)
    buffer = _buffer(head, rows, size)
    logp = buffer.new_zeros(rows.total)
    lse = torch.zeros_like(logp)
    entropy = buffer.new_zeros(rows.total if return_entropy else 0)
    for part in rows.chunks(size):
        t = take(target, part, torch.int64)
        z = buffer[: t.shape[0]]
        head.product(take(x, part, head.acc), z)
        if head.softcap > 0:
            z.mul_(head.cap_scale)
        gap, log_sum, peak = softmax_in_place(z, t)
        logp[part] = gap - log_sum
        lse[part] = peak + log_sum
        if return_entropy:
            entropy[part] = torch.cat([torch.special.entr(p).sum(1) for (p,) in row_blocks(z)])
    return logp, entropy, lse


def token_logprobs_bwd(
    dlogp: Tensor,
    dentropy: Tensor | None,
    x: Tensor,
    head: Head,
    target: Tensor,
    entropy: Tensor | None,
    ignore_index: int,
    chunk_size: int,
    needs: tuple[bool, bool, bool],
) -> Triple:
    """Gradients of ``sum(dlogp * logp) + sum(dentropy * entropy)``.

    ``dlogp``, ``dentropy`` and ``entropy`` are (N,) in acc dtype, the rest as in
    ``linear_cross_entropy``. The probabilities come from the rebuilt logits alone: an LSE rounded
    at the logits' own magnitude would not do where they carry a large common offset. Rows whose
    upstream gradients are all 0 are skipped like ignored ones.
    """
    live = check_targets(target, ignore_index, head.weight.shape[0])
    live &= dlogp != 0 if dentropy is None else (dlogp != 0) | (dentropy != 0)
    rows = select_rows(live)
    grads = Gradients(x, head, rows, needs)
    size = _chunk_rows(chunk_size, head)
    buffer = _buffer(head, rows, size)
    for part in rows.chunks(size):
        x_c = take(x, part, head.acc)
        t = take(target, part, torch.int64)
        z = buffer[: t.shape[0]]
        head.product(x_c, z)
        coef = take(dlogp, part, head.acc)
        if dentropy is None or entropy is None:
            _negated_gradient_in_place(z, t, head)
            grads.add(part, x_c, z, -coef)
        else:
            dh = take(dentropy, part, head.acc)
            _entropy_gradient_in_place(z, t, head, coef, dh, take(entropy, part, head.acc))
            grads.add(part, x_c, z)
    return grads.result()


def _negated_gradient_in_place(z: Tensor, t: Tensor, head: Head) -> None:
    """The gradient of ``-logp`` for each row is the cross-entropy's; the row factor comes later."""
    _losses_in_place(z, t, head, gradient=True)


def _entropy_gradient_in_place(
    z: Tensor, t: Tensor, head: Head, coef: Tensor, dh: Tensor, entropy: Tensor
) -> None:
    """Buffer (C, V) -> ``coef * (onehot - p) - dh * p * (log p + H)``, the last three (C,).

    ``p log p`` is taken as ``-entr(p)``, which is 0 at p = 0.
    """
    for u, t_b, coef_b, dh_b, h_b in row_blocks(z, t, coef, dh, entropy):
        p = u * head.cap_scale if head.softcap > 0 else u
        softmax_in_place(p, t_b)
        plogp = torch.special.entr(p)
        p.mul_(-(coef_b + dh_b * h_b)[:, None]).addcmul_(plogp, dh_b[:, None])
        add_at_target(p, t_b, coef_b)
        if head.softcap > 0:
            capped_gradient_(u, p)
