"""Dense references in plain PyTorch: one sequence at a time, whole score and logit matrices,
ordinary autograd."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    seqused_k: Tensor | None = None,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    keep: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The contract of ``varlen_attention`` written out with full score matrices.

    Args:
        keep: dropout factors, one ``(Hq, sq, sk)`` tensor per sequence.

    Returns:
        out ``(total_q, Hq, Dv)`` and lse ``(Hq, total_q)``, both in the inputs' dtype and
        differentiable.
    """
    cu_q = cu_seqlens_q.tolist()
    cu_k = cu_q if cu_seqlens_k is None else cu_seqlens_k.tolist()
    group = q.shape[1] // k.shape[1]
    scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    outs, lses = [], []
    for b, ((q0, q1), (k0, k1)) in enumerate(zip(pairwise(cu_q), pairwise(cu_k), strict=True)):
        k1 = k1 if seqused_k is None else k0 + int(seqused_k[b])
        keys = k[k0:k1].repeat_interleave(group, 1).transpose(0, 1)  # (Hq, sk, D)
        values = v[k0:k1].repeat_interleave(group, 1).transpose(0, 1)
        scores = q[q0:q1].transpose(0, 1) @ keys.transpose(1, 2) * scale
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        distance = (
            torch.arange(k1 - k0)[None] - (torch.arange(q1 - q0) + (k1 - k0) - (q1 - q0))[:, None]
        )
        distance = distance.to(q.device)
        if alibi_slopes is not None:
            slopes = alibi_slopes[b] if alibi_slopes.dim() == 2 else alibi_slopes
            scores = scores - slopes.to(scores.dtype)[:, None, None] * distance.abs()
        right = 0 if causal else window[1]
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if window[0] >= 0:
            hidden |= distance < -window[0]
        if right >= 0:
            hidden |= distance > right
        scores = scores.masked_fill(hidden, -torch.inf)
        if sinks is not None:
            column = sinks.to(scores.dtype)[:, None, None].expand(-1, q1 - q0, 1)
            scores = torch.cat([scores, column], dim=-1)
        dead = (scores == -torch.inf).all(-1)  # (Hq, sq)
        lse = scores.masked_fill(dead[..., None], 0.0).logsumexp(-1)
        p = (scores - lse[..., None]).exp().masked_fill(dead[..., None], 0.0)[..., : k1 - k0]
        if keep is not None:
            p = p * keep[b].to(p.dtype)
        outs.append((p @ values).transpose(0, 1))
        lses.append(lse.masked_fill(dead, -torch.inf))
    return torch.cat(outs), torch.cat(lses, dim=1)
