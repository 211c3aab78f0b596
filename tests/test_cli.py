"""The command line: one line for every error, exit codes, what ``info`` tells, how commands find
their code."""

from __future__ import annotations

import importlib
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

import varstream
from varstream.cli import app, bench, errors, info

COMMANDS = ("info", "demo", "plan", "verify", "bench")


def start(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


def one_line(result, *words):
    """The error's only line; nothing on stdout."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    for word in words:
        assert word in line
    return line


# --- errors ---------------------------------------------------------------------------------------

WRONG = {
    "command": (["nope"], "varstream: no such command 'nope'; try: varstream --help"),
    "option": (["--nope"], "varstream: no such option: --nope; try: varstream --help"),
    "demo_option": (["demo", "--nope"], "varstream demo: no such option: --nope; try: varstream"),
    "demo_value": (["demo", "--steps", "x"], "varstream demo: invalid value for '--steps'"),
    "demo_range": (["demo", "--budget", "0"], "varstream demo: invalid value for '--budget'"),
    "demo_no_value": (["demo", "--data"], "varstream demo: option '--data' requires an argument;"),
    "plan_option": (["plan", "--nope"], "varstream plan: no such option: --nope"),
    "info_argument": (["info", "extra"], "varstream info: got unexpected extra argument"),
    "verify_argument": (["verify"], "varstream verify: missing argument 'CONFIG'; try:"),
    "verify_tokens": (["verify", "x", "--tokens", "31"], "invalid value for '--tokens'"),
    "verify_seed": (["verify", "x", "--seed", str(2**64)], "invalid value for '--seed'"),
    "demo_seed": (["demo", "--seed", str(2**64)], "invalid value for '--seed'"),
    "verify_tolerance": (["verify", "x", "--tolerance", "inf"], "value for '--tolerance'"),
}


@pytest.mark.parametrize(("args", "message"), WRONG.values(), ids=WRONG)
def test_usage_errors_are_one_line(args, message):
    line = one_line(start(*args), message)
    assert line.endswith(" --help")


def test_a_process_reports_in_one_line_too():
    command = [sys.executable, "-m", "varstream", "demo", "--nope"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "varstream demo: no such option: --nope; try: varstream demo --help\n"


def sample():
    """A command that ends in the way its argument names."""
    sample = typer.Typer(add_completion=False)

    @sample.command()
    def end(how: str) -> None:
        if how == "user":
            raise errors.UserError("it is\n too   small; give more")
        if how == "bad":
            raise typer.BadParameter("must be a word")
        if how == "exit":
            raise typer.Exit(3)
        if how == "interrupt":
            raise KeyboardInterrupt
        if how == "abort":
            raise typer.Abort
        if how == "crash":
            raise RuntimeError("unforeseen")

    return get_command(sample).main


@pytest.mark.parametrize(
    ("how", "code", "line"),
    [
        ("well", 0, ""),
        ("user", 2, "varstream x: it is too small; give more\n"),
        ("bad", 2, "varstream x: invalid value: must be a word; try: varstream x --help\n"),
        ("exit", 3, ""),
        ("interrupt", 130, ""),
        ("abort", 130, ""),
    ],
)
def test_ways_to_end(how, code, line, capsys):
    assert errors.run(sample(), [how], "varstream x") == code
    assert capsys.readouterr().err == line


def test_unexpected_errors_keep_their_traceback():
    with pytest.raises(RuntimeError, match="unforeseen"):
        errors.run(sample(), ["crash"], "varstream x")


# --- commands -------------------------------------------------------------------------------------


def test_help_lists_the_commands():
    for args in ([], ["--help"]):
        result = start(*args)
        assert result.exit_code == 0
        assert all(f" {name} " in result.stdout for name in COMMANDS)


def test_version():
    result = start("--version")
    assert (result.exit_code, result.stdout) == (0, f"varstream {varstream.__version__}\n")
    assert start("--version", "nope").exit_code == 0  # before anything else is looked at


@pytest.mark.parametrize("command", ["info", "demo", "verify"])
def test_help_of_a_command(command):
    result = start(command, "--help")
    assert result.exit_code == 0
    assert f"Usage: varstream {command}" in result.stdout


def make_checkout(folder, source):
    (folder / "bench").mkdir()
    (folder / "python" / "varstream").mkdir(parents=True)
    (folder / "bench" / "__init__.py").write_text("")
    (folder / "bench" / "__main__.py").write_text(source)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty working directory, no installed benchmarks, and no trace of either afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(bench, "INSTALLED", "varstream.no_such_module")
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if _is_bench(name)}
    importlib.invalidate_caches()
    yield tmp_path
    for name in [name for name in sys.modules if _is_bench(name)]:
        del sys.modules[name]
    sys.modules.update(kept)


def _is_bench(name):
    return name == "bench" or name.startswith("bench.")


def test_bench_without_a_checkout_says_where_it_lives(elsewhere):
    one_line(
        start("bench", "list"),
        "varstream bench: the benchmarks live in varstream's source checkout; run this in its root",
        "python -m bench",
    )


def test_bench_runs_no_stranger(elsewhere):
    make_checkout(elsewhere, "raise AssertionError('not ours')")
    (elsewhere / "python" / "varstream").rmdir()
    one_line(start("bench", "list"), "source checkout")


def test_bench_passes_everything_on_to_an_app(elsewhere):
    make_checkout(
        elsewhere,
        "import typer\n"
        "app = typer.Typer()\n"
        "@app.command()\n"
        "def run(case: str, rounds: int = 1): print(case, rounds); raise typer.Exit(rounds)\n"
        "@app.command('list')\n"
        "def list_(): print('cases')\n",
    )
    result = start("bench", "run", "head", "--rounds", 4)
    assert (result.exit_code, result.stdout) == (4, "head 4\n")
    one_line(
        start("bench", "run", "head", "--nope"),
        "varstream bench run: no such option: --nope; try: varstream bench run --help",
    )


def test_bench_passes_everything_on_to_a_function(elsewhere):
    make_checkout(elsewhere, "def main(args):\n    print(args)\n    return len(args)\n")
    result = start("bench", "run", "--help", "-x")
    assert (result.exit_code, result.stdout) == (3, "['run', '--help', '-x']\n")


# --- info -----------------------------------------------------------------------------------------


def test_info_names_optional_packages_and_what_works():
    report = json.loads(start("info", "--json").stdout)
    assert set(report["packages"]) == {name for _, name, _ in info.PACKAGES}
    transformers = report["packages"]["transformers"]
    assert transformers["version"] == importlib.import_module("transformers").__version__
    assert report["features"]["vs.stream_layer"] == "works"
    text = " ".join(start("info").stdout.split())
    assert "optional packages" in text and "what works here" in text
    assert "vs.stream, varstream verify" in text


def test_info_tells_what_is_missing(monkeypatch):
    monkeypatch.setattr(
        info, "find_spec", lambda name: None if name in ("transformers", "tokenizers") else object()
    )
    packages, features = info._packages(), info._features()
    assert packages["transformers"]["version"] is None
    assert features["vs.stream, varstream verify"] == "needs: pip install transformers"
    assert features["varstream demo"] == "needs: pip install transformers tokenizers"
    assert features["vs.stream_layer"] == "works"


def test_info_says_what_this_version_lacks():
    rows = (
        ("an attribute", "varstream:nothing", ()),
        ("a module", "varstream.nothing", ()),
        ("a module of it", "varstream.nothing.at_all", ()),
    )
    assert set(info._features(rows).values()) == {"not in this version"}


def test_info_knows_every_integration():
    folder = Path(varstream.__file__).parent / "integrations"
    modules = {m.name for m in pkgutil.iter_modules([str(folder)]) if not m.name.startswith("_")}
    places = {place for _, place, _ in info.FEATURES}
    assert {f"varstream.integrations.{name}" for name in modules} <= places


def test_info_imports_no_package_to_look_at_it():
    code = (
        "import sys, varstream.cli.info as info; info.collect()\n"
        f"print([m for m in {[m for m, _, _ in info.PACKAGES]} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
