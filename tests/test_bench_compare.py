"""Comparing two result documents: every verdict, and what must hold of any pair."""

from __future__ import annotations

import copy
import re

import pytest
from bench.compare import REGRESSIONS, compare, regressed
from bench_documents import document, entry, failed
from hypothesis import given
from hypothesis import strategies as st


def kinds(base, new, tolerance=0.05):
    return {(v.case, v.metric): v.kind for v in compare(base, new, tolerance)}


def one(old, now, metric, tolerance=0.05):
    base, new = document(head__main=old), document(head__main=now)
    return kinds(base, new, tolerance)["head/main", metric]


def test_nothing_changed():
    made = document(head__main=entry(), head__softcap=failed())
    verdicts = compare(made, made)
    assert {v.kind for v in verdicts} == {"same"}
    assert {v.metric for v in verdicts} == {
        "time/dense",
        "time/floor",
        "peak_bytes",
        "memory_over_logits",
        "-",
    }
    assert not regressed(verdicts)


@pytest.mark.parametrize(
    "old, now, tolerance, kind",
    [
        (1.0, 1.04, 0.05, "same"),
        (1.0, 1.06, 0.05, "slower"),
        (1.0, 1.06, 0.10, "same"),
        (1.06, 1.0, 0.05, "faster"),
        (1.04, 1.0, 0.05, "same"),
        (1.0, 1.0, 0.0, "same"),
    ],
)
def test_time_ratios_have_a_tolerance(old, now, tolerance, kind):
    assert one(entry(old), entry(now), "time/dense", tolerance) == kind


def test_memory_is_compared_to_the_byte():
    assert one(entry(peak=1000), entry(peak=1001), "peak_bytes") == "larger"
    assert one(entry(peak=1000), entry(peak=999), "peak_bytes") == "smaller"
    assert one(entry(peak=None), entry(peak=999), "peak_bytes") == "new"
    assert one(entry(peak=1000), entry(peak=None), "peak_bytes") == "missing"


def test_figures_with_a_bar_are_compared_and_others_are_not():
    assert one(entry(figure=0.1), entry(figure=0.1000001), "memory_over_logits") == "larger"
    assert ("head/main", "fill") not in kinds(
        document(head__main=entry()), document(head__main=entry())
    )


def test_absolute_seconds_do_not_count():
    slow = entry()
    for run in slow["runs"].values():
        run["seconds"] = {name: 9 * value for name, value in run["seconds"].items()}
    assert set(kinds(document(head__main=entry()), document(head__main=slow)).values()) == {"same"}


def test_cases_and_peers_come_and_go():
    without = entry()
    del without["runs"]["dense"]
    assert one(entry(), without, "time/dense") == "missing"
    assert one(without, entry(), "time/dense") == "new"
    found = compare(document(head__main=entry()), document(head__short=entry()))
    assert [(v.case, v.kind) for v in found] == [("head/main", "missing"), ("head/short", "new")]
    assert not regressed(found)


def test_failures():
    assert one(entry(), failed(), "-") == "failed"
    assert one(failed(), failed(), "-") == "same"
    assert one(failed(), entry(), "-") == "new"
    assert regressed(compare(document(head__main=entry()), document(head__main=failed())))


@pytest.mark.parametrize(
    "change, why",
    [
        ({"shape": {"rows": 4}}, "shape"),
        ({"quick": True}, "quick"),
        ({"dtype": "bfloat16"}, "dtype: float32 and bfloat16"),
        ("torch", "torch: 2.13.0 and 2.14.0"),
        ("threads", "threads: 2 and 1"),
        ("device", r"A CPU \(2 cores\) and A CPU \(4 cores\)"),
    ],
)
def test_what_cannot_be_compared(change, why):
    other = copy.deepcopy(entry(ratio=5.0, peak=10**6))
    if isinstance(change, dict):
        other |= change
    else:
        new = {"torch": "2.14.0", "threads": 1, "device": {**entry()["environment"]["device"]}}
        new["device"]["cores"] = 4
        other["environment"][change] = new[change]
    (verdict,) = compare(document(head__main=entry()), document(head__main=other))
    assert verdict.kind == "incomparable"

    assert re.search(why, verdict.why)
    assert not verdict.regression


positive = st.floats(1e-3, 1e3)
entries = st.builds(
    entry,
    ratio=positive,
    peak=st.one_of(st.none(), st.integers(0, 10**12)),
    figure=st.floats(0, 10),
) | st.just(failed())
documents = st.dictionaries(
    st.sampled_from(["head__main", "head__bias", "stream__long"]), entries
).map(lambda cases: document(**cases))
MIRROR = {
    "faster": "slower",
    "slower": "faster",
    "smaller": "larger",
    "larger": "smaller",
    "same": "same",
    "new": "missing",
    "missing": "new",
    "incomparable": "incomparable",
}


@given(documents, documents, st.floats(0, 1))
def test_the_other_way_round_every_verdict_is_mirrored(base, new, tolerance):
    there, back = kinds(base, new, tolerance), kinds(new, base, tolerance)
    for (case, metric), kind in there.items():
        if "failed" in (kind, back.get((case, metric))) or metric == "-":
            continue
        assert back[case, metric] == MIRROR[kind]


@given(documents, st.floats(0, 1))
def test_a_document_against_itself_is_the_same(made, tolerance):
    assert {v.kind for v in compare(made, made, tolerance)} <= {"same"}


@given(documents, documents, st.floats(0, 0.5), st.floats(0, 0.5))
def test_a_wider_tolerance_never_finds_more_regressions(base, new, a, b):
    def worse(tolerance):
        return {(v.case, v.metric) for v in compare(base, new, tolerance) if v.regression}

    assert worse(max(a, b)) <= worse(min(a, b))


@given(documents, documents)
def test_comparing_changes_nothing_and_names_every_case(base, new):
    before = copy.deepcopy((base, new))
    verdicts = compare(base, new)
    assert (base, new) == before
    assert {v.case for v in verdicts} == base["cases"].keys() | new["cases"].keys()
    assert regressed(verdicts) == any(v.kind in REGRESSIONS for v in verdicts)
