"""``merge_attention``: exact merge of attention results over disjoint sets of keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from varstream._checks import FLOATING, acc_dtype, check_tensor


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Merge partial attention results over disjoint sets of keys into the result over their union.

    Args:
        outs: list or tuple of tensors ``(total_q, Hq, Dv)`` of one floating dtype.
        lses: their LSE ``(Hq, total_q)``, natural log, float32 (float64 for float64 outs).

    Returns:
        out ``(total_q, Hq, Dv)`` in the dtype of ``outs`` and lse ``(Hq, total_q)``; both
        differentiable with respect to every part. A row whose parts are all empty (lse -inf) has
        out 0, lse -inf and gradients 0; the ``out`` of an empty part is never read, so it may hold
        anything.

    Raises:
        TypeError, ValueError: no lists, they are empty or differ in length, or a tensor breaks its
            contract.

    Source: ``lse = logsumexp_b lse_b``, ``out = sum_b exp(lse_b - lse) out_b``.
    """
    for name, given in (("outs", outs), ("lses", lses)):
        if not isinstance(given, list | tuple):
            raise TypeError(
                f"{name} must be a list or tuple of tensors, got {type(given).__name__}"
            )
    if len(outs) == 0 or len(outs) != len(lses):
        raise ValueError(
            f"outs and lses must be non-empty lists of one length, got {len(outs)} and {len(lses)}"
        )
    first = check_tensor("outs[0]", outs[0], ndim=3, dtypes=FLOATING, layout="(total_q, Hq, Dv)")
    acc = acc_dtype(first.dtype)
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        check_tensor(
            f"outs[{i}]", out, shape=first.shape, dtypes=(first.dtype,), device=first.device
        )
        check_tensor(
            f"lses[{i}]",
            lse,
            shape=(first.shape[1], first.shape[0]),
            dtypes=(acc,),
            device=first.device,
            layout="(Hq, total_q)",
        )
    parts = torch.stack(tuple(lses))  # (P, Hq, total_q)
    empty = parts == -torch.inf
    dead = empty.all(0)
    # Constants stand in for -inf so that neither the values nor the gradients of empty parts are
    # NaN.
    top = parts.detach().masked_fill(empty, torch.finfo(acc).min).amax(0)
    top = top.masked_fill(dead, 0.0)
    weights = (parts.masked_fill(empty, 0.0) - top).exp().masked_fill(empty, 0.0)
    total = weights.sum(0)
    lse = (total.masked_fill(dead, 1.0).log() + top).masked_fill(dead, -torch.inf)
    shares = weights / total.masked_fill(dead, 1.0)  # (P, Hq, total_q)
    merged = first.new_zeros(first.shape, dtype=acc)
    for out, share, hole in zip(outs, shares, empty, strict=True):
        hidden = hole.t().unsqueeze(-1)
        merged = merged + out.to(acc).masked_fill(hidden, 0.0) * share.t().unsqueeze(-1)
    return merged.to(first.dtype), lse
