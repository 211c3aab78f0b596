"""``vs.varlen_attention`` with one option each: window, grouped heads, softcap, ALiBi, sinks,
dropout, keys in use.

The peers are a loop over the sequences with whole score matrices in plain PyTorch and, where an
additive mask or an extra key can express the option, SDPA over the padded batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.functional import scaled_dot_product_attention as sdpa

import varstream as vs
from varstream.reference.philox import keep_scale
from varstream.testing import dense_attention

from .. import peers
from ..case import Case, Peer, Setup, Shape
from .attention import TOLERANCE, Operands


@dataclass(frozen=True)
class Option:
    """What a case turns on; numbers that grow with the shape are made by ``Call``."""

    causal: bool = True
    window: bool = False
    softcap: float = 0.0
    group: int = 1
    alibi: bool = False
    sinks: bool = False
    dropout_p: float = 0.0
    seqused: bool = False


class Call:
    """Operands of a call: packed q (total, H, D), k and v (total, H / group, D), the options."""

    def __init__(self, option: Option, shape: Shape, device: torch.device, seed: int) -> None:
        self.o = Operands(shape, option.causal, torch.float32, device, seed)
        self.option = option
        heads, group = shape["heads"], option.group
        q, *kv = (t.detach() for t in self.o.packed)
        self.leaves = [q, *(t[:, ::group].contiguous() for t in kv)]
        self.keywords: dict[str, Any] = {"causal": option.causal}
        if option.window:
            self.keywords["window"] = (shape["seqlen"] // 4, 0)
        if option.softcap:
            self.keywords["softcap"] = option.softcap
        if option.alibi:
            slopes = 2.0 ** (-8.0 * torch.arange(1, heads + 1, device=device) / heads)
            self.keywords["alibi_slopes"] = slopes
        self.used = [n - n // 3 if option.seqused else n for n in self.o.lengths]
        if option.seqused:
            self.keywords["seqused_k"] = torch.tensor(self.used, dtype=torch.int32, device=device)
        if option.sinks:
            self.leaves.append(torch.linspace(-1.0, 1.0, heads, device=device))
        self.leaves = [t.requires_grad_() for t in self.leaves]
        self.state = torch.tensor([seed + 1, 0], device=device)

    def differentiated(self, attend: Callable[[list[Tensor]], Tensor], wide: bool = False) -> Any:
        """out and the gradients of all leaves, in float64 with ``wide``."""
        leaves, dout = self.leaves, self.o.dout
        if wide:
            leaves = [t.detach().double().requires_grad_() for t in leaves]
            dout = dout.double()
        out = attend(leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    def ours(self, leaves: list[Tensor]) -> Tensor:
        longest = self.o.longest
        found: Any = vs.varlen_attention(
            *leaves[:3],
            self.o.cu,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            sinks=leaves[3] if self.option.sinks else None,
            dropout_p=self.option.dropout_p,
            rng_state=self.state if self.option.dropout_p else None,
            **self.keywords,
        )
        return found

    def dense(self, leaves: list[Tensor], keep: list[Tensor] | None = None) -> Tensor:
        """A sequence after the other with all its scores."""
        sinks = leaves[3] if self.option.sinks else None
        return dense_attention(*leaves[:3], self.o.cu, sinks=sinks, keep=keep, **self.keywords)[0]

    def keep(self) -> list[Tensor] | None:
        """Factors of the dropout that we draw, (H, n, n) for each sequence."""
        if not self.option.dropout_p:
            return None
        heads = torch.arange(self.leaves[0].shape[1])
        rows = [torch.arange(n) for n in self.o.lengths]
        p = self.option.dropout_p
        return [keep_scale(self.state, p, b, heads, i, i) for b, i in enumerate(rows)]

    def bias(self) -> Tensor:
        """The additive mask (B, 1 or H, S, S) of lengths, causality, window and ALiBi."""
        size, device = self.o.seqlen, self.o.cu.device
        at = torch.arange(size, device=device)
        distance = at - at[:, None]  # key minus query
        used = torch.tensor(self.used, device=device)
        hidden = (at >= used[:, None])[:, None, None]
        if self.option.causal:
            hidden = hidden | (distance > 0)
        if "window" in self.keywords:
            near = at < at[:, None] - self.keywords["window"][0]
            real = self.o.real[:, None, :, None]  # a padding row sees what it likes
            hidden = hidden | (near & real)
        scores = torch.zeros(1, 1, size, size, device=device)
        if self.option.alibi:
            scores = -self.keywords["alibi_slopes"][:, None, None] * distance.abs()
        return scores.expand(len(used), -1, -1, -1).masked_fill(hidden, -torch.inf)

    def padded(self) -> Callable[[list[Tensor]], Tensor]:
        """SDPA over the padded batch. The mask is made once, padding and its way back are part of
        the call; a sink is a key of zeros whose score is the sink and whose value is 0."""
        bias, real, grouped = self.bias(), self.o.real, self.option.group > 1

        def attend(leaves: list[Tensor]) -> Tensor:
            q, k, v = (
                t.new_zeros(*real.shape, *t.shape[1:]).index_put((real,), t).transpose(1, 2)
                for t in leaves[:3]
            )
            mask = bias
            if self.option.sinks:
                k, v = pad(k, (0, 0, 0, 1)), pad(v, (0, 0, 0, 1))
                column = leaves[3][:, None, None].expand(len(real), -1, real.shape[1], 1)
                mask = torch.cat([bias.expand(-1, column.shape[1], -1, -1), column], -1)
            out = sdpa(q, k, v, attn_mask=mask, enable_gqa=grouped)
            return out.transpose(1, 2)[real]

        return attend


def _build(option: Option, shape: Shape, device: torch.device, seed: int) -> Setup:
    call = Call(option, shape, device, seed)
    dense = partial(call.dense, keep=call.keep())
    runs = {
        "varstream": partial(call.differentiated, call.ours),
        "loop_dense": partial(call.differentiated, dense),
        "float64": partial(call.differentiated, dense, wide=True),
    }
    if not (option.softcap or option.dropout_p):
        runs["padded_sdpa"] = partial(call.differentiated, call.padded())
    return Setup(runs)


OPTIONS = {
    "window": Option(window=True),
    "gqa": Option(group=4),
    "softcap": Option(softcap=2.0),
    "alibi": Option(alibi=True),
    "sinks": Option(sinks=True),
    "dropout": Option(dropout_p=0.1),
    "seqused_k": Option(causal=False, seqused=True),
}
CANNOT = {
    "softcap": "SDPA has no softcap",
    "dropout": "SDPA draws other random numbers; loop_dense is given ours ready made",
}
NOTES = {
    "window": "a quarter of the longest sequence to the left",
    "gqa": "4 query heads to a key head",
    "softcap": "2.0",
    "dropout": "0.1",
    "seqused_k": "two thirds of the keys, not causal",
}


def _case(name: str, option: Option) -> Case:
    padded = peers.never(CANNOT[name]) if name in CANNOT else peers.cpu
    words = [NOTES.get(name, ""), "forward and backward"]
    return Case(
        f"attention/{name}",
        "varlen_attention",
        {"batch": 8, "seqlen": 256, "heads": 8, "head_dim": 64, "shortest_percent": 20},
        partial(_build, option),
        {"batch": 3, "seqlen": 24, "heads": 4, "head_dim": 8},
        peers=(Peer("padded_sdpa", padded), Peer("loop_dense")),
        tolerance=TOLERANCE["float32"],
        note="; ".join(w for w in words if w),
    )


CASES = tuple(_case(name, option) for name, option in OPTIONS.items())
