"""What only the attention kernels promise, emulated or on a GPU: lengths that lie are harmless, any
strides and sizes give the same numbers, the order of threads changes nothing, what they can't take
is refused by name."""

import emulation
import pytest
import torch
from attention_cases import (
    DEFAULTS,
    HEADS,
    LIES,
    OPTIONS,
    assert_forward,
    call_kernel,
    case,
    int32,
    make,
    on,
)
from cases import cu_seqlens

import varstream as vs
from varstream.ops.attention_call import _check_kernel_rows, check_call


@on("emulated", "cuda")
@pytest.mark.parametrize("options", ["plain", "everything"])
@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_lengths_that_lie_stay_inside_the_tensors(backend, lie, options):
    """Under sanitizers nothing outside is touched; everywhere the kernel comes back."""
    q, k, v, call = case(backend, [30, 40, 20], [50, 40, 40], OPTIONS[options])
    state = torch.tensor([1, 2])
    for extra in ({}, {"dropout_p": 0.5, "rng_state": state}):
        out, lse = call_kernel(backend, q, k, v, call._replace(**lie, **extra))
        assert out.shape == q.shape and lse.shape == (HEADS, 90)


@on("emulated", "cuda")
@pytest.mark.parametrize("longest", [0, 1, 64, 10**6, 2**40])
@pytest.mark.parametrize("options", ["causal", "everything"])
def test_maxima_that_lie_change_nothing(backend, longest, options):
    """They bound the schedule's order, not what is computed."""
    lq, lk = [3, 70, 1], [150, 70, 9]
    q, k, v, call = case(backend, lq, lk, OPTIONS[options])
    want = call_kernel(backend, q, k, v, call)
    lying = call._replace(max_seqlen_q=longest, max_seqlen_k=longest)
    for got, expected in zip(call_kernel(backend, q, k, v, lying), want, strict=True):
        assert torch.equal(got, expected)


@on("emulated", "cuda")
@pytest.mark.parametrize("options", ["plain", "everything"])
def test_rows_that_no_sequence_holds_are_written(backend, options):
    """The inert tail with no sequence at all, and after some."""
    q, k, v, call = case(backend, [150], [150], OPTIONS[options])
    for cu in (int32(0), int32(0, 0), int32(0, 3, 3, 20)):
        inside = int(cu[-1])
        out, lse = call_kernel(backend, q, k, v, call._replace(cu_seqlens_q=cu, cu_seqlens_k=cu))
        assert (out[inside:] == 0).all() and (lse[:, inside:] == -torch.inf).all()
        assert out.isfinite().all() and lse[:, :inside].isfinite().all()


MOST_ROWS = 2**31 - 256


