"""Gradients of the head: of a chunk's logits in place, and their sums over chunks.

A row's loss is ``sum_k n_k nll_k + s sum_c w_c (-log p_c) + f(lse) + h entropy`` (K targets), so

    G = a p - sum_k n_k onehot_k - s w + h entr(p),    entr(p) = -p log p,
    a = sum_k n_k + s sum_c w_c + f' - h entropy

The row factor ``a`` goes into the narrow operands of the products and, where the logits are linear
in x, ``s w`` is a rank-one term of the sums; neither costs a pass over ``(C, V)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from varstream.reference.head import ClassSums, Head, Softmax
from varstream.reference.head_rows import Rows

# A row factor below this share of the row's terms is replaced by it: what it then adds is far below
# rounding, and dividing by it is safe.
_SHARE = {torch.float32: 1e-15, torch.float64: 1e-30}

_tanh_backward_out = torch.ops.aten.tanh_backward.grad_input


@dataclass(frozen=True)
class Upstream:
    """Upstream gradients of what a row of the head yields; absent ones are None."""

    nll: Tensor | None = None  # (C, K) of -log p(target), all ones if None
    smooth: Tensor | None = None  # (C,) of sum_c w_c (-log p_c)
    lse: Tensor | None = None  # (C,) of the log-sum-exp
    entropy: Tensor | None = None  # (C,) of the entropy
    entropy_value: Tensor | None = None  # (C,) the entropy itself

    def __getitem__(self, rows: slice) -> Upstream:
        parts = (self.nll, self.smooth, self.lse, self.entropy, self.entropy_value)
        return Upstream(*(None if part is None else part[rows] for part in parts))

    @property
    def only_nll(self) -> bool:
        """Whether the gradient is the cross-entropy's alone, up to a row factor."""
        return self.smooth is None and self.lse is None and self.entropy is None


def logit_gradient_(
    p: Tensor, soft: Softmax, target: Tensor, up: Upstream, sums: ClassSums | None, capped: bool
) -> Tensor | None:
    """Turn probabilities (C, V) into ``G / factor`` in place; returns the factor (C,), None for 1.

    Without ``capped`` the rank-one term ``-s w`` of G is left out: ``Gradients`` adds it.
    """
    if up.only_nll and target.shape[1] == 1:
        # Exact where p is near 1: p - 1 takes no rounding.
        p.scatter_add_(1, target, p.new_full((1, 1), -1.0).expand(target.shape))
        return None if up.nll is None else up.nll[:, 0]
    nll = torch.ones_like(soft.gap) if up.nll is None else up.nll
    total = nll.sum(1)
    factor, divisor, rest = _row_factor(nll, total, up, sums)
    at = p.gather(1, target)
    # The target's entry a p - n as n (p - 1) + (a - n) p: no rounded a is subtracted from.
    entry = total[:, None] * (at - 1) + (total[:, None] - _merged(p, target, nll, at))
    entry += rest[:, None] * at
    if up.entropy is not None:
        entry -= up.entropy[:, None] * torch.where(at == 0, 0.0, at * soft.logp)
        p.addcmul_(torch.special.entr(p), (up.entropy / divisor)[:, None])
    p.scatter_(1, target, entry / divisor[:, None])
    if capped and up.smooth is not None:
        assert sums is not None
        share = up.smooth / divisor
        if sums.weight is None:
            p.sub_(share[:, None])
        else:
            p.addr_(share, sums.weight, alpha=-1)
    return factor


