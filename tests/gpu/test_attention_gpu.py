"""What only a GPU shows of attention's kernels: no synchronisation, streams, graphs, other devices,
many tiles, offsets past 32 bits. Their results are tested in tests/test_attention*.py, on every
back end."""

from __future__ import annotations

import pytest
import torch
from cases import cu_seqlens

import varstream as vs
from varstream import _C, _load
from varstream.testing import assert_error_ratio, dense_attention

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
HEADS, KV_HEADS, DIM = 4, 2, 64


def tensors(rows: int, dim: int = DIM, device: str = DEVICE):
    """q, k, v of one packed batch, bfloat16."""
    return [
        torch.randn(rows, heads, dim, dtype=torch.bfloat16, device=device)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]


def every_option(batch: int):
    return {
        "causal": True,
        "window": (50, 0),
        "softcap": 3.0,
        "alibi_slopes": torch.rand(batch, HEADS, device=DEVICE),
        "sinks": torch.randn(HEADS, device=DEVICE),
        "dropout_p": 0.1,
        "rng_state": torch.tensor([5, 6], device=DEVICE),
    }


def test_a_kernel_serves_half_precision_and_composed_calls_the_rest():
    assert _load.has_cuda_kernel("varlen_attention")
    assert {"attention_forward", "tile_schedule"} <= set(_C.build_info()["kernels"])
    q, k, v = (t.double() for t in tensors(9))
    cu = cu_seqlens([4, 5])
    out = vs.varlen_attention(q, k, v, cu.to(DEVICE), causal=True)
    want, _ = dense_attention(q.cpu(), k.cpu(), v.cpu(), cu, causal=True)
    assert torch.allclose(out.cpu(), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", ["plain", "every"])
def test_no_synchronisation_and_current_stream(options):
    lengths = [70, 1, 0, 200]
    q, k, v = tensors(sum(lengths))
    cu = cu_seqlens(lengths).to(DEVICE)
    keywords = every_option(len(lengths)) if options == "every" else {}
    keywords |= {"max_seqlen_q": 200, "max_seqlen_k": 200, "return_lse": True}
    want = vs.varlen_attention(q, k, v, cu, **keywords)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            got = vs.varlen_attention(q, k, v, cu, **keywords)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_a_cuda_graph_replays_on_other_lengths():
    """The tiles are listed on the device: a graph follows what cu_seqlens holds at the replay."""
    rows = 400
    q, k, v = tensors(rows)
    cu = cu_seqlens([100, 300]).to(DEVICE)
    keywords = {"max_seqlen_q": rows, "max_seqlen_k": rows, "causal": True, "return_lse": True}
    for _ in range(3):
        vs.varlen_attention(q, k, v, cu, **keywords)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = vs.varlen_attention(q, k, v, cu, **keywords)
    for lengths in ([100, 300], [1, 399], [400, 0], [257, 60]):  # the last leaves an inert tail
        for t in (q, k, v):
            t.normal_()
        cu.copy_(cu_seqlens(lengths))
        graph.replay()
        want = vs.varlen_attention(q, k, v, cu, **keywords)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)


def test_thousands_of_tiles_of_every_size():
    """One long sequence among thousands of short ones; each equals itself alone."""
    lengths = [1, 7, 128, 129, 0] * 1000 + [20_000] + [3] * 500
    q, k, v = tensors(sum(lengths))
    cu = cu_seqlens(lengths)
    out, lse = vs.varlen_attention(q, k, v, cu.to(DEVICE), causal=True, return_lse=True)
    for b in (0, 1, 2, 3, 2498, 4999, 5000, 5001, 5500):
        rows = slice(int(cu[b]), int(cu[b + 1]))
        alone = cu_seqlens([lengths[b]]).to(DEVICE)
        want = vs.varlen_attention(q[rows], k[rows], v[rows], alone, causal=True, return_lse=True)
        assert torch.equal(out[rows], want[0]) and torch.equal(lse[:, rows], want[1])


def test_low_precision_gradients_of_a_long_sequence():
    """The kernel's out and LSE serve the backward, which is composed."""
    q, k, v = (t.requires_grad_() for t in tensors(1500))
    cu = cu_seqlens([1000, 500]).to(DEVICE)
    dout = torch.randn_like(q)

    def gradients(attend, inputs):
        out = attend(*inputs)
        return out, *torch.autograd.grad(out, inputs, dout.to(out.dtype))

    def plain(*inputs):
        return dense_attention(*inputs, cu, causal=True)[0]

    ours = gradients(lambda *inputs: vs.varlen_attention(*inputs, cu, causal=True), [q, k, v])
    same = gradients(plain, [q, k, v])
    exact = gradients(plain, [t.detach().double().requires_grad_() for t in (q, k, v)])
    for name, a, p, e in zip(("out", "dq", "dk", "dv"), ours, same, exact, strict=True):
        assert_error_ratio(a, p, e, 2.0, name)


def test_another_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    q, k, v = tensors(200, device="cuda:1")
    cu = cu_seqlens([150, 50])
    out = vs.varlen_attention(q, k, v, cu.to("cuda:1"), causal=True)
    want = vs.varlen_attention(*(t.to("cuda:0") for t in (q, k, v)), cu.to("cuda:0"), causal=True)
    assert out.device == q.device and torch.equal(out.cpu(), want.cpu())


@pytest.mark.slow
def test_offsets_past_32_bits():
    """q, k, v and out of 2.15e9 elements each: the last rows lie past 2^31 elements."""
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    heads, dim, last = 128, 256, 7
    rows = 2**31 // (heads * dim) + last
    q, k, v = (torch.zeros(rows, heads, dim, dtype=torch.bfloat16, device=DEVICE) for _ in range(3))
    ends = [t[-last:].normal_() for t in (q, k, v)]
    cu = cu_seqlens([rows - last, last]).to(DEVICE)
    # A window keeps the long sequence cheap.
    out = vs.varlen_attention(q, k, v, cu, window=(16, 0))
    want = vs.varlen_attention(*ends, cu_seqlens([last]).to(DEVICE), window=(16, 0))
    assert torch.equal(out[-last:], want) and not out[:-last].any()
