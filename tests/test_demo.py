"""The demo in small: its results, what an interruption leaves, and how bad input is reported."""

import io
import json
import re
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
pytest.importorskip("matplotlib")

from rich.console import Console
from typer.testing import CliRunner

from varstream.cli import app
from varstream.demo import measure, run
from varstream.demo.corpus import Corpus, load_corpus
from varstream.demo.methods import METHODS, packed_batch, predicted
from varstream.demo.progress import Report
from varstream.demo.search import Search, largest_under
from varstream.demo.settings import MIB, DemoError, Settings
from varstream.demo.store import Store

FILES = {
    "training.json",
    "loss.png",
    "first_run.json",
    "speed.json",
    "memory.json",
    "memory.png",
    "comparison.json",
    "comparison.md",
}
FLOAT32_KEYS = [method.key for method in METHODS]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Text files of very different lengths, some in a subfolder, and two that can't be read."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "more").mkdir()
    for i in range(12):
        words = " ".join(f"word{j % 17} is {j * i % 23}" for j in range(2 + i * i))
        (folder / ("more" if i % 2 else "") / f"{i}.txt").write_text(words)
    (folder / "binary.bin").write_bytes(b"\0\1\2\3" * 100)
    (folder / "latin1.txt").write_bytes("caf\xe9 ".encode("latin-1") * 50)
    return folder


def start(*args):
    return CliRunner().invoke(app, ["demo", *map(str, args)])


def test_quick_run(texts, tmp_path):
    result = start("--quick", "--steps", 4, "--data", texts, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert {path.name for path in tmp_path.iterdir()} == FILES  # nothing temporary is left
    assert "too small to show the memory gain" in result.output.splitlines()[-1]
    for name in ("loss.png", "memory.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")

    comparison = json.loads((tmp_path / "comparison.json").read_text())
    assert [c.split(" (")[0].split(" under")[0] for c in comparison["columns"]] == [
        "method",
        "tokens/s",
        "peak memory of the backward",
        "largest document",
        "worst gradient difference",
    ]
    assert list(comparison["methods"]) == FLOAT32_KEYS
    for values in comparison["methods"].values():
        assert values["worst_gradient_difference"] < 1e-4
        assert values["tokens_per_second"] > 0
        assert values["peak_bytes"] > 0
        assert values["largest_document"] % Settings.length_step == 0
    assert comparison["varstream_float64_gradient_difference"] < 1e-10
    padded, *_, streamed = comparison["methods"].values()
    assert streamed["peak_bytes"] < padded["peak_bytes"]
    assert comparison["corpus"]["documents"] == 12
    assert str(texts.parent) not in (tmp_path / "comparison.json").read_text()

    markdown = (tmp_path / "comparison.md").read_text()
    assert all(f"| {method.name} |" in markdown for method in METHODS)
    training = json.loads((tmp_path / "training.json").read_text())
    assert len(training["loss"]) == 4 and training["loss"][-1] < training["loss"][0]


def test_interruption_keeps_what_is_there(texts, tmp_path, monkeypatch):
    (tmp_path / "comparison.md").write_text("an earlier run")
    (tmp_path / "loss.png").write_text("an earlier figure")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "first_runs", interrupt)
    result = start("--quick", "--steps", 1, "--data", texts, "--out", tmp_path)
    assert result.exit_code == 130
    last = result.output.strip().splitlines()[-1]
    assert last.startswith("Interrupted. Kept in") and "training.json, loss.png" in last
    assert (tmp_path / "comparison.md").read_text() == "an earlier run"
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")  # that stage was finished


def test_crash_keeps_what_is_there(texts, tmp_path, monkeypatch):
    (tmp_path / "training.json").write_text("an earlier run")

    def crash(*_):
        raise MemoryError

    monkeypatch.setattr(run, "train", crash)
    result = start("--quick", "--data", texts, "--out", tmp_path)
    assert isinstance(result.exception, MemoryError)
    assert (tmp_path / "training.json").read_text() == "an earlier run"


