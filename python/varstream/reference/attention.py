"""Varlen attention composed from ATen: forward and backward over the tiles of ``attention_plan``.

Tiles without score modifiers run in ATen's CPU flash kernel (GQA inside, natural-log LSE, float64
too); the others, and all tiles on devices without that kernel, form one bounded block of scores at
a time. Partial results are merged by LSE. The backward uses the merged output and LSE for every
tile, so nothing is merged there (FlashAttention-2, Dao 2023).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from varstream._checks import acc_dtype
from varstream.reference.attention_plan import (
    CAUSAL,
    EDGE,
    RowBlock,
    Tile,
    plan_causal,
    plan_sequence,
)
from varstream.reference.philox import keep_scale

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

SCORE_ROWS, SCORE_KEYS = 256, 512  # a block of scores: Hq * 256 * 512 elements in acc dtype
FLASH_KEYS = 2048  # bounds the dk, dv that one tile's backward returns
# ATen skips hidden keys in blocks of 512: finer row blocks waste less at the mask's border.
FLASH_BORDER_ROWS = 256
WHOLE = 2**62


@dataclass(frozen=True)
class Options:
    """Every argument of the op that isn't q, k, v or a result; ``left``/``right`` hold the causal
    rule as well."""

    cu_seqlens_q: Tensor  # (B+1,) int32
    cu_seqlens_k: Tensor  # (B+1,) int32
    seqused_k: Tensor | None  # (B,) int32
    alibi_slopes: Tensor | None  # (Hq,) or (B, Hq)
    sinks: Tensor | None  # (Hq,)
    rng_state: Tensor | None  # (2,) int64
    left: int
    right: int
    softmax_scale: float
    softcap: float
    dropout_p: float

    @property
    def plain(self) -> bool:
        """No modifier between q k and the softmax, so a stock flash kernel can run the tile.

        ATen multiplies its hidden scores, -inf, by the scale: only a positive one keeps them so.
        """
        modified = self.softcap > 0.0 or self.alibi_slopes is not None or self.dropout_p > 0.0
        return self.softmax_scale > 0.0 and not modified

    @property
    def windowed(self) -> bool:
        """The mask has a border other than the causal diagonal, so its plan has ``edge`` tiles."""
        return self.left >= 0 or self.right > 0


@dataclass(frozen=True)
class Sequence:
    """One sequence of the batch: its rows in the packed tensors."""

    index: int
    q0: int
    sq: int
    k0: int
    sk: int  # keys in use

    def positions(self, block: RowBlock, tile: Tile, device: torch.device) -> tuple[Tensor, Tensor]:
        """Aligned query positions (n,) and key positions (m,) of a tile, counted from the first
        key."""
        shift = self.sk - self.sq
        rows = torch.arange(block.q0 + shift, block.q1 + shift, device=device)
        return rows, torch.arange(tile.k0, tile.k1, device=device)


def sequences(opts: Options) -> Iterator[Sequence]:
    """Non-empty sequences of the batch, read from the cumulative lengths."""
    cu_q, cu_k = opts.cu_seqlens_q.tolist(), opts.cu_seqlens_k.tolist()
    used = None if opts.seqused_k is None else opts.seqused_k.tolist()
    for b in range(len(cu_q) - 1):
        sk = cu_k[b + 1] - cu_k[b] if used is None else used[b]
        if cu_q[b + 1] > cu_q[b] and sk > 0:
            yield Sequence(b, cu_q[b], cu_q[b + 1] - cu_q[b], cu_k[b], sk)


def plan(seq: Sequence, opts: Options, flash: bool, flash_keys: int) -> list[RowBlock]:
    """Row blocks of one sequence for the flash kernel or for blocks of scores."""
    sq, sk, left, right = seq.sq, seq.sk, opts.left, opts.right
    if not flash:
        return plan_sequence(sq, sk, left, right, SCORE_ROWS, SCORE_KEYS, False)
    if left < 0 and right == 0:
        # Each row block adds into dk, dv of all the keys before it: a long prefix wants few.
        rows = sq if sk >= 2 * sq else max(FLASH_BORDER_ROWS, sq // 4)
        return plan_causal(sq, sk, rows, flash_keys, FLASH_BORDER_ROWS)
    rows = FLASH_BORDER_ROWS if opts.windowed else sq
    return plan_sequence(sq, sk, left, right, rows, flash_keys, True)


def even_length(q: Tensor, k: Tensor, v: Tensor, opts: Options) -> int:
    """The length that all sequences have, where they fill q and k and each row sees all keys of its
    own: one call then runs them as a batch. Else 0."""
    hidden = opts.left >= 0 or opts.right >= 0 or opts.seqused_k is not None
    batch, total = opts.cu_seqlens_q.shape[0] - 1, q.shape[0]
    if hidden or opts.sinks is not None or q.shape[2] != v.shape[2]:
        return 0
    if batch < 2 or total == 0 or total % batch or k.shape[0] != total:
        return 0
    even = torch.arange(0, total + 1, total // batch, dtype=opts.cu_seqlens_q.dtype)
    both = opts.cu_seqlens_q, opts.cu_seqlens_k
    return total // batch if all(torch.equal(cu, even) for cu in both) else 0


# --- forward --------------------------------------------------------------------------------------


def attention_forward(q: Tensor, k: Tensor, v: Tensor, opts: Options) -> tuple[Tensor, Tensor]:
    """Return out ``(total_q, Hq, Dv)`` in q's dtype and lse ``(Hq, total_q)`` in acc dtype."""
    acc = acc_dtype(q.dtype)
    flash = opts.plain and q.device.type == "cpu"
    if flash and (length := even_length(q, k, v, opts)):
        out, lse = _flash(*(_batched(t, length) for t in (q, k, v)), 0.0, scale=opts.softmax_scale)
        return _unbatched(out), lse.to(acc).transpose(0, 1).flatten(1)
    out = q.new_zeros(q.shape[0], q.shape[1], v.shape[2], dtype=acc)
    lse = q.new_full((q.shape[1], q.shape[0]), -torch.inf, dtype=acc)
    for seq in sequences(opts):
        for block in plan(seq, opts, flash, WHOLE):
            rows = slice(seq.q0 + block.q0, seq.q0 + block.q1)
            merged = (out[rows], lse[:, rows]) if block.again else None
            for tile in block.tiles:
                keys = slice(seq.k0 + tile.k0, seq.k0 + tile.k1)
                if flash and tile.kind != EDGE:
                    part = _flash_tile(q[rows], k[keys], v[keys], opts, tile)
                else:
                    part = _score_tile(q[rows], k[keys], v[keys], opts, seq, block, tile)
                merged = part if merged is None else _merge(merged, part)
            if merged is not None:
                out[rows] = merged[0]
                lse[:, rows] = merged[1]
    if opts.sinks is not None:
        end = int(opts.cu_seqlens_q[-1])  # the tail from there on has no softmax to join
        _add_sinks(out[:end], lse[:, :end], opts.sinks.to(acc))
    return out.to(q.dtype), lse


