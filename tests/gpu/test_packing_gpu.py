"""pack and unpack on a GPU: equal to the CPU kernels bit for bit, without synchronising."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import varstream as vs
from varstream import _C

pytestmark = pytest.mark.gpu

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.float8_e4m3fn,
    torch.bfloat16,
    torch.float32,
    torch.int64,
    torch.complex128,
]


def random_batch(batch: int, seqlen: int, *trailing: int, dtype: torch.dtype = torch.float32):
    x = (torch.rand(batch, seqlen, *trailing) * 100).to(dtype)
    mask = torch.rand(batch, seqlen) < 0.6
    return x, mask


def bits(x: Tensor) -> Tensor:
    return x.contiguous().unsqueeze(-1).view(torch.uint8).cpu()


def test_stable_abi_symbols_resolve():
    assert _C.build_info()["cuda"], _C.build_info()["cuda_reason"]
    assert all(_C.cuda_symbols().values()), _C.cuda_symbols()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "trailing", [(), (1,), (3,), (8,), (5, 7), (1024,), (4104,), (0,)], ids=str
)
@pytest.mark.parametrize("bounded", [False, True])
def test_equal_to_cpu(dtype: torch.dtype, trailing: tuple[int, ...], bounded: bool):
    x, mask = random_batch(5, 67, *trailing, dtype=dtype)
    bounds = {"max_tokens": int(mask.sum()) + 3, "max_seqlen": 67} if bounded else {}
    want = vs.pack(x, mask, **bounds)
    got = vs.pack(x.cuda(), mask.cuda(), **bounds)
    assert torch.equal(bits(got.values), bits(want.values))
    assert torch.equal(got.cu_seqlens.cpu(), want.cu_seqlens)
    assert torch.equal(got.indices.cpu(), want.indices)
    assert got.max_seqlen == want.max_seqlen
    assert torch.equal(bits(vs.unpack(got, fill=1)), bits(vs.unpack(want, fill=1)))


@pytest.mark.parametrize("offset", [1, 2, 4, 8])
def test_any_alignment(offset: int):
    storage = torch.randint(0, 255, (40 * 48 + offset,), dtype=torch.uint8, device="cuda")
    x = storage[offset:].view(40, 48)
    indices = torch.randperm(40, device="cuda")
    got = torch.ops.varstream.pack(x, indices)
    assert torch.equal(got, x[indices])
    assert torch.equal(torch.ops.varstream.unpack(got, indices, 40, 0.0), x)


def test_strided_input():
    x, mask = random_batch(4, 33, 6)
    strided = x.cuda().permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert torch.equal(vs.pack(strided, mask.cuda()).values.cpu(), x[mask])


def test_indices_out_of_range_touch_nothing():
    x = torch.rand(8, 5, device="cuda")
    wild = torch.tensor([3, -1, 8, 2**62, -(2**63), 0], device="cuda")
    got = torch.ops.varstream.pack(x, wild)
    assert torch.equal(got[[0, 5]], x[[3, 0]])
    assert (got[1:5] == 0).all()
    back = torch.ops.varstream.unpack(got + 1, wild, 8, -2.0)
    assert torch.equal(back[[3, 0]], got[[0, 5]] + 1)
    assert (back[[1, 2, 4, 5, 6, 7]] == -2).all()


def test_gradients_and_isolation():
    x, mask = random_batch(3, 40, 9)
    x = x.masked_fill(~mask[..., None], float("nan")).cuda().requires_grad_()
    packed = vs.pack(x, mask.cuda(), max_tokens=130, max_seqlen=40)
    assert packed.values.isfinite().all()
    (grad,) = torch.autograd.grad(packed.values, x, torch.full_like(packed.values, 3.0))
    assert torch.equal(grad.cpu(), 3.0 * mask[..., None].expand(3, 40, 9))


def test_no_synchronisation_and_current_stream():
    x, mask = (t.cuda() for t in random_batch(4, 50, 16))
    total = int(mask.sum())
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            packed = vs.pack(x, mask, max_tokens=200, max_seqlen=50)
            back = vs.unpack(packed)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    assert torch.equal(packed.values[:total], x[mask])
    assert torch.equal(back, x * mask[..., None])


def test_cuda_graph_replays_on_new_data():
    x, mask = (t.cuda() for t in random_batch(4, 50, 16))
    for _ in range(3):
        vs.unpack(vs.pack(x, mask, max_tokens=200, max_seqlen=50))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        packed = vs.pack(x, mask, max_tokens=200, max_seqlen=50)
        back = vs.unpack(packed, fill=7.0)
    new_x, new_mask = (t.cuda() for t in random_batch(4, 50, 16))
    x.copy_(new_x)
    mask.copy_(new_mask)
    graph.replay()
    assert torch.equal(back, torch.where(new_mask[..., None], new_x, 7.0))
    assert int(packed.cu_seqlens[-1]) == int(new_mask.sum())


def test_opcheck_on_cuda():
    x = torch.rand(6, 3, device="cuda", requires_grad=True)
    indices = torch.tensor([4, -1, 0], device="cuda")
    torch.library.opcheck(torch.ops.varstream.pack.default, (x, indices))
    values = torch.rand(3, 3, device="cuda", requires_grad=True)
    torch.library.opcheck(torch.ops.varstream.unpack.default, (values, indices, 6, 0.0))


def test_fullgraph_compile():
    def step(x, mask):
        packed = vs.pack(x, mask, max_tokens=x.shape[0] * x.shape[1], max_seqlen=x.shape[1])
        return vs.unpack(packed, packed.values * 2)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for length in (5, 9, 17):
        x, mask = (t.cuda() for t in random_batch(3, length, 4))
        assert torch.equal(compiled(x, mask), step(x, mask))


def test_direct_calls_are_checked():
    x = torch.rand(4, 2, device="cuda")
    indices = torch.tensor([0, 1], device="cuda")
    pack, unpack = torch.ops.varstream.pack, torch.ops.varstream.unpack
    with pytest.raises(RuntimeError, match="indices must have dtype int64"):
        pack(x, indices.int())
    with pytest.raises(
        RuntimeError, match=r"indices must have 1 dimension \(n,\), got shape \(1, 2\)"
    ):
        pack(x, indices[None])
    with pytest.raises(RuntimeError, match="indices must be a CUDA tensor like x"):
        pack(x, indices.cpu())
    with pytest.raises(RuntimeError, match="values must have one row per index, 2"):
        unpack(x, indices, 4, 0.0)
    with pytest.raises(RuntimeError, match="rows must be >= 0, got -1"):
        unpack(x[:2], indices, -1, 0.0)


def test_validate_checks_values_on_cuda():
    x, mask = (t.cuda() for t in random_batch(2, 8, 3))
    mask.fill_(True)
    with pytest.raises(ValueError, match="max_tokens must be at least the 16 real tokens, got 4"):
        vs.pack(x, mask, max_tokens=4, max_seqlen=8, validate=True)
    packed = vs.pack(x, mask, max_tokens=4, max_seqlen=8)
    assert packed.cu_seqlens.tolist() == [0, 4, 4]


@pytest.mark.slow
def test_offsets_past_32_bits():
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    rows, width = 2**17 + 3, 2**15  # 4.3 GB of bytes
    x = torch.zeros(rows, width, dtype=torch.uint8, device="cuda")
    x[-1] = 9
    indices = torch.tensor([rows - 1, 0], device="cuda")
    got = torch.ops.varstream.pack(x, indices)
    assert (got[0] == 9).all() and (got[1] == 0).all()
    del x
    back = torch.ops.varstream.unpack(got, indices, rows, 1.0)
    assert (back[-1] == 9).all() and (back[0] == 0).all() and (back[1] == 1).all()
