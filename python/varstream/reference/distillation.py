"""Distillation composed from ATen calls: the divergence of a student's head from a teacher's.

The rows that take part are walked in chunks of ``C`` with two ``(C, V)`` buffers. One holds in turn
the student's logits, log-probabilities and their gradient, the other the teacher's logits and
log-probabilities; everything between lives in small blocks of rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from varstream.reference.head import Chunking, Head, auto_chunk_size
from varstream.reference.head_gradient import Gradients, capped_gradient_
from varstream.reference.head_rows import Rows, select_rows, take

# Elements of a row block: about six temporaries of this size exist at once. On the CPU they stay in
# the cache and far below the chunk's buffers; a GPU needs larger ones to be busy.
_BLOCK_ELEMENTS = {"cpu": 1 << 15, "cuda": 1 << 24}

_log_softmax_out = torch.ops.aten._log_softmax.out


def chunk_rows(chunk_size: int, head: Head) -> int:
    """Rows of a chunk: as given or, at 0, half of what a head with one buffer takes."""
    if chunk_size > 0:
        return chunk_size
    weight = head.weight
    return auto_chunk_size(weight.shape[0], head.acc.itemsize, weight.device.type) // 2


def linear_distillation(
    x: Tensor,
    student: Head,
    y: Tensor,
    teacher: Head,
    mask: Tensor | None,
    token_weight: Tensor | None,
    beta: float,
    chunking: Chunking,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Divergences, their weighted sum, the number of rows, and the gradients of that sum.

    Args:
        x: (N, d), the student's rows.
        student: its projection, weight (V, d).
        y: (N, e), the teacher's rows.
        teacher: its projection, weight (V, e), of the same accumulation dtype.
        mask: (N,) bool, the rows that take part; the others are never read. ``None``: all.
        token_weight: (N,) floating, factors of the rows in the sum. ``None``: ones.
        beta: 0 KL(teacher || student), 1 KL(student || teacher), between them JSD(beta).
        chunking: rows of a chunk, and a bound on those that take part.
        needs: which of the gradients of ``x``, weight and bias are wanted; the others are empty.

    Returns:
        losses (N,) in acc dtype, unweighted, 0 at rows that take no part; their weighted sum () and
        the number of rows that take part () int64; dinput (N, d) in the dtype of ``x``, dweight
        (V, d) and dbias (V,) in acc dtype.
    """
    rows = Rows(None, x.shape[0], x.shape[0]) if mask is None else select_rows(mask)
    grads = Gradients(x, student, rows, needs)
    chunking.check_composed(student, rows.count)
    size = chunk_rows(chunking.chunk_size, student)
    shape = rows.largest_chunk(size), student.weight.shape[0]
    buffers = torch.empty((2, *shape), dtype=student.acc, device=x.device)
    losses = buffers.new_zeros(rows.total)
    loss_sum = buffers.new_zeros(())
    # The mixture's share of the student scales the whole gradient.
    share = 1 - beta if 0 < beta < 1 else 1.0
    for part in rows.chunks(size):
        x_c = take(x, part, student.acc)
        s, t = buffers[:, : x_c.shape[0]]
        student.product(x_c, s)
        teacher.product(take(y, part, teacher.acc), t)
        loss = _losses_in_place(s, t, student, teacher, beta, any(needs))
        losses[part] = loss
        weight = None if token_weight is None else take(token_weight, part, student.acc)
        loss_sum += loss.sum() if weight is None else (loss * weight).sum()
        if any(needs):
            coef = loss.new_ones(loss.shape) if weight is None else weight
            grads.add(part, x_c, s, None if weight is None and share == 1 else coef * share)
    count = torch.tensor(rows.count, dtype=torch.int64, device=x.device)
    return losses, loss_sum, count, *grads.result()


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors that share their rows, in blocks of rows of the first, (C, V)."""
    first = tensors[0]
    elements = _BLOCK_ELEMENTS.get(first.device.type, _BLOCK_ELEMENTS["cuda"])
    size = max(1, elements // max(1, first.shape[1]))
    return zip(*(t.split(size) for t in tensors), strict=True)


def _losses_in_place(
    s: Tensor, t: Tensor, student: Head, teacher: Head, beta: float, gradient: bool
) -> Tensor:
    """Products (C, V) of student and teacher -> losses (C,).

    ``s`` turns into their gradient, up to ``gradient_scale`` and the student's share of a mixture;
    ``t`` is used up.
    """
    losses = torch.empty_like(s[:, 0])
    for u, t_b, loss_b in _blocks(s, t, losses):
        if teacher.softcap > 0:
            t_b.mul_(teacher.cap_scale)
        s_b = u * student.cap_scale if student.softcap > 0 else u
        _log_softmax_(t_b)
        _log_softmax_(s_b)
        kernel = _forward_kl_ if beta == 0 else _mixture_
        loss_b.copy_(kernel(s_b, t_b, beta, gradient))
        if gradient and student.softcap > 0:
            capped_gradient_(u, s_b)
    return losses


def _log_softmax_(z: Tensor) -> None:
    """Log-probabilities of logits (R, V) in place; none is rounded at the logits' common offset."""
    if z.device.type == "cpu":
        _log_softmax_out(z, 1, False, out=z)  # each row is read before it is written
        return
    z.sub_(z.amax(1, keepdim=True))
    z.sub_(z.exp().sum(1, keepdim=True).log_())


def _forward_kl_(s: Tensor, t: Tensor, beta: float, gradient: bool) -> Tensor:
    """``sum_c q (log q - log p)`` (R,) from log p and log q (R, V); its gradient is ``p - q``."""
    q = t.exp()
    loss = _weighted_gap_(t, s, q)
    if gradient:
        s.exp_().sub_(q)
    return loss


def _mixture_(s: Tensor, t: Tensor, beta: float, gradient: bool) -> Tensor:
    """``(1 - beta) KL(p || m) + beta KL(q || m)``, ``m = (1 - beta) p + beta q``; KL(p || q) at 1.

    The derivative by p is ``(1 - beta) (log p - log m)``, the terms through ``m`` cancel, so that
    by the logits is ``p (log p - log m - KL(p || m))`` times the share ``1 - beta``.
    """
    if beta < 1:
        m = torch.logaddexp(s + math.log1p(-beta), t + math.log(beta))
        q_gap = _weighted_gap_(t, m, t.exp())
    else:
        m = t
    p = s.exp()
    p_gap = _weighted_gap_(s, m, p, keep=gradient)
    if gradient:
        s.sub_(p_gap[:, None]).mul_(p)
    return p_gap if beta == 1 else (1 - beta) * p_gap + beta * q_gap


def _weighted_gap_(a: Tensor, b: Tensor, p: Tensor, keep: bool = False) -> Tensor:
    """``sum_c p (a - b)`` (R,), a class with p = 0 adding 0 even where both logs are -inf.

    ``a`` is used up or, with ``keep``, holds ``a - b``.
    """
    a.sub_(b).masked_fill_(p == 0, 0)
    return (a * p if keep else a.mul_(p)).sum(1)