@on("emulated", "cuda")
@pytest.mark.parametrize("options", ["causal", "everything"])
def test_as_many_keys_as_there_can_be(backend, options):
    """All keys alike, so a window at the end of 2^31 - 256 shows the same as one of 512."""
    q, k, v, call = case(backend, [300], [1], OPTIONS[options])
    dropout = {"dropout_p": 0.3, "rng_state": torch.tensor([1, 2])}
    found = []
    for keys in (512, MOST_ROWS):
        # Expanded where the kernel runs: a copy to there would not be.
        here = [backend.here(t).expand(keys, -1, -1) for t in (k, v)]
        lying = {"cu_seqlens_k": int32(0, keys), "max_seqlen_k": 2**63 - 1}
        call = call._replace(window_left=80, **lying)
        found.append(call_kernel(backend, q, *here, call))
        out, _ = call_kernel(backend, q, *here, call._replace(**dropout))
        assert out.isfinite().all()
    for short, long in zip(*found, strict=True):
        assert torch.equal(short, long)
    if options == "causal":  # no sink takes a share
        wanted = v.repeat_interleave(HEADS // v.shape[1], 1).expand_as(q)
        assert torch.allclose(found[0][0].float(), wanted.float(), rtol=1e-2)


@on("emulated", "cuda")
def test_expanded_tensors(backend):
    """Strides of 0 over heads or rows, and rows that begin within a tensor."""
    lengths = [5, 71]
    cu = cu_seqlens(lengths)
    wide = torch.randn(77, HEADS, 24, dtype=backend.dtypes[0])
    wide = backend.here(wide)[1:, :, 8:]
    views = {
        "heads": wide[:, :1].expand(-1, HEADS, -1),
        "rows": wide[3:4].expand(76, -1, -1),
        "both": wide[3:4, :1].expand(76, HEADS, -1),
        "parts": wide,
    }
    for view in views.values():
        compact = view.contiguous()
        for q, k, v in ((view, wide, view), (wide, view, view), (view, view, wide)):
            tensors = [compact if t is view else wide.contiguous() for t in (q, k, v)]
            got = backend.attention(q, k, v, cu, causal=True)
            want = backend.attention(*tensors, cu, causal=True)
            assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@on("emulated", "cuda")
@pytest.mark.parametrize("stride", [4, 1, 2**60])
def test_strides_of_single_rows_and_heads_mean_nothing(backend, stride):
    q, k, v, call = case(backend, [3], [1], {}, kv_heads=1)
    want = call_kernel(backend, q, k, v, call)
    k, v = (backend.here(t).as_strided(t.shape, (stride, stride, 1)) for t in (k, v))
    got = call_kernel(backend, q, k, v, call)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_broken_query_breaks_its_own_row_only(backend, value):
    """Also where heads share a tile, as the queries here are few."""
    q, k, v, keywords, _ = make([9, 30], [40, 30], OPTIONS["sinks"], dtype=backend.dtypes[0])
    cu = cu_seqlens([9, 30]), cu_seqlens([40, 30])
    with torch.no_grad():
        clean = backend.attention(q, k, v, *cu, **keywords)
        q[12, 1, 3] = value
        out, lse = backend.attention(q, k, v, *cu, **keywords)
    assert out[12, 1].isnan().all() and lse[1, 12].isnan()
    out[12, 1], lse[1, 12] = clean[0][12, 1], clean[1][1, 12]
    assert torch.equal(out, clean[0]) and torch.equal(lse, clean[1])


def test_sinks_that_are_not_finite(backend):
    """An infinite one takes all the weight; a NaN stays with its head."""
    q, k, v, _, _ = make([3, 2], [5, 0], {}, dtype=backend.dtypes[0])
    sinks = torch.tensor([torch.inf, torch.nan, -torch.inf, 1.0], dtype=q.dtype)
    with torch.no_grad():
        out, lse = backend.attention(q, k, v, cu_seqlens([3, 2]), cu_seqlens([5, 0]), sinks=sinks)
    assert (out[:, 0] == 0).all() and (lse[0] == torch.inf).all()
    assert out[:3, 1].isnan().all() and lse[1].isnan().all()
    assert out[:, 2:].isfinite().all() and lse[2:, :3].isfinite().all()
    assert (lse[2, 3:] == -torch.inf).all()


SCORES = {"flat": 0.01, "even": 1.0, "peaked": 8.0, "steep": 60.0}


@on("emulated", "cuda")
@pytest.mark.parametrize("size", [*SCORES.values(), 1000.0], ids=[*SCORES, "far_from_zero"])
def test_long_rows(backend, size):
    """Thousands of keys: errors of tiles must not add up, in the output or in the LSE."""
    keys, cu = 3000, (cu_seqlens([5]), cu_seqlens([3000]))
    for dtype in backend.dtypes:
        q, k, v = torch.randn(5, 1, 64), torch.randn(keys, 1, 64), torch.randn(keys, 1, 64)
        if size == 1000.0:  # a large score that all keys share
            k[..., 0], q[..., 0] = 8.0, size
        else:
            q *= size
        q, k, v = (t.to(dtype) for t in (q, k, v))
        assert_forward(backend, backend.attention(q, k, v, *cu), q, k, v, *cu)


@pytest.mark.emulated
def test_every_order_of_threads_gives_the_same_bits():
    lengths = [70, 1, 0, 66]
    with emulation.emulated() as operators:
        for options in ("plain", "everything"):
            found = []
            for schedule in ("warp-greedy", "round-robin", "1", "2", "3"):
                emulation.choose_schedule(schedule)
                torch.manual_seed(0)
                q, k, v, keywords, _ = make(lengths, lengths, OPTIONS[options], torch.bfloat16)
                operators.clear_instruction_counts()
                cu = cu_seqlens(lengths)
                found.append(
                    vs.varlen_attention(q, k, v, cu, return_lse=True, dropout_p=0.2, **keywords)
                )
                assert operators.instruction_count("mma") > 0
            for out, lse in found[1:]:
                assert torch.equal(out, found[0][0]) and torch.equal(lse, found[0][1])


@pytest.mark.emulated
def test_emulated_kernels_take_their_dtypes_and_leave_the_rest():
    """Forward and backward; outside the context no dtype reaches them."""
    cu = cu_seqlens([9])

    def mma_of(dtype):
        q = torch.randn(9, 2, 16, dtype=dtype, requires_grad=True)
        operators.clear_instruction_counts()
        out = vs.varlen_attention(q, q, q, cu)
        forward = operators.instruction_count("mma")
        out.sum().backward()
        assert q.grad is not None
        return forward, operators.instruction_count("mma") - forward

    with emulation.emulated() as operators:
        counts = [mma_of(t) for t in (torch.bfloat16, torch.float16, torch.float32, torch.float64)]
    assert counts[0] == counts[1] and min(counts[0]) > 0 and counts[2:] == [(0, 0)] * 2
    assert mma_of(torch.bfloat16) == (0, 0)


@on("emulated", "cuda")
def test_operator_contract(backend):
    """Schema, fake and autograd of torch's operator, on the kernel."""
    q, k, v, call = case(backend, [5, 3], [5, 9], OPTIONS["sinks"])
    arguments = [backend.here(t) for t in (q, k, v, *call)]
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    operator = torch.ops.varstream.varlen_attention.default
    torch.library.opcheck(operator, arguments, test_utils=tests)


@on("emulated", "cuda")
def test_compiles_whole(backend):
    q, k, v, _ = case(backend, [5, 70], [5, 70], {})
    q, k, v, cu = (backend.here(t) for t in (q, k, v, cu_seqlens([5, 70])))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(q, k, v, cu):
        return vs.varlen_attention(q, k, v, cu, max_seqlen_q=70, causal=True, return_lse=True)

    eager = vs.varlen_attention(q, k, v, cu, max_seqlen_q=70, causal=True, return_lse=True)
    for got, want in zip(step(q, k, v, cu), eager, strict=True):
        assert torch.equal(got, want)


def of_shape(*shape, dtype=torch.bfloat16):
    return torch.zeros(shape, dtype=dtype)


def part(shape, cut):
    """A part of a tensor that is made on the back end's device: a copy there would be compact."""
    return lambda here: cut(here(of_shape(*shape)))


STRIDED = part((8, 16, HEADS), lambda t: t.transpose(1, 2))
MISALIGNED = part((8, HEADS, 18), lambda t: t[..., 1:17])
WIDE_ROWS = part((8, HEADS * 16 + 4), lambda t: t[:, : HEADS * 16].unflatten(1, (HEADS, 16)))
TOO_MANY_ROWS = part((1, 2, 16), lambda t: t.expand(MOST_ROWS + 1, -1, -1))
TOO_MANY_HEADS = part((8, 1, 16), lambda t: t.expand(-1, 2**31, -1))
EVERY_SECOND = part((3,), lambda t: t.int()[::2])
REFUSED = {
    "q_dim": ({"q": of_shape(8, 4, 12)}, "q must have a head dim that is a multiple of 8.* got 12"),
    "q_wide": ({"q": of_shape(8, 4, 264)}, "q must have a head dim .* from 8 to 256.* got 264"),
    "v_dim": ({"v": of_shape(8, 2, 20)}, "v must have a head dim that is a multiple of 8.* got 20"),
    "k_dim": ({"k": of_shape(8, 2, 24)}, r"k must have q's head dim 16, got shape \(8, 2, 24\)"),
    "dims": ({"q": of_shape(8, 64)}, r"q must have 3 dimensions .*, got shape \(8, 64\)"),
    "heads": ({"q": of_shape(8, 3, 16)}, "q must have a multiple of k's 2 heads, got 3"),
    "no_heads": ({"k": of_shape(8, 0, 16), "v": of_shape(8, 0, 16)}, "a multiple of k's 0 heads"),
    "v_rows": ({"v": of_shape(9, 2, 16)}, "v must have k's rows and heads"),
    "strided": ({"q": STRIDED}, r"q must be contiguous in its last dimension.* stride 4.*contig"),
    "misaligned": ({"q": MISALIGNED}, "q must have heads that start at multiples of 16 bytes"),
    "row_stride": ({"q": WIDE_ROWS}, r"multiples of 16 bytes, got strides \(68, 16, 1\)"),
    "rows": ({"k": TOO_MANY_ROWS}, r"k must have at most 2\^31 - 256 rows, got 2147483393"),
    "many_heads": ({"q": TOO_MANY_HEADS}, r"q must have fewer than 2\^31 heads, got 2147483648"),
    "mix": ({"v": of_shape(8, 2, 16, dtype=torch.float16)}, "q, k and v must have one dtype"),
    "cu_dtype": ({"cu_seqlens_q": torch.tensor([0, 8])}, "cu_seqlens_q must be a contiguous int32"),
    "cu_strided": ({"cu_seqlens_k": EVERY_SECOND}, "cu_seqlens_k must be a contiguous"),
    "cu_none": ({"cu_seqlens_q": int32()}, "cu_seqlens_q must have at least 1 entry"),
    "batch": ({"cu_seqlens_k": int32(0, 3, 8)}, "cu_seqlens_k must have 2 entries.* got 3"),
    "seqused": ({"seqused_k": int32(1, 2)}, r"seqused_k must have shape \(1\), got \(2\)"),
    "slopes": ({"alibi_slopes": torch.ones(3)}, r"alibi_slopes must be floating.* got shape \(3\)"),
    "sinks": ({"sinks": torch.ones(4, dtype=torch.int32)}, "sinks must be floating"),
    "window": ({"window_left": -2}, "window must be at least -1"),
    "softcap": ({"softcap": -1.0}, "softcap must be at least 0, got -1"),
    "dropout": ({"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\), got 1"),
    "rng": ({"dropout_p": 0.5}, "rng_state must be given"),
    "rng_dtype": ({"dropout_p": 0.5, "rng_state": int32(1, 2)}, "rng_state must be an int64"),
}


@on("emulated", "cuda")
@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_a_kernel_cannot_take_is_refused_by_name(backend, change, message):
    q, k, v, call = case(backend, [8], [8], {}, torch.bfloat16)
    tensors = {"q": q, "k": k, "v": v}
    change = {name: t(backend.here) if callable(t) else t for name, t in change.items()}
    options = {name: value for name, value in change.items() if name not in tensors}
    tensors |= {name: change[name] for name in change if name in tensors}
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        call_kernel(backend, **tensors, call=call._replace(**options))


@pytest.mark.emulated
def test_the_emulated_kernel_refuses_other_dtypes():
    q, k, v, _, _ = make([8], [8], {}, torch.float32)
    arguments = DEFAULTS | {"cu_seqlens_q": cu_seqlens([8]), "cu_seqlens_k": None}
    call = check_call(q, k, v, **arguments)
    with emulation.emulated() as operators, pytest.raises(RuntimeError, match="q must be bfloat16"):
        operators.varlen_attention(q, k, v, *call)


KERNEL_ROWS = {
    "dim": (of_shape(8, 4, 12), r"k must have a head dim that is a multiple of 8 in .*, got 12"),
    "strided": (
        of_shape(8, 16, 4).transpose(1, 2),
        r"k must be contiguous in its last dimension on CUDA, got strides \(64, 1, 4\)",
    ),
    "row_stride": (
        of_shape(8, 68)[:, :64].unflatten(1, (4, 16)),
        r"k must have heads that start at multiples of 16 bytes .* \(68, 16, 1\) and offset 0",
    ),
    "head_stride": (
        of_shape(8, 4, 20)[..., :16],
        r"k must have heads that start at multiples of 16 bytes .* \(80, 20, 1\) and offset 0",
    ),
    "offset": (
        of_shape(8, 4, 24)[..., 4:20],
        r"k must have heads that start at multiples of 16 bytes .* \(96, 24, 1\) and offset 4",
    ),
}


@pytest.mark.parametrize(("tensor", "message"), KERNEL_ROWS.values(), ids=KERNEL_ROWS)
def test_what_python_refuses_of_cuda_tensors(tensor, message):
    """The check by itself, as it runs for CUDA tensors only."""
    with pytest.raises(ValueError, match=message):
        _check_kernel_rows("k", tensor)


@pytest.mark.parametrize(
    "tensor",
    [
        of_shape(8, 4, 16),
        of_shape(8, 4, 24)[..., 8:],
        of_shape(8, 1, 16).expand(-1, 4, -1),
        of_shape(1, 4, 16).as_strided((1, 1, 16), (4, 3, 1)),
        of_shape(0, 4, 20)[..., 4:],
    ],
    ids=["compact", "part", "expanded", "single", "empty"],
)
def test_what_python_takes_of_cuda_tensors(tensor):
    _check_kernel_rows("k", tensor)
