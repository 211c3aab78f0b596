"""Running one case: nothing is timed before it is right, peers that can't are named, rounds are
paired, bars are judged."""

from __future__ import annotations

import math
import re
from collections import Counter

import pytest
import torch
from bench import floors, results, timers
from bench.case import Bar, Case, Peer, Setup, floor
from bench.cases import all_cases, matching
from bench.environment import device_record, file_name
from bench.results import BenchError
from bench.runner import Options, _check, metric, run_case
from bench_documents import entry

CPU = torch.device("cpu")


class Calls:
    """Counts the calls of a case's runs."""

    def __init__(self, **values) -> None:
        self.values, self.counts, self.order = values, Counter(), []

    def run(self, name):
        def call():
            self.counts[name] += 1
            self.order.append(name)
            value = self.values[name]
            if isinstance(value, Exception):
                raise value
            return torch.full((1000,), float(value))

        return call


def case(calls: Calls, **changes) -> Case:
    def build(shape, device, seed):
        return Setup(
            runs={name: calls.run(name) for name in calls.values},
            scales={"floor": 10.0} if "floor" in calls.values else {},
            figures=lambda peaks, ours: {"fill": 0.5},
        )

    given = {
        "peers": tuple(
            floor(n) if n == "floor" else Peer(n)
            for n in calls.values
            if n not in ("varstream", "exact")
        ),
        "reference": "exact",
    }
    return Case("topic/variant", "op", {"rows": 9}, build, {"rows": 2}, **(given | changes))


def measured(one: Case, **options):
    entry = run_case(one, Options(CPU, **options))
    results.validate(results.document_of(device_record(CPU), {one.name: entry}), "entry")
    return entry


def test_an_entry_holds_what_was_measured():
    calls = Calls(varstream=1, dense=1, floor=7, exact=1)
    found = measured(case(calls), rounds=4)
    assert found["status"] == "ok" and found["failure"] is None
    assert found["rounds"] == 4 and found["shape"] == {"rows": 9}
    assert list(found["runs"]) == ["varstream", "dense", "floor"]
    ours, dense, below = (found["runs"][n] for n in ("varstream", "dense", "floor"))
    assert (ours["role"], dense["role"], below["role"]) == ("ours", "peer", "floor")
    assert (ours["error"], dense["error"], below["error"]) == (0.0, 0.0, None)
    assert ours["peak_bytes"] == dense["peak_bytes"] == 4000 and below["peak_bytes"] is None
    assert ours["ratio"] is None and dense["ratio"]["median"] > 0
    assert below["scale"] == 10.0
    assert found["figures"] == {"fill": 0.5}
    # check, memory, rounds; a floor is warmed up instead
    assert calls.counts == {"varstream": 6, "dense": 6, "floor": 5, "exact": 1}


def test_a_floor_counts_by_its_scale():
    calls = Calls(varstream=1, floor=1, exact=1)
    found = measured(case(calls), rounds=9)["runs"]["floor"]
    assert found["ratio"]["median"] < 0.5  # the same work as ours, scaled by 10


@pytest.mark.parametrize(
    "value, why",
    [
        (2, r"relative error 1.0e\+00 against exact exceeds 1e-05"),
        (math.nan, "relative error inf against exact exceeds 1e-05"),
        (ValueError("rows must be even\nsecond line"), "ValueError: rows must be even$"),
    ],
)
def test_nothing_is_timed_when_ours_is_wrong(value, why):
    calls = Calls(varstream=value, dense=1, floor=1, exact=1)
    bars = (Bar("time/dense", 1.0),)
    found = measured(case(calls, bars=bars), rounds=3)
    assert found["status"] == "failed" and found["runs"] == {} and found["rounds"] == 0
    assert re.search(why, found["failure"])
    assert found["bars"] == {"time/dense": {"limit": 1.0, "reached": None, "holds": False}}
    assert calls.counts["varstream"] == 1 and calls.counts["floor"] == 0


def test_peers_that_cannot_are_named_and_not_timed():
    calls = Calls(varstream=1, wrong=3, broken=RuntimeError("no backend"), absent=1, exact=1)
    peers = (Peer("wrong"), Peer("broken"), Peer("absent", lambda device: f"not on {device}"))
    found = measured(case(calls, peers=peers), rounds=2)
    assert found["status"] == "ok" and list(found["runs"]) == ["varstream"]
    assert found["unavailable"] == {
        "absent": "not on cpu",
        "broken": "RuntimeError: no backend",
        "wrong": "relative error 2.0e+00 against exact exceeds 1e-05",
    }
    assert calls.counts["absent"] == 0 and calls.counts["wrong"] == 1


