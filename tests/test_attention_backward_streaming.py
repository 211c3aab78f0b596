"""A chunk of queries against its prefix, as streaming calls the backward: the work is what the
chunk sees, so a sequence's chunks cost what one call does. Counted in emulated instructions."""

from __future__ import annotations

import emulation
import pytest
import torch
from attention_cases import BACKENDS, call_backward, call_kernel, case, int32
from cases import cu_seqlens

from varstream.testing import assert_exact

pytestmark = pytest.mark.emulated

EMULATED = BACKENDS["emulated"]
HEADS, KV_HEADS, DIM = 2, 1, 64
SHAPE = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": DIM, "value_dim": DIM}
TILE = 128  # rows (a query of each head of the group makes one) and keys
TILE_MMA = 5 * TILE * TILE * DIM // (16 * 8 * 16)  # five products of a tile


class Buffers:
    """dk and dv of all keys, and what calls that add into them cost."""

    def __init__(self, q, k, v, call):
        self.q, self.k, self.v, self.call = q, k, v, call
        self.out, self.lse = call_kernel(EMULATED, q, k, v, call)
        self.dout = torch.randn_like(self.out)
        self.dk, self.dv = torch.zeros(k.shape), torch.zeros(v.shape)

    def add(self, rows: slice, keys: int, **lengths) -> tuple[torch.Tensor, int]:
        """dq of these queries against the first `keys` keys, and how many mma that took."""
        operators = torch.ops.varstream_emulated
        operators.clear_instruction_counts()
        k, v, dk, dv = (t[:keys] for t in (self.k, self.v, self.dk, self.dv))
        saved = self.dout[rows], self.q[rows], k, v, self.out[rows], self.lse[:, rows], None
        call = self.call._replace(**lengths)
        dq = call_backward(EMULATED, *saved, call=call, buffers=(dk, dv, None))
        return dq, operators.instruction_count("mma")


def visible_tiles(sq: int, sk: int, left: int = -1) -> int:
    """Tiles of rows that the key tiles of a causal sequence meet, for all K/V heads."""
    group, tiles = HEADS // KV_HEADS, 0
    for first in range(0, sk, TILE):
        last = min(first + TILE, sk) - 1
        begin = max(first - (sk - sq), 0)
        end = sq if left < 0 else min(max(last + left + 1 - (sk - sq), 0), sq)
        tiles += max(-(-(end - begin) * group // TILE), 0)
    return tiles * KV_HEADS


@pytest.mark.parametrize("left", [-1, 150])
@pytest.mark.parametrize("chunk", [128, 256])
def test_chunks_cost_what_one_call_does(chunk, left):
    total = 640
    q, k, v, call = case(EMULATED, [total], [total], {"causal": True}, torch.bfloat16, **SHAPE)
    call = call._replace(window_left=left, deterministic=False)
    with emulation.emulated():
        whole, parts = Buffers(q, k, v, call), Buffers(q, k, v, call)
        parts.dout = whole.dout
        dq, cost = whole.add(slice(0, total), total)
        assert cost == visible_tiles(total, total, left) * TILE_MMA
        chunks, spent = [], 0
        for begin in range(0, total, chunk):
            end = min(begin + chunk, total)
            lengths = {"cu_seqlens_q": int32(0, end - begin), "cu_seqlens_k": int32(0, end)}
            part, mma = parts.add(slice(begin, end), end, **lengths)
            assert mma == visible_tiles(end - begin, end, left) * TILE_MMA
            chunks.append(part)
            spent += mma
    assert spent <= 1.05 * cost
    assert_exact(torch.cat(chunks), dq, 1e-2)
    assert_exact(parts.dk, whole.dk, 2e-3)
    assert_exact(parts.dv, whole.dv, 2e-3)


def test_chunks_of_packed_documents_cost_little_more():
    """Chunks that end inside documents, whose tiles then begin elsewhere."""
    documents, chunk = [200, 440, 128], 256
    total, cu = sum(documents), cu_seqlens(documents).tolist()
    q, k, v, call = case(EMULATED, documents, documents, {"causal": True}, torch.bfloat16, **SHAPE)
    with emulation.emulated():
        whole, parts = Buffers(q, k, v, call), Buffers(q, k, v, call)
        parts.dout = whole.dout
        dq, cost = whole.add(slice(0, total), total)
        chunks, spent = [], 0
        for begin in range(0, total, chunk):
            end = min(begin + chunk, total)
            # A document of the chunk has the keys up to the chunk's end, others none.
            ends = [min(max(c, begin), end) for c in cu]
            used = [
                min(b, end) - a if min(b, end) > max(a, begin) else 0
                for a, b in zip(cu, cu[1:], strict=False)
            ]
            lengths = {
                "cu_seqlens_q": int32(*(e - begin for e in ends)),
                "cu_seqlens_k": int32(*cu),
                "seqused_k": int32(*used),
            }
            part, mma = parts.add(slice(begin, end), total, **lengths)
            chunks.append(part)
            spent += mma
    assert spent <= 1.05 * cost
    assert_exact(torch.cat(chunks), dq, 1e-2)
    assert_exact(parts.dk, whole.dk, 2e-3)
    assert_exact(parts.dv, whole.dv, 2e-3)


@pytest.mark.parametrize("causal", [True, False])
def test_keys_past_the_chunks_end_are_not_touched(causal):
    """Behind seqused_k or not in the call at all: the same work, and they keep their bits."""
    q, k, v, call = case(EMULATED, [512], [512], {"causal": causal}, torch.bfloat16, **SHAPE)
    begin, end = 128, 256
    rows, lengths = slice(begin, end), {"cu_seqlens_q": int32(0, end - begin)}
    with emulation.emulated():
        cut, used = Buffers(q, k, v, call), Buffers(q, k, v, call)
        used.dout, used.k, used.v = cut.dout, k.clone(), v.clone()
        for t in (used.k, used.v, used.dk, used.dv):
            t[end:] = torch.nan
        kept = used.dk[end:].clone()
        dq, cost = cut.add(rows, end, **lengths, cu_seqlens_k=int32(0, end))
        want, mma = used.add(rows, 512, **lengths, cu_seqlens_k=int32(0, 512), seqused_k=int32(end))
    assert torch.equal(dq, want) and mma == cost
    for a, b in ((cut.dk, used.dk), (cut.dv, used.dv)):
        assert torch.equal(a[:end], b[:end]) and b[end:].isnan().all()
    assert torch.equal(kept.view(torch.int32), used.dk[end:].view(torch.int32))