def _merge(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Merge partial (out (n, Hq, Dv), lse (Hq, n)) over disjoint keys; the result's out is in acc
    dtype."""
    lse = torch.logaddexp(a[1], b[1])  # -inf with -inf stays -inf
    safe = lse.masked_fill(lse == -torch.inf, 0.0)
    weight_a, weight_b = ((p[1] - safe).exp_().t().unsqueeze(-1) for p in (a, b))
    return torch.addcmul(b[0] * weight_b, a[0].to(lse.dtype), weight_a), lse


def _add_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> None:
    """Join the sinks (Hq,) to the softmax denominators, in place; they carry no value row."""
    total = torch.logaddexp(lse, sinks[:, None])
    shrink = (lse - total.masked_fill(total == -torch.inf, 0.0)).exp_()
    out.mul_(shrink.t().unsqueeze(-1))
    lse.copy_(total)


def _flash_tile(
    q: Tensor, k: Tensor, v: Tensor, opts: Options, tile: Tile
) -> tuple[Tensor, Tensor]:
    """Run q (n, Hq, D), k (m, Hkv, D), v (m, Hkv, Dv) in ATen's kernel, which wants D == Dv."""
    width = max(q.shape[2], v.shape[2])
    heads = _heads_of(tile, q, k)
    out, lse = _flash(
        *(_heads_first(_pad(t, width), heads) for t in (q, k, v)),
        0.0,
        tile.kind == CAUSAL,
        scale=opts.softmax_scale,
    )
    lse = lse.reshape(q.shape[1], -1).to(acc_dtype(q.dtype))
    return _rows_first(out, q.shape[1])[..., : v.shape[2]], lse


def _score_tile(
    q: Tensor, k: Tensor, v: Tensor, opts: Options, seq: Sequence, block: RowBlock, tile: Tile
) -> tuple[Tensor, Tensor]:
    """Form the tile's scores and reduce them: partial out (n, Hq, Dv) in acc dtype and lse (Hq,
    n)."""
    scores, _ = _scores(q, k, opts, seq, block, tile)
    top = scores.amax(-1, keepdim=True)
    top.masked_fill_(top == -torch.inf, 0.0)
    p = scores.sub_(top).exp_()
    total = p.sum(-1, keepdim=True)
    lse = (total.log() + top).squeeze(-1).flatten(0, 1)
    p = p / total.masked_fill(total == 0.0, 1.0)
    if opts.dropout_p > 0.0:
        p = p * _keep(opts, seq, block, tile, p)
    values = v.to(p.dtype).transpose(0, 1).unsqueeze(1)  # (Hkv, 1, m, Dv)
    return (p @ values).flatten(0, 1).transpose(0, 1), lse


def _scores(
    q: Tensor, k: Tensor, opts: Options, seq: Sequence, block: RowBlock, tile: Tile
) -> tuple[Tensor, Tensor | None]:
    """Masked scores (Hkv, G, n, m) in acc dtype, and tanh of the capped ones for its derivative."""
    grouped = _grouped(q, k.shape[1])
    keys = k.to(grouped.dtype).transpose(0, 1).unsqueeze(1)  # (Hkv, 1, m, D)
    scores = (grouped * opts.softmax_scale) @ keys.transpose(-1, -2)
    tanh = None
    if opts.softcap > 0.0:
        tanh = scores.div_(opts.softcap).tanh_()
        scores = tanh * opts.softcap
    rows, cols = seq.positions(block, tile, q.device)
    distance = cols[None, :] - rows[:, None]  # (n, m), negative to the left
    if opts.alibi_slopes is not None:
        slopes = opts.alibi_slopes
        slopes = (slopes[seq.index] if slopes.dim() == 2 else slopes).to(scores.dtype)
        scores = scores - slopes.view(k.shape[1], -1, 1, 1) * distance.abs()
    if tile.kind == EDGE:
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if opts.left >= 0:
            hidden |= distance < -opts.left
        if opts.right >= 0:
            hidden |= distance > opts.right
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores, tanh


def _keep(opts: Options, seq: Sequence, block: RowBlock, tile: Tile, p: Tensor) -> Tensor:
    """Dropout factors shaped and typed like the probabilities p (Hkv, G, n, m)."""
    assert opts.rng_state is not None
    heads = torch.arange(p.shape[0] * p.shape[1], device=p.device)
    rows, cols = seq.positions(block, tile, p.device)
    keep = keep_scale(opts.rng_state, opts.dropout_p, seq.index, heads, rows, cols)
    return keep.to(p.dtype).view(p.shape)


# --- backward -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Saved:
    """What the backward reads besides q, k, v: the forward's results and the gradients that
    arrive."""

    out: Tensor  # (total_q, Hq, Dv)
    lse: Tensor  # (Hq, total_q)
    dout: Tensor  # (total_q, Hq, Dv)
    dlse: Tensor | None  # (Hq, total_q)

    @cached_property
    def delta(self) -> Tensor:
        """(Hq, total_q): rowsum(dout * out) - dlse, which every dscore of a row subtracts."""
        acc = acc_dtype(self.out.dtype)
        delta = (self.dout.to(acc) * self.out.to(acc)).sum(-1).t()
        return delta if self.dlse is None else delta - self.dlse


def attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    saved: Saved,
    opts: Options,
    dk: Tensor,
    dv: Tensor,
    dsinks: Tensor | None,
) -> Tensor:
    """Add into dk, dv (and dsinks), acc dtype, and return dq (total_q, Hq, D) in acc dtype."""
    acc = acc_dtype(q.dtype)
    flash = opts.plain and q.device.type == "cpu"
    if flash and saved.dlse is None and (length := even_length(q, k, v, opts)):
        lse = saved.lse.unflatten(1, (-1, length)).transpose(0, 1)
        given = (_batched(t, length) for t in (saved.dout, q, k, v, saved.out))
        grads = _flash_backward(*given, lse, 0.0, False, scale=opts.softmax_scale)
        dk += _unbatched(grads[1])
        dv += _unbatched(grads[2])
        return _unbatched(grads[0]).to(acc)
    dq = q.new_zeros(q.shape, dtype=acc)
    for seq in sequences(opts):
        for block in plan(seq, opts, flash, FLASH_KEYS):
            rows = slice(seq.q0 + block.q0, seq.q0 + block.q1)
            for tile in block.tiles:
                keys = slice(seq.k0 + tile.k0, seq.k0 + tile.k1)
                if flash and tile.kind != EDGE:
                    grads = _flash_tile_backward(q, k, v, saved, opts, tile, rows, keys)
                else:
                    grads = _score_tile_backward(q, k, v, saved, opts, seq, block, tile, rows, keys)
                dq[rows] += grads[0]
                dk[keys] += grads[1]
                dv[keys] += grads[2]
    if dsinks is not None and opts.sinks is not None:
        _add_dsinks(dsinks, saved, opts)
    return dq