def test_a_peer_can_be_the_reference():
    calls = Calls(varstream=1, dense=1)
    found = measured(case(calls, reference="dense"), rounds=2)
    assert found["runs"]["dense"]["error"] == 0.0
    assert calls.counts["dense"] == 4


def test_a_slow_case_is_checked_in_the_run_that_measures_memory():
    calls = Calls(varstream=1, dense=1)
    found = measured(case(calls, reference="dense", slow=True))
    assert found["rounds"] == 2 and found["runs"]["varstream"]["peak_bytes"] == 4000
    assert calls.counts == {"varstream": 3, "dense": 3}


def test_barred_times_only_what_bars_compare():
    calls = Calls(varstream=1, dense=1, loop=1, floor=1, exact=1)
    bars = (Bar("time/loop", 1e9), Bar("fill", 0.4), Bar("seconds", 1e9), Bar("memory/loop", 1))
    found = measured(case(calls, bars=bars), rounds=2, barred=True)
    assert list(found["runs"]) == ["varstream", "loop"]
    assert set(found["unavailable"].values()) == {"left out: no bar compares with it"}
    assert {name: bar["holds"] for name, bar in found["bars"].items()} == {
        "time/loop": True,
        "fill": False,
        "seconds": True,
        "memory/loop": True,
    }


def test_quick_takes_the_small_shape_and_judges_nothing():
    calls = Calls(varstream=1, dense=1, exact=1)
    found = measured(case(calls, bars=(Bar("time/dense", 1.0),)), quick=True)
    assert found["quick"] and found["shape"] == {"rows": 2} and found["rounds"] == 2
    assert found["bars"] == {}


def test_metrics_of_an_entry():
    made = entry(ratio=0.5, peak=1000, figure=0.1)
    assert metric(made, "time/dense") == 0.5
    assert metric(made, "memory/dense") == 0.5
    assert metric(made, "seconds") == 0.5
    assert metric(made, "memory_over_logits") == 0.1
    assert metric(made, "time/absent") is None
    assert metric(made, "memory/floor") is None
    assert metric(made, "absent") is None


# --- timing ---------------------------------------------------------------------------------------