def _row_factor(
    nll: Tensor, total: Tensor, up: Upstream, sums: ClassSums | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The row factor ``a``, the same with 1 for 0 to divide by, and ``a - sum_k n_k``; all (C,)."""
    rest, size = torch.zeros_like(total), nll.abs().sum(1)
    if up.smooth is not None:
        assert sums is not None
        rest = rest + up.smooth * sums.total
        size += up.smooth.abs()
    if up.lse is not None:
        rest = rest + up.lse
        size += up.lse.abs()
    if up.entropy is not None:
        assert up.entropy_value is not None
        rest = rest - up.entropy * up.entropy_value
        size += up.entropy.abs()
    floor = size * _SHARE[size.dtype]
    factor = total + rest
    factor = torch.where(factor.abs() < floor, floor, factor)
    return factor, torch.where(factor == 0, 1.0, factor), rest


def _merged(p: Tensor, target: Tensor, nll: Tensor, at: Tensor) -> Tensor:
    """Each target's upstream gradient with those of its duplicates in the row added, (C, K).

    ``p`` (C, V) serves as the scratch for it; ``at`` is what it holds at the targets.
    """
    if target.shape[1] == 1:
        return nll
    p.scatter_(1, target, torch.zeros_like(nll)).scatter_add_(1, target, nll)
    merged = p.gather(1, target)
    p.scatter_(1, target, at)
    return merged


def capped_gradient_(u: Tensor, g: Tensor) -> None:
    """``u <- g * (1 - u^2)``: through the softcap, ``u`` its tanh."""
    _tanh_backward_out(g, u, grad_input=u)


class Gradients:
    """Gradients being summed over chunks; those not wanted are empty and skipped."""

    def __init__(
        self,
        x: Tensor,
        head: Head,
        rows: Rows,
        needs: tuple[bool, bool, bool],
        sums: ClassSums | None = None,
        weight_grad: Tensor | None = None,
    ) -> None:
        self.need_input, self.need_weight, self.need_bias = needs
        self.head = head
        self.fresh = True
        # Ignored rows are never written, so only they need the zeros; a first chunk overwrites.
        dense, width = rows.count == rows.total, head.weight.shape[1]
        make = x.new_empty if dense else x.new_zeros
        self.input = make((x.shape[0], width) if self.need_input else (0,))
        make = x.new_zeros if rows.count == 0 else x.new_empty
        shape = head.weight.shape if self.need_weight else (0,)
        self.given = weight_grad is not None  # added to, never overwritten
        self.weight = make(shape, dtype=head.acc) if weight_grad is None else weight_grad
        self.bias = make(head.weight.shape[:1] if self.need_bias else (0,), dtype=head.acc)
        # The rank-one term: sum_c w_c W_c (d,), and the sums over rows of s x (d,) and of s ().
        self.sums = sums if head.softcap == 0 else None
        if self.sums is not None:
            self.columns = self.sums.columns.to(head.acc)
            self.moment = torch.zeros_like(self.columns)
            self.mass = self.columns.new_zeros(())

    def add(
        self,
        rows: slice | Tensor,
        x: Tensor,
        g: Tensor,
        factor: Tensor | None = None,
        smooth: Tensor | None = None,
    ) -> None:
        """Add a chunk: ``x`` (C, d) in acc dtype, ``g`` (C, V) whose rows count ``factor`` (C,)
        times, and ``smooth`` (C,), the row factors of the term ``-s w``."""
        scale = self.head.gradient_scale
        beta = 0 if self.fresh else 1
        self.fresh = False
        smooth = None if self.sums is None else smooth
        if self.need_input:
            self._input_rows(rows, x, g, factor, smooth)
        if self.need_weight:
            narrow = x if factor is None else x * factor[:, None]
            self._add_weight(g, narrow, 1 if self.given else beta, scale)
        if self.need_bias:
            ones = g.new_ones(g.shape[0]) if factor is None else factor
            self.bias.addmv_(g.t(), ones, beta=beta, alpha=scale)
        if smooth is not None:
            self.moment.addmv_(x.t(), smooth)  # in place: autocast would round a plain product
            self.mass += smooth.sum()

    def _add_weight(self, g: Tensor, x: Tensor, beta: int, scale: float) -> None:
        """``weight = beta weight + scale g^T x``, a low-precision one rounded once a chunk."""
        if self.weight.dtype == g.dtype:
            self.weight.addmm_(g.t(), x, beta=beta, alpha=scale)
            return
        for start, stop, block in self.head.weight_blocks(True):
            part = torch.mm(g[:, start:stop].t(), x, out=torch.empty_like(block))
            self.weight[start:stop].add_(part, alpha=scale)

    def _input_rows(
        self,
        rows: slice | Tensor,
        x: Tensor,
        g: Tensor,
        factor: Tensor | None,
        smooth: Tensor | None,
    ) -> None:
        direct = isinstance(rows, slice) and self.input.dtype == x.dtype
        part = self.input[rows] if direct else torch.empty_like(x)
        self.head.input_gradient(g, part)
        if factor is not None:
            part.mul_(factor[:, None])
        if smooth is not None:
            part.addr_(smooth, self.columns, alpha=-self.head.gradient_scale)
        if not direct:
            self.input[rows] = part.to(self.input.dtype)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of input (N, d), weight (V, d) and bias (V,), to be called once."""
        if self.sums is not None and not self.fresh:
            scale, weight = self.head.gradient_scale, self.sums.weight
            if weight is None:
                weight = self.columns.new_ones(()).expand(self.head.weight.shape[0])
            if self.need_weight:
                self._add_weight(weight[None], self.moment[None], 1, -scale)
            if self.need_bias:
                self.bias.addcmul_(weight, self.mass, value=-scale)
        return self.input, self.weight, self.bias