def _add_dsinks(dsinks: Tensor, saved: Saved, opts: Options) -> None:
    """dsink = -sum over its rows of p_sink * delta; rows past the last sequence don't count."""
    rows = int(opts.cu_seqlens_q[-1])
    assert opts.sinks is not None
    lse, delta = saved.lse[:, :rows], saved.delta[:, :rows]
    p = (opts.sinks.to(lse.dtype)[:, None] - lse).exp()
    p = p.masked_fill(lse == -torch.inf, 0.0)
    dsinks -= (p * delta).sum(1)


def _flash_tile_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    saved: Saved,
    opts: Options,
    tile: Tile,
    rows: slice,
    keys: slice,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one tile from ATen's kernel, given the row's global out and LSE.

    An LSE gradient rides along exactly. With a column of ones in v, zeros in q, k and out, and dlse
    as dout's extra column, the kernel's dout.v - dout.out becomes dout.v + dlse - dout.out.
    """
    qt, kt, vt, out, dout = q[rows], k[keys], v[keys], saved.out[rows], saved.dout[rows]
    width = max(q.shape[2], v.shape[2])
    if saved.dlse is not None:
        width += 1
        extra = saved.dlse[:, rows].t().to(dout.dtype).unsqueeze(-1)
        out, dout, vt = (_pad(t, width) for t in (out, dout, vt))
        dout[..., -1:] = extra
        vt[..., -1] = 1.0
    heads = _heads_of(tile, qt, kt)
    dq, dk, dv = _flash_backward(
        *(_heads_first(_pad(t, width), heads) for t in (dout, qt, kt, vt, out)),
        saved.lse[:, rows].reshape(1, heads, -1),
        0.0,
        tile.kind == CAUSAL,
        scale=opts.softmax_scale,
    )
    head_dim, value_dim = q.shape[2], v.shape[2]
    return (
        _rows_first(dq, q.shape[1])[..., :head_dim],
        _rows_first(dk, k.shape[1])[..., :head_dim],
        _rows_first(dv, k.shape[1])[..., :value_dim],
    )


def _score_tile_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    saved: Saved,
    opts: Options,
    seq: Sequence,
    block: RowBlock,
    tile: Tile,
    rows: slice,
    keys: slice,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one tile from its recomputed probabilities, all in acc dtype."""
    kv_heads = k.shape[1]
    scores, tanh = _scores(q[rows], k[keys], opts, seq, block, tile)
    # A row that sees no key has LSE -inf; +inf gives it probability 0 everywhere.
    lse = saved.lse[:, rows].masked_fill(saved.lse[:, rows] == -torch.inf, torch.inf)
    p = scores.sub_(lse.view(kv_heads, -1, lse.shape[1], 1)).exp_()  # (Hkv, G, n, m)
    dout = _grouped(saved.dout[rows], kv_heads)  # (Hkv, G, n, Dv)
    values = v[keys].to(p.dtype).transpose(0, 1).unsqueeze(1)
    dp = dout @ values.transpose(-1, -2)
    dropped = p
    if opts.dropout_p > 0.0:
        keep = _keep(opts, seq, block, tile, p)
        dp, dropped = dp * keep, p * keep
    dv = (dropped.transpose(-1, -2) @ dout).sum(1).transpose(0, 1)  # (m, Hkv, Dv)
    ds = dp.sub_(saved.delta[:, rows].reshape(kv_heads, -1, lse.shape[1], 1)).mul_(p)
    if tanh is not None:
        ds = ds * (1.0 - tanh * tanh)
    ds = ds * opts.softmax_scale
    keys_t = k[keys].to(p.dtype).transpose(0, 1).unsqueeze(1)
    dq = (ds @ keys_t).flatten(0, 1).transpose(0, 1)  # (n, Hq, D)
    dk = (ds.transpose(-1, -2) @ _grouped(q[rows], kv_heads)).sum(1).transpose(0, 1)
    return dq, dk, dv