def test_every_run_takes_part_in_every_round_and_the_order_turns():
    calls = Calls(a=1, b=1, c=1)
    runs = {name: [calls.run(name)] for name in "abc"}
    seconds = timers.paired(runs, timers.wall, rounds=6)
    assert {name: len(values) for name, values in seconds.items()} == {"a": 6, "b": 6, "c": 6}
    rounds = [calls.order[i : i + 3] for i in range(0, 18, 3)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert (
        Counter(r[0] for r in rounds) == Counter(r[-1] for r in rounds) == dict.fromkeys("abc", 2)
    )


def test_operands_rotate():
    calls = Calls(first=1, second=1)
    timers.paired({"a": [calls.run("first"), calls.run("second")]}, timers.wall, rounds=4)
    assert calls.order == ["first", "second"] * 2


def test_rounds_fit_the_budget():
    def count(**limits):
        return len(timers.paired({"a": [lambda: None]}, lambda call: 1.0, **limits)["a"])

    assert count(budget=-1.0) == 3
    assert count(budget=-1.0, least=5) == 5
    assert count(budget=1e9) == 15
    assert count(budget=1e9, rounds=2) == 2


def test_summary_and_ratio():
    found = timers.summary([5.0, 1.0, 2.0, 4.0, 3.0])
    assert found == {"median": 3.0, "quartile_1": 2.0, "quartile_3": 4.0, "min": 1.0}
    assert set(timers.summary([2.0]).values()) == {2.0}
    seconds = {"a": [1.0, 8.0, 3.0], "b": [2.0, 4.0, 3.0]}
    assert timers.ratio(seconds, "a", "b")["median"] == 1.0


def test_one_copy_on_the_cpu_and_cold_ones_on_cuda():
    cuda = torch.device("cuda")
    assert timers.rotations(1, CPU) == 1
    assert timers.rotations(timers.COLD_BYTES // 3, cuda) == 4
    assert timers.rotations(1, cuda) == timers.MOST_ROTATIONS
    assert timers.rotations(10 * timers.COLD_BYTES, cuda) == 1


def test_floors_do_the_work_they_name():
    x, weight = torch.randn(3, 2), torch.randn(5, 2)
    seen = []
    real = torch.mm

    def mm(a, b, out):
        seen.append((*a.shape, b.shape[1]))
        return real(a, b, out=out)

    torch.mm = mm
    try:
        floors.head_products(x, weight, "zzxw")()
        product, scale = floors.gemm_rate(1e10, torch.float32, CPU)
        product()
    finally:
        torch.mm = real
    logits, dinput, dweight, square = (3, 2, 5), (3, 5, 2), (5, 3, 2), (1024, 1024, 1024)
    assert seen == [logits, logits, dinput, dweight, square]
    assert scale == pytest.approx(1e10 / (2 * 1024**3))


def test_file_names():
    assert file_name({"kind": "cpu", "name": "AMD EPYC", "cores": 2}) == "amd_epyc_2_cores.json"
    assert file_name({"kind": "cuda", "name": "NVIDIA H100", "cores": 132}) == "nvidia_h100.json"


# --- the declared cases ---------------------------------------------------------------------------


def test_patterns():
    names = [case.name for case in matching(["head/main", "mer*"])]
    assert names == ["merge/two_parts", "merge/eight_parts", "head/main"]
    assert {case.topic for case in matching(["head"])} == {"head"}
    assert len(matching([])) == len(all_cases())
    with pytest.raises(BenchError, match="no case matches 'heads'"):
        matching(["head", "heads"])


def test_every_bar_compares_with_a_declared_run():
    for one in all_cases().values():
        declared = {peer.name for peer in one.peers}
        for bar in one.bars:
            assert bar.run is None or bar.run in declared, (one.name, bar)


def test_the_barred_cases_are_those_promised():
    barred = {
        name: {b.metric: b.limit for b in c.bars} for name, c in all_cases().items() if c.bars
    }
    head = {"time/gemm_floor": 1.08, "memory_over_logits": 0.15}
    attention = {"time/padded_sdpa": 0.5, "time/loop_sdpa": 1.10}
    assert barred.pop("attention/main") == barred.pop("attention/main_causal") == attention
    # test_bench_streaming.py has these.
    streaming = [name for name in barred if name.startswith("stream/")]
    assert len([barred.pop(name) for name in streaming]) == 3 * 2 * 2
    assert barred.pop("batching/sft_best_fit_decreasing") == {
        "seconds": 0.15,
        "over_lower_bound": 0.0005,
    }
    assert barred.pop("embedding/forward_64") == {
        "time/padded": 0.2,
        "time/sorted": pytest.approx(2 / 3),
        "time/onnx_padded": 1.0,
    }
    assert barred.pop("embedding/step_64") == {"time/padded": 0.25}
    for name in ("embedding/full_forward", "embedding/full_step"):
        assert barred.pop(name) == {"time/padded": 1.05}
    on_gpu = [name for name in barred if name.startswith("attention_")]
    # test_bench_attention.py and test_bench_gradients.py have these: 41 packs, forward and
    # backward, 12 chunks and 7 sums.
    assert len([barred.pop(name) for name in on_gpu]) == 2 * 41 + 12 + 7
    # test_bench_head.py has these.
    on_gpu = [name for name in barred if all_cases()[name].devices == ("cuda",)]
    assert len([barred.pop(name) for name in on_gpu]) == 11 + 5 + 2 + 8
    assert len(barred) >= 14  # the head, plain and with each option
    for name, bars in barred.items():
        assert (
            name.startswith("head/") and all_cases()[name].shape == all_cases()["head/main"].shape
        )
        assert bars.pop("time/torch_chunked", 1.03) == 1.03
        assert bars == head


def small(one):
    """What a case's small run is made of, which cases that differ in their full shape share."""
    build = one.build
    made = (build.func, build.args, *build.keywords.items()) if hasattr(build, "func") else build
    able = [peer.name for peer in one.peers if peer.needs("cpu") is None]
    return made, one.reference, *one.sizes(quick=True).items(), *able


RUNNABLE = list(
    {
        small(one): name
        for name, one in reversed(all_cases().items())
        if "cpu" in one.devices and one.needs("cpu") is None and one.topic != "import"
    }.values()
)


@pytest.mark.parametrize("name", RUNNABLE)
def test_every_case_is_right_at_its_small_shape(name):
    """Our result and every peer's that is declared available; FlexAttention's compiler is left
    out, it takes most of a minute."""
    one = all_cases()[name]
    setup = one.build(one.sizes(quick=True), CPU, 0)
    for why in one.availability("cpu").values():
        assert why is None or why
    names = ["varstream", *(p.name for p in one.peers if p.needs("cpu") is None)]
    assert set(names) <= set(setup.runs)

    unavailable: dict[str, str] = {}
    checked = _check(
        one, setup, [n for n in names if n != "flex_attention"], unavailable, CPU, lambda s: None
    )
    assert not unavailable
    assert checked.errors["varstream"] <= one.tolerance
    for peer in one.peers:
        if peer.role == "floor":
            setup.runs[peer.name]()
