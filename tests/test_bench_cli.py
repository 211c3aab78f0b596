"""``python -m bench``: what it prints, its exit codes, and one line for every mistake."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench import cases, results
from bench.__main__ import main
from bench_documents import document, entry, failed

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def stored(tmp_path):
    """Writes a document and returns its path."""

    def write(name, **made):
        path = tmp_path / name
        path.write_text(json.dumps(document(**made)))
        return str(path)

    return write


def test_the_module_runs():
    command = [sys.executable, "-m", "bench", "list", "merge"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "merge/two_parts: merge_attention, float32, cpu/cuda" in done.stdout
    assert "rows=8192 heads=8 head_dim=64 parts=2" in done.stdout


def test_list_names_peers_reasons_and_bars(capsys):
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    for name in cases.all_cases():
        assert f"\n{name}: " in f"\n{printed}"
    assert "flash_attn: unavailable, runs on CUDA only" in printed
    assert "bar: time/gemm_floor <= 1.08\n" in printed
    assert re.search(r"bar: seconds <= 0\.\d+ on H100 80GB HBM3\n", printed)


def test_list_as_json(capsys):
    assert main(["list", "head/softcap", "--json", "--device", "cpu"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["op"] == "linear_cross_entropy"
    assert row["shape"] == {"rows": 4096, "width": 512, "classes": 32000}
    assert row["peers"]["torch_chunked"] == "torch's chunked path has no such option"
    assert row["peers"]["dense"] is None
    assert row["bars"]["time/gemm_floor"] == 1.08


def test_list_names_only(capsys):
    assert main(["list", "--names"]) == 0
    assert capsys.readouterr().out.split("\n")[:-1] == list(cases.all_cases())


def test_run_stores_case_by_case(tmp_path, capsys):
    path = tmp_path / "out.json"
    assert main(["run", "merge/two_parts", "--quick", "--out", str(path)]) == 0
    assert main(["run", "merge/eight_parts", "--quick", "--rounds", "1", "--out", str(path)]) == 0
    made = results.load(path)
    assert {n: e["rounds"] for n, e in made["cases"].items()} == {
        "merge/two_parts": 2,
        "merge/eight_parts": 1,
    }
    printed = capsys.readouterr().out
    assert "merge/two_parts: 2 rounds" in printed and "ours over it" in printed
    assert printed.count(f"written: {path}") == 2


def test_a_quick_run_stores_nothing_unless_told_where(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    assert main(["run", "merge", "--quick", "--rounds", "1"]) == 0
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out.count("only test the runner: their ratios mean nothing") == 1


def test_a_failed_check_is_stored_and_the_exit_code_is_1(tmp_path, monkeypatch, capsys):
    good = cases.all_cases()["merge/two_parts"]
    bad = replace(good, tolerance=-1.0)
    monkeypatch.setattr(cases, "all_cases", lambda: {good.name: bad})
    path = tmp_path / "out.json"
    assert main(["run", "--quick", "--out", str(path)]) == 1
    assert "merge/two_parts: FAILED, not timed: relative error" in capsys.readouterr().out
    assert results.load(path)["cases"]["merge/two_parts"]["status"] == "failed"


def test_a_case_that_cannot_run_here_is_left_out_by_name(tmp_path, monkeypatch, capsys):
    good = cases.all_cases()["merge/two_parts"]
    absent = replace(good, needs=lambda device: "needs a model")
    monkeypatch.setattr(cases, "all_cases", lambda: {good.name: absent})
    assert main(["run", "--quick"]) == 0
    assert "merge/two_parts: left out, needs a model" in capsys.readouterr().out


def test_compare_exit_codes(stored, capsys):
    base, same = stored("base.json", head__main=entry(0.5)), stored("s.json", head__main=entry(0.5))
    slow = stored("slow.json", head__main=entry(0.54))
    assert main(["compare", base, same]) == 0
    assert capsys.readouterr().out == (
        "4 verdicts: 0 faster, 0 slower, 0 smaller, 0 larger, 4 same, 0 new, 0 missing, "
        "0 failed, 0 incomparable\n"
    )
    assert main(["compare", base, same, "--all"]) == 0
    assert "head/main time/dense: same 0.5 -> 0.5 (+0.0%)" in capsys.readouterr().out
    assert main(["compare", base, slow]) == 1
    assert "head/main time/dense: slower 0.5 -> 0.54 (+8.0%)" in capsys.readouterr().out
    assert main(["compare", base, slow, "--tolerance", "0.1"]) == 0


@pytest.mark.parametrize(
    "new, count",
    [
        ({"head__other": entry()}, "1 new, 1 missing"),
        ({"head__main": entry(dtype="bfloat16")}, "1 incomparable"),
        ({}, "1 missing"),
    ],
)
def test_nothing_to_compare_is_no_success(stored, new, count, capsys):
    base, other = stored("base.json", head__main=entry()), stored("other.json", **new)
    assert main(["compare", base, other]) == 2
    printed = capsys.readouterr()
    assert count in printed.out
    (line,) = printed.err.splitlines()
    assert "nothing was compared" in line and "same device" in line


def test_a_failed_case_is_compared(stored):
    base, bad = stored("base.json", head__main=entry()), stored("bad.json", head__main=failed())
    assert main(["compare", base, bad]) == 1
    assert main(["compare", bad, base]) == 2  # there was nothing to hold it to


def test_report_to_stdout_and_to_files(stored, tmp_path, capsys):
    path = stored("base.json", head__main=entry())
    assert main(["report", path]) == 0
    assert "| `head/main` | fill | 0.5 |" in capsys.readouterr().out
    page, pictures = tmp_path / "docs" / "page.md", tmp_path / "docs" / "pictures"
    assert main(["report", path, "--page", str(page), "--out", str(pictures)]) == 0
    assert "](pictures/bench_time_a_cpu_2.svg)" in page.read_text()
    assert (pictures / "bench_time_a_cpu_2.svg").read_bytes().startswith(b"<?xml")


@pytest.mark.parametrize(
    "args, message",
    [
        (["run", "nothing"], "no case matches 'nothing'; `bench list` shows them"),
        (["list", "head", "nothing"], "no case matches 'nothing'"),
        (["run", "--device", "tpu"], "--device must be cpu or cuda, got 'tpu'"),
        (["list", "--device", "tpu"], "--device must be cpu or cuda, got 'tpu'"),
        (["run", "pack_rows"], "none of pack_rows runs on cpu"),
        (["run", "merge", "--barred"], "none of merge runs on cpu and has a bar"),
        (["run", "merge", "--rounds", "0"], "invalid value for '--rounds'"),
        (["run", "--fast"], "no such option: --fast"),
        (["measure"], "no such command 'measure'"),
        (
            ["compare", "missing.json", "missing.json"],
            "missing.json: No such file or directory; "
            "give bench/results/<device>.json, written by python -m bench run",
        ),
        (["list", "--names", "--json"], "--names and --json exclude each other; give one"),
        (["compare", "BROKEN", "BROKEN"], "not JSON: Expecting"),
        (["compare", "OTHER", "OTHER"], "$: 'schema' is a required property; give bench/results/"),
        (["compare", "OTHER"], "missing argument 'NEW'"),
        (["report", "missing.json"], "missing.json: No such file or directory"),
        (["report", "BROKEN"], "not JSON"),
        (["run", "merge", "--out", "BROKEN"], "not JSON"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_every_mistake_is_one_line_and_exit_code_2(args, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "BROKEN").write_text("{nonsense")
    (tmp_path / "OTHER").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert main(args) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert len(printed.err.strip().splitlines()) == 1 and not printed.out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device(capsys):
    assert main(["run", "pack_rows", "--device", "cuda"]) == 2
    assert capsys.readouterr().err == "bench: --device cuda: no CUDA device here\n"


def test_a_folder_that_cannot_be_written(stored, tmp_path, capsys):
    path = stored("base.json", head__main=entry())
    assert main(["report", path, "--page", str(Path(path) / "page.md")]) == 2
    assert "page.md" in capsys.readouterr().err


def test_the_readme_names_every_command_and_floor():
    readme = (ROOT / "bench" / "README.md").read_text()
    for command in ("list", "run", "compare", "report"):
        assert f"python -m bench {command}" in readme
    floors = {p.name for c in cases.all_cases().values() for p in c.peers if p.role == "floor"}
    assert not [name for name in floors if f"| `{name}` |" not in readme]