# --- layout ---------------------------------------------------------------------------------------


def _heads_of(tile: Tile, q: Tensor, k: Tensor) -> int:
    """Heads of q for ATen's kernel. Where no key is hidden the query heads of a group are rows of
    their one key head: the kernel's products grow with its rows, which a chunk has few of."""
    return q.shape[1] if tile.kind == CAUSAL else k.shape[1]


def _heads_first(t: Tensor, heads: int) -> Tensor:
    """(n, H, D) as (1, heads, n, D), and more rows, H / heads times n, where that is above 1."""
    first = t.transpose(0, 1).unsqueeze(0)
    return first if t.shape[1] <= heads else first.reshape(1, heads, -1, t.shape[2])


def _rows_first(t: Tensor, heads: int) -> Tensor:
    """Back to (n, heads, D)."""
    return t.reshape(heads, -1, t.shape[3]).transpose(0, 1)


def _batched(t: Tensor, length: int) -> Tensor:
    """(B * length, H, D) as (B, H, length, D), a view."""
    return t.unflatten(0, (-1, length)).transpose(1, 2)


def _unbatched(t: Tensor) -> Tensor:
    """(B, H, length, D) as (B * length, H, D)."""
    return t.transpose(1, 2).flatten(0, 1)


def _grouped(t: Tensor, kv_heads: int) -> Tensor:
    """(n, Hq, D) as (Hkv, Hq / Hkv, n, D) in acc dtype."""
    n, heads, dim = t.shape
    return t.to(acc_dtype(t.dtype)).reshape(n, kv_heads, heads // kv_heads, dim).permute(1, 2, 0, 3)


def _pad(t: Tensor, width: int) -> Tensor:
    """Zero columns up to ``width`` in the last dimension."""
    missing = width - t.shape[-1]
    return torch.nn.functional.pad(t, (0, missing)) if missing else t
