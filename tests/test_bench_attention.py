"""The GPU's attention cases, as far as a machine without one can tell: their lengths, operation
counts, bars, and that ours and the peers that run here agree at the small shapes."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from bench import attention_ways as ways
from bench import lengths, timers
from bench.case import Setup
from bench.cases import all_cases
from bench.runner import Options, _check, rates, run_case

CPU = torch.device("cpu")
CASES = {
    name: case
    for name, case in all_cases().items()
    if case.topic in ("attention_forward", "tile_schedule")
}
FORWARD = {name: case for name, case in CASES.items() if case.topic == "attention_forward"}


# --- lengths --------------------------------------------------------------------------------------


def test_the_corpus_has_the_shares_it_names():
    found = lengths.corpus(50_000, seed=3)
    for limit, share in ((500, 0.47), (1024, 0.71), (2048, 0.87)):
        assert sum(n < limit for n in found) / len(found) == pytest.approx(share, abs=0.01)
    assert min(found) >= 16 and max(found) < 8192
    assert found == lengths.corpus(50_000, seed=3) != lengths.corpus(50_000, seed=4)


@pytest.mark.parametrize("tokens", [4, 63, 1024, 32768])
def test_packs_are_filled_exactly(tokens):
    for seed in range(20):
        found = lengths.ragged(tokens, seed)
        assert sum(found) == tokens and min(found) > 0 and max(found) <= max(1, tokens // 4)
        found = lengths.short(tokens, seed)
        assert sum(found) == tokens and max(found) <= 128 and min(found[:-1], default=8) >= 8


def test_equal_lengths():
    assert lengths.dense(12, 4) == (4, 4, 4)
    with pytest.raises(ValueError, match="tokens must be a multiple of seqlen 5, got 12"):
        lengths.dense(12, 5)


@pytest.mark.parametrize("causal", [False, True])
def test_operations_against_a_count_of_every_visible_score(causal):
    sizes, heads, width = (1, 7, 30, 2), 3, 5
    multiplications = 0
    for n in sizes:
        for i in range(n):
            for j in range(n):
                if not causal or j <= i:
                    multiplications += heads * (width + width)  # q k and p v
    pairs = lengths.visible_pairs(sizes, causal)
    assert lengths.flops(lengths.FORWARD_PRODUCTS, pairs, heads, width) == 2 * multiplications


# --- the cases ------------------------------------------------------------------------------------


def test_the_cases_are_those_promised():
    dense = [case for name, case in FORWARD.items() if "/dense_" in name]
    assert {(c.shape["seqlen"], c.shape["head_dim"]) for c in dense} == {
        (512 << i, dim) for i in range(6) for dim in (64, 128)
    }
    assert len(dense) == 24
    for case in dense:
        assert case.shape["tokens"] == 16384
        assert case.shape["heads"] * case.shape["head_dim"] == 2048
    ragged = [case for name, case in FORWARD.items() if "/ragged_" in name]
    assert {c.shape["tokens"] >> 10 for c in ragged} == {1, 2, 4, 8, 16, 32}
    assert {(c.shape["heads"], c.shape["kv_heads"]) for c in ragged} == {
        (64, 8),
        (32, 32),
        (16, 16),
    }


@pytest.mark.parametrize("name", CASES)
def test_a_case_is_sound(name):
    """At the real shape nothing is allocated: lengths and names only."""
    case = CASES[name]
    found = case.build.args[0].lengths_of(case.shape)
    assert sum(found) == case.shape["tokens"] and min(found) > 0
    assert case.shape["heads"] % case.shape["kv_heads"] == 0
    assert case.devices == ("cuda",) and case.dtype == "bfloat16"
    assert set(case.sizes(quick=True)) == set(case.shape)
    wanted = {"flash_attn", "torch_varlen" if "seqlen" not in case.shape else "sdpa_flash"}
    if name in FORWARD:
        assert {bar.run for bar in case.bars} == wanted
        assert all(bar.limit == pytest.approx(1 / 0.9) for bar in case.bars)
        assert {peer.name for peer in case.peers} <= {*ways.WAYS, "gemm_rate"}


def test_seeds_change_numbers_and_never_lengths():
    case = FORWARD["attention_forward/ragged_16384_gqa_hd128_causal"]
    (packing,) = case.build.args
    one, two = (packing.draw(case.sizes(True), CPU, seed) for seed in (0, 1))
    assert one.lengths == two.lengths and not torch.equal(one.q, two.q)


@pytest.mark.parametrize("name", CASES)
def test_ours_and_the_peers_that_run_here_agree(name):
    case = CASES[name]
    setup: Setup = case.build(case.sizes(quick=True), CPU, 0)
    assert {peer.name for peer in case.peers} | {"varstream", "float32"} <= set(setup.runs)
    peers = {peer.name for peer in case.peers}
    here = ["varstream", *(peers & {"sdpa_flash", "padded_sdpa"})]
    unavailable: dict[str, str] = {}
    checked = _check(case, setup, here, unavailable, CPU, lambda phase: None)
    assert not unavailable and set(checked.errors) == set(here)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_the_reference_tells_masks_and_groups_apart(causal, kv_heads):
    """Every way that runs here, and that another mask or other keys would be seen."""
    p = ways.draw((5, 40, 1, 33), causal, 4, kv_heads, 16, torch.bfloat16, CPU, 0)
    wanted = ways.float32(p)
    assert torch.allclose(ways.ours(p).float(), wanted, atol=3e-2)
    (padded,) = p.unpad(ways.padded_sdpa(None, p))
    assert torch.allclose(padded.float(), wanted, atol=3e-2)
    if not causal and kv_heads == 4:
        assert torch.allclose(ways.nested_sdpa(p).float(), wanted, atol=3e-2)
    other = replace(p, causal=not causal)
    assert not torch.allclose(ways.float32(other), wanted, atol=0.3)
    other = replace(p, k=p.k.roll(1, 0))
    assert not torch.allclose(ways.float32(other), wanted, atol=0.3)


def test_rates_become_figures():
    case = FORWARD["attention_forward/short_12_heads"]
    entry = run_case(case, Options(CPU, rounds=2, quick=True))
    assert entry["status"] == "ok", entry["failure"]
    assert {"sequences", "fill", "tflops", "tflops/gemm_rate"} == set(entry["figures"])
    found = rates(3e12, {"varstream": [1.0, 3.0, 2.0], "other": [0.5]})
    assert found == {"tflops": 1.5, "tflops/other": 6.0}


# --- timing on CUDA -------------------------------------------------------------------------------


def test_the_host_gets_a_head_start(monkeypatch):
    """The device is kept busy first: nothing timed waits for the host's launches."""
    happened: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            happened.append("event")

        def synchronize(self) -> None:
            happened.append("wait")

        def elapsed_time(self, end: Event) -> float:
            return 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: happened.append("sleep"))
    assert timers.cuda_events(lambda: happened.append("call")) == 2e-3
    assert happened == ["sleep", "event", "call", "event", "wait"]


def test_seconds_of_a_kernel_by_its_name():
    def kernel(key, microseconds):
        return SimpleNamespace(key=key, self_device_time_total=microseconds)

    seen = [kernel("void entry<a::TileSchedule>()", 30.0), kernel("entry<a::Forward<x>>", 500.0)]
    assert timers.mean_seconds(seen, "a::TileSchedule", 10) == pytest.approx(3e-6)
    assert timers.mean_seconds(seen, "absent", 10) is None