def test_files_are_replaced_whole(tmp_path):
    store = Store(tmp_path)
    store.text("table.md", "first")
    with pytest.raises(TypeError):
        store.json("table.md", object())

    class Broken:
        def savefig(self, path, **_):
            path.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.figure("table.md", Broken())
    assert [path.name for path in tmp_path.iterdir()] == ["table.md"]
    assert (tmp_path / "table.md").read_text() == "first"
    assert store.written == ["table.md"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "doesn't exist; give a text file or a folder of them"),
        (b"\0binary", "(1 file looked at); give --data"),
        (b" \n", "no readable UTF-8 text"),
        (b"\xff\xfe\xff", "no readable UTF-8 text"),
        (b"a", "is too little text: 1 token, 1 different; give --data at least 64 tokens, 16"),
        (b"a" * 9999, "is too little text: "),
        (b"one two " * 100, "is too little text: 201 tokens, 4 different"),
        (b" ".join(b"%d" % n for n in range(10)), "is too little text: "),
    ],
)
def test_unreadable_data(tmp_path, content, message):
    data = tmp_path / "data.txt"
    if content is not None:
        data.write_bytes(content)
    result = start("--quick", "--data", data, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stdout == ""  # not even a heading
    (line,) = result.stderr.splitlines()
    assert line.startswith("varstream demo: ") and message in line


def test_documents_too_short_to_attend(tmp_path):
    for n in range(60):
        (tmp_path / f"{n}.txt").write_text(f"word{n}")
    (tmp_path / "long.txt").write_text("not one of those compared " * 20)
    result = start("--quick", "--data", tmp_path, "--out", tmp_path / "out")
    assert result.exit_code == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert "documents are too short: the longest of those compared has 3 tokens; give" in line


def test_empty_folder(tmp_path):
    result = start("--quick", "--data", tmp_path, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "0 files looked at" in result.output


def test_out_is_a_file(texts, tmp_path):
    (tmp_path / "out").write_text("in the way")
    result = start("--quick", "--data", texts, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "can't be written to" in result.output


@pytest.mark.parametrize("option", ["--steps", "--budget"])
def test_numbers_below_one(tmp_path, option):
    result = start(option, 0, "--out", tmp_path)
    assert result.exit_code == 2
    assert option in result.output


def test_options_override_the_preset():
    from varstream.cli.demo import _settings

    assert _settings(True, {"steps": 9}) == replace(Settings().quick(), steps=9)


def test_missing_packages(tmp_path, monkeypatch):
    from varstream.cli import demo

    monkeypatch.setattr(demo, "find_spec", lambda name: None if name == "tokenizers" else object())
    result = start("--out", tmp_path)
    assert result.exit_code == 2
    assert result.output.strip().endswith("needs tokenizers: pip install tokenizers")


def test_command_line_imports_nothing_heavy():
    """``varstream --help`` must not pay for transformers or matplotlib."""
    code = (
        "import sys, varstream.cli.demo\n"
        "print([m for m in ('transformers', 'matplotlib', 'tokenizers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_one_short_document_is_enough(tmp_path):
    data = tmp_path / "short.txt"
    data.write_text(" ".join(f"word{n % 20}" for n in range(70)))
    corpus = load_corpus(Settings(data=data).quick())
    assert len(corpus.documents) == 1
    assert len(corpus.joined(1000)) == 1000
    assert len(corpus.sample(4, 1024)) == 1


def test_long_file_is_cut_between_characters(tmp_path):
    data = tmp_path / "long.txt"
    words = "".join(f"word{n % 20:02} " for n in range(71))
    assert len(words) % 2 == 1  # so a character of two bytes lies across every even place
    data.write_text(words + "é" * 10000, encoding="utf-8")
    settings = Settings(data=data).quick()
    corpus = load_corpus(settings)
    assert len(corpus.documents[0]) <= settings.max_length
    data.write_bytes(b"x" * 100 + b"\xff" + b"x" * 10000)
    with pytest.raises(DemoError, match="no readable UTF-8 text"):
        load_corpus(settings)


def test_sample_spreads_over_lengths():
    corpus = Corpus("", [torch.zeros(n, dtype=torch.int64) for n in range(1, 101)], 10, 0)
    lengths = sorted(len(document) for document in corpus.sample(4, 10_000))
    assert lengths == [13, 38, 63, 88]
    assert sorted(len(document) for document in corpus.sample(4, 200)) == [26, 76]


@pytest.mark.parametrize("wanted", [0, 256, 512, 2304, 9984, 10240, 12800])
@pytest.mark.parametrize("power", [1.0, 1.7])
def test_search_finds_the_largest(wanted, power):
    """The result stands on two measurements: the length itself and the one after it."""
    budget = 1e6
    constant = 3e5
    slope = (budget - constant) / (wanted + 128) ** power
    measured = []

    def measure_length(length):
        measured.append(length)
        return int(constant + slope * length**power)

    found = largest_under(measure_length, int(budget), 256, 10240)
    assert found.largest == min(wanted, 10240)
    assert found.capped == (wanted >= 10240)
    assert len(set(measured)) == len(measured) <= 14
    if not found.capped:
        assert wanted == 0 or wanted in measured
        assert wanted + 256 in measured


def test_search_results_read_well():
    assert largest_under(lambda n: n, 100, 256, 1024).result() == "< 256"
    assert largest_under(lambda n: n, 600, 256, 1024).result() == "512"
    assert largest_under(lambda n: n, 5000, 256, 1024).result() == ">= 1,024"


def test_the_last_line_of_a_search_is_its_answer(monkeypatch):
    """The last length tried is often one that didn't fit."""
    peaks = iter([{256: 3, 512: 5, 768: 9}, {256: 9}, {1024: 1}])
    found = iter([(512, False), (0, False), (1024, True)])

    def search(measure, *_):
        points = next(peaks)
        for length in points:
            measure(length)
        largest, capped = next(found)
        return Search(largest, capped, {n: p * MIB for n, p in points.items()})

    class News:
        lines: list[list[str]] = []

        @contextmanager
        def progress(self, *_):
            self.lines.append([])
            yield self.lines[-1].append

    class Plain:
        def prepare(self, model):
            return SimpleNamespace(model=model, release=lambda: None)

    monkeypatch.setattr(measure, "METHODS", [Plain(), Plain(), Plain()])
    for plain, key in zip(measure.METHODS, "abc", strict=True):
        plain.name = plain.key = key
    monkeypatch.setattr(measure, "largest_under", search)
    monkeypatch.setattr(measure, "measure_peak", lambda *_: 9 * MIB)
    corpus = Corpus("", [torch.zeros(2000, dtype=torch.int64)], 10, 0)
    model = SimpleNamespace(device=torch.device("cpu"))
    assert list(measure.measure_lengths(model, corpus, Settings(), News())) == ["a", "b", "c"]
    assert [lines[-1] for lines in News.lines] == [
        "largest: 512 tokens, 5 MiB",
        "largest: < 256 tokens",
        "largest: >= 1,024 tokens, 1 MiB",
    ]
    assert News.lines[0][:-1] == [f"{n} tokens: 9 MiB" for n in (256, 512, 768)]


def test_packed_batch_predicts_within_documents():
    documents = [torch.arange(5), torch.arange(1), torch.arange(3)]
    batch = packed_batch(documents, torch.device("cpu"))
    assert (batch["labels"] != -100).sum() == predicted(documents) == 6


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_narrow_terminal_cuts_the_news_only(width):
    screen = io.StringIO()
    report = Report(Console(file=screen, force_terminal=True, width=width, color_system=None))
    with report.progress("memory and gradients", 6) as advance:
        advance("1,234 MiB: packed + checkpointing + chunked CE, and whatever else there is to say")
    last = screen.getvalue().splitlines()[-2]  # the bar's end; then the cursor comes back
    assert re.search(
        r"memory and gradients .*1/6 \d:\d\d:\d\d left [-\d]:[-\d]{2}:[-\d]{2} 1,2", last
    )


def test_redirected_output_has_no_control_codes(capsys):
    report = Report(Console(force_terminal=False))
    with report.progress("working", 2) as advance:
        advance("one")
        advance("two")
    assert "\x1b" not in capsys.readouterr().out
