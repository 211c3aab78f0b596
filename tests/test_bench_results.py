"""Result documents: the schema, what is committed, merging and storing."""

from __future__ import annotations

import json

import pytest
from bench import results
from bench.results import BenchError
from bench_documents import DEVICE, document, entry, failed


def test_a_good_document_keeps_to_the_schema():
    made = document(head__main=entry(), head__softcap=failed())
    assert results.validate(made, "here") is made


@pytest.mark.parametrize("path", results.committed(), ids=lambda p: p.name)
def test_committed_results_keep_to_the_schema(path):
    assert results.load(path)["cases"]


def test_something_is_committed():
    assert results.committed()


def _set(path, value):
    def change(made):
        *steps, last = path
        for step in steps:
            made = made[step]
        made[last] = value

    return change


CASE = ("cases", "head/main")
BROKEN = {
    "version": (_set(["schema"], 2), r"\$\.schema: 1 was expected"),
    "unknown key": (_set([*CASE, "speed"], 1), "'speed' was unexpected"),
    "name": (_set(["cases", "Main"], entry()), "'Main' does not match"),
    "status": (_set([*CASE, "status"], "fine"), "'fine' is not one of"),
    "ours is missing": (_set([*CASE, "runs"], {}), "'varstream' is a required property"),
    "failed, yet timed": (
        lambda made: made["cases"]["head/main"].update(status="failed", failure="why"),
        "runs: breaks the rule maxProperties: 0",
    ),
    "failed without a reason": (_set([*CASE, "status"], "failed"), "None is not of type 'string'"),
    "no time": (
        _set([*CASE, "runs", "varstream", "seconds", "median"], 0.0),
        "0.0 is less than or equal to the minimum of 0",
    ),
    "role": (_set([*CASE, "runs", "dense", "role"], "enemy"), "'enemy' is not one of"),
    "ratio": (
        _set([*CASE, "runs", "dense", "ratio", "median"], "fast"),
        r"ratio\.median: 'fast' is not of type 'number'",
    ),
    "commit": (_set([*CASE, "environment", "commit"], "abc"), "'abc' does not match"),
    "half a byte": (
        _set([*CASE, "runs", "varstream", "peak_bytes"], 0.5),
        "0.5 is not of type 'integer'",
    ),
    "another device": (
        _set([*CASE, "environment", "device"], {**DEVICE, "cores": 3}),
        "head/main was measured on another device than the file names",
    ),
}


@pytest.mark.parametrize("change, message", BROKEN.values(), ids=BROKEN)
def test_a_broken_document_is_refused(change, message):
    made = document(head__main=entry())
    change(made)
    with pytest.raises(BenchError, match=message) as refused:
        results.validate(made, "there.json")
    assert str(refused.value).startswith("there.json: ")
    assert "\n" not in str(refused.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(BenchError, match=r"missing\.json: No such file"):
        results.load(tmp_path / "missing.json")
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(BenchError, match="not JSON: Expecting property name"):
        results.load(broken)
    broken.write_bytes(b"\xff\xfe")
    with pytest.raises(BenchError, match="not JSON: not UTF-8 text"):
        results.load(broken)
    broken.write_text('{"schema": NaN}')
    with pytest.raises(BenchError, match="NaN is no JSON number"):
        results.load(broken)


def test_storing_replaces_only_its_own_cases(tmp_path):
    path = tmp_path / "results" / "a.json"
    results.store(path, document(head__main=entry(0.5), attention__main=entry(0.7)))
    results.store(path, document(head__main=entry(0.9)))
    stored = results.load(path)
    assert list(stored["cases"]) == ["attention/main", "head/main"]
    assert stored["cases"]["head/main"] == entry(0.9)
    assert stored["cases"]["attention/main"] == entry(0.7)
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_devices_are_not_mixed(tmp_path):
    path = tmp_path / "a.json"
    results.store(path, document(head__main=entry()))
    before = path.read_bytes()
    other = document(head__main=entry())
    other["device"]["cores"] = 64
    other["cases"]["head/main"]["environment"]["device"]["cores"] = 64
    with pytest.raises(BenchError, match=r"A CPU \(2 cores\) can't be mixed with .*\(64 cores\)"):
        results.store(path, other)
    assert path.read_bytes() == before


def test_a_bad_document_is_not_stored(tmp_path):
    path = tmp_path / "a.json"
    made = document(head__main=entry())
    made["cases"]["head/main"]["runs"]["dense"]["seconds"]["min"] = float("nan")
    made["cases"]["head/main"]["rounds"] = -1
    with pytest.raises(BenchError, match="new results"):
        results.store(path, made)
    assert not path.exists()


def test_stored_json_is_plain(tmp_path):
    path = tmp_path / "a.json"
    results.store(path, document(head__main=entry()))
    assert json.loads(path.read_text()) == document(head__main=entry())
