"""The GPU's cases of attention's backward, as far as a machine without one can tell: operation
counts, bars, and that ours and the peers that run here agree at the small shapes."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from bench import attention_gradients as gradients
from bench import attention_ways as ways
from bench import lengths
from bench.cases import all_cases
from bench.cases.attention_backward import H100
from bench.runner import Options, _check, judged, run_case

from varstream.testing import relative_error

CPU = torch.device("cpu")
CASES = {
    name: case
    for name, case in all_cases().items()
    if case.topic in ("attention_backward", "attention_chunks") and case.devices == ("cuda",)
}
# Peers that take tensors of a CPU.
HERE = {"sdpa_flash", "padded_sdpa", "any_order", "one_call"}


def of(topic, part):
    return [case for name, case in CASES.items() if name.startswith(f"{topic}/{part}")]


def pack(sizes, causal=True, kv_heads=4, prefix=0):
    return ways.draw(sizes, causal, 4, kv_heads, 16, torch.bfloat16, CPU, 0, prefix)


def close(found, wanted):
    return [relative_error(a, b) <= 2e-2 for a, b in zip(found, wanted, strict=True)]


# --- operations -----------------------------------------------------------------------------------


def visible(queries, keys, causal):
    """Scores that are seen, counted one by one, causal from the bottom right."""
    return sum(not causal or j <= i + keys - queries for i in range(queries) for j in range(keys))


def counted(pairs, heads, width):
    """Operations of q k and dout v, of dv, dq and dk, score by score: 2 an element."""
    return sum(2 * width for product in range(5) for head in range(heads) for score in range(pairs))


@pytest.mark.parametrize("causal", [False, True])
def test_operations_of_a_backward(causal):
    sizes = (1, 7, 12)
    pairs = lengths.visible_pairs(sizes, causal)
    assert pairs == sum(visible(n, n, causal) for n in sizes)
    found = lengths.flops(lengths.BACKWARD_PRODUCTS, pairs, 3, 5)
    assert found == counted(pairs, 3, 5)
    assert found == 2.5 * lengths.flops(lengths.FORWARD_PRODUCTS, pairs, 3, 5)


@pytest.mark.parametrize("chunk, prefix", [(1, 0), (5, 0), (1, 9), (6, 11)])
def test_operations_of_a_chunk(chunk, prefix):
    assert lengths.chunk_pairs(chunk, prefix) == visible(chunk, chunk + prefix, True)


@pytest.mark.parametrize(
    "name",
    [
        "attention_backward/dense_512_hd64_full",
        "attention_backward/ragged_1024_gqa_hd128_causal",
        "attention_backward/deterministic_ragged_16384_mha_hd64_causal",
        "attention_chunks/chunk_1024_prefix_8192_gqa_hd128",
        "attention_chunks/sum_16384_by_1024_mha_hd64",
    ],
)
def test_a_case_counts_what_its_pack_sees(name):
    case = CASES[name]
    shape = case.sizes(quick=True)
    setup = case.build(shape, CPU, 0)
    p = setup.runs["float32"].args[0]
    pairs = sum(visible(q, k, p.causal) for q, k in zip(p.lengths, p.key_lengths, strict=True))
    assert setup.flops == counted(pairs, 1, 1) * shape["heads"] * shape["head_dim"]
    assert p.k.shape[1] == shape["kv_heads"]


# --- the cases ------------------------------------------------------------------------------------


def test_the_cases_are_those_promised():
    forward = {n.partition("/")[2] for n in all_cases() if n.startswith("attention_forward/")}
    backward = {case.name.partition("/")[2] for case in of("attention_backward", "")}
    assert len(forward) == 41 and forward < backward
    assert all(name.startswith("deterministic_") for name in backward - forward)
    assert {c.shape["head_dim"] for c in of("attention_backward", "deterministic_")} == {64, 128}
    chunk = of("attention_chunks", "chunk_")
    assert {c.shape["chunk"] for c in chunk} == {1024, 2048}
    assert {c.shape["prefix"] >> 10 for c in chunk} == {8, 16, 32, 64}
    assert len(of("attention_chunks", "sum_")) == 7


def test_the_bars_are_those_promised():
    for case in CASES.values():
        bars = {bar.metric: bar for bar in case.bars}
        if "/deterministic_" in case.name:
            assert not bars
        elif "/sum_" in case.name:
            assert bars.keys() == {"time/one_call"} and bars["time/one_call"].limit == 1.05
        else:
            flash = "sdpa_flash" if "seqlen" in case.shape else "torch_varlen"
            assert bars.keys() - {"seconds"} == {f"time/{flash}", "time/flash_attn"}
            assert bars[f"time/{flash}"].limit == pytest.approx(1 / 0.9)
    limited = {c.name: b for c in CASES.values() for b in c.bars if b.metric == "seconds"}
    assert set(limited) == {f"attention_backward/dense_{n}_hd128_full" for n in (8192, 16384)}
    for name, bar in limited.items():
        seqlen = CASES[name].shape["seqlen"]
        # 16k queries of a sequence's keys, hidden 2048, five products.
        assert bar.limit * 320e12 == pytest.approx(10 * 16384 * seqlen * 2048)
        assert bar.device == H100


def test_a_bar_of_one_device_is_no_bar_on_another():
    case = CASES["attention_backward/dense_8192_hd128_full"]
    seconds = SimpleNamespace(bar=next(b for b in case.bars if b.metric == "seconds"))
    for name, judged_here in (("NVIDIA H100 80GB HBM3", True), ("NVIDIA H100 PCIe", False)):
        entry = {
            "status": "ok",
            "environment": {"device": {"name": name}},
            "runs": {"varstream": {"seconds": {"median": 2 * seconds.bar.limit}}},
            "figures": {},
        }
        found = judged(case, entry)
        assert ("seconds" in found) == judged_here
        assert {"time/sdpa_flash", "time/flash_attn"} <= set(found)
        if judged_here:
            assert found["seconds"]["holds"] is False


@pytest.mark.parametrize("name", CASES)
def test_a_case_is_sound(name):
    case = CASES[name]
    assert case.shape["heads"] % case.shape["kv_heads"] == 0
    assert case.dtype == "bfloat16"
    assert set(case.sizes(quick=True)) == set(case.shape)
    if "tokens" in case.shape and "chunk" in case.shape:
        assert case.shape["tokens"] % case.shape["chunk"] == 0


@pytest.mark.parametrize("name", CASES)
def test_ours_and_the_peers_that_run_here_agree(name):
    case = CASES[name]
    setup = case.build(case.sizes(quick=True), CPU, 0)
    peers = {peer.name for peer in case.peers}
    assert peers | {"varstream", "float32"} <= set(setup.runs)
    here = ["varstream", *sorted(peers & HERE)]
    unavailable: dict[str, str] = {}
    checked = _check(case, setup, here, unavailable, CPU, lambda phase: None)
    assert not unavailable and set(checked.errors) == set(here)


def test_rates_become_figures():
    case = CASES["attention_chunks/chunk_1024_prefix_8192_gqa_hd128"]
    entry = run_case(case, Options(CPU, rounds=2, quick=True))
    assert entry["status"] == "ok", entry["failure"]
    assert {"tflops", "tflops/gemm_rate"} == set(entry["figures"])


# --- the backwards --------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_every_way_gives_the_gradients(causal, kv_heads):
    """And another mask, prefix or direction would be seen."""
    p = pack((5, 40, 1, 33), causal, kv_heads)
    wanted = gradients.reference(p)
    for name in ("varstream", "padded_sdpa", "nested_sdpa"):
        if name == "nested_sdpa" and (causal or kv_heads == 1):
            continue  # torch refuses it on the CPU
        padded = name in ways.PADDED
        found = gradients.Gradients(ways.WAYS[name], p, padded)()
        assert all(close(p.unpad(found) if padded else found, wanted)), name
    for other in (replace(p, causal=not causal), replace(p, dout=p.dout.roll(1, 0))):
        assert not any(close(gradients.reference(other), wanted))


def test_a_backward_runs_its_forward_once():
    calls = []

    def way(p):
        calls.append(p)
        return ways.ours(p)

    run = gradients.Gradients(way, pack((9, 4)))
    one, two = run(), run()
    assert len(calls) == 1
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("make", ["ours", "added"])
def test_calls_add_into_the_same_buffers(make):
    p = pack((6,), prefix=11, kv_heads=2)
    run = gradients.Accumulated(p) if make == "ours" else gradients.Added(ways.ours, p)
    wanted = gradients.reference(p)
    assert wanted[1].shape == (17, 2, 16)
    once = [t.clone() for t in run()]
    twice = run()
    assert all(close(once, wanted)) and twice[1].dtype == torch.float32
    assert all(close(twice, [wanted[0], 2 * wanted[1], 2 * wanted[2]]))


@pytest.mark.parametrize("size", [1, 8, 20, 50])
@pytest.mark.parametrize("way", [None, ways.ours])
def test_chunks_add_up_to_the_sequence(size, way):
    p = pack((20,), kv_heads=2)
    parts = gradients.chunks(p, size)
    assert sum(part.q.shape[0] for part in parts) == 20
    assert [part.k.shape[0] for part in parts] == [part.longest_key for part in parts]
    run = gradients.Streamed(p, size, way)
    wanted = gradients.reference(p)
    found = [t.clone() for t in run.whole(run())]
    assert all(close(found, wanted))
    again = run.whole(run())
    assert all(close(again, [wanted[0], 2 * wanted[1], 2 * wanted[2]]))


def test_torch_is_told_to_repeat_and_then_left_as_it_was():
    seen = []

    def run():
        fill = torch.utils.deterministic.fill_uninitialized_memory
        seen.append((torch.are_deterministic_algorithms_enabled(), fill))
        raise ValueError("as peers do")

    before = torch.utils.deterministic.fill_uninitialized_memory
    with pytest.raises(ValueError):
        gradients.deterministic(run)()
    assert seen == [(True, False)]
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory == before


def test_deterministic_cases_ask_for_it(monkeypatch):
    """Ours and both packages are called with deterministic=True."""
    case = CASES["attention_backward/deterministic_ragged_16384_gqa_hd128_causal"]
    seen: dict[str, dict] = {}

    def spy(name):
        def way(p, **options):
            seen[name] = options
            return ways.float32(p)

        return way

    for name in ("varstream", "flash_attn", "flash_attn_3"):
        monkeypatch.setitem(ways.WAYS, name, spy(name))
    setup = case.build(case.sizes(quick=True), CPU, 0)
    for name in ("varstream", "flash_attn", "flash_attn_3"):
        setup.runs[name]()
    assert set(seen) == {"varstream", "flash_attn", "flash_attn_3"}
    assert all(options == {"deterministic": True} for options in seen.values())


def test_the_document_mask_is_that_of_the_documents():
    p = pack((5, 40, 1, 33), causal=True)
    mask = ways._document_mask(p.lengths, p.causal, CPU)
    rows = torch.arange(mask.seq_lengths[0])
    zero = torch.zeros((), dtype=torch.int64)
    seen = mask.mask_mod(zero, zero, rows[:, None], rows[None, :])
    wanted = torch.zeros(79, 79, dtype=torch.bool)
    begin = 0
    for n in p.lengths:
        wanted[begin : begin + n, begin : begin + n] = torch.ones(n, n).tril().bool()
        begin += n
    assert torch.equal(seen[:79, :79], wanted) and not seen[:79, 79:].any()
