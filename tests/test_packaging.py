"""The build and the package: what imports, what links, what a wheel holds, what configure says."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch

import varstream
from varstream import _C, _load

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "python" / "varstream"
COMMANDS = ("info", "demo", "plan", "verify", "bench")
CMAKE = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
needs_cmake = pytest.mark.skipif(CMAKE is None, reason="no cmake")


def run_python(code: str, **kwargs) -> str:
    """Run code in a fresh interpreter and return what it prints."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **kwargs)
    assert result.returncode == 0, result.stderr
    return result.stdout


# --- import ---------------------------------------------------------------------------------------


def test_import_costs_under_300_ms_beyond_torch():
    # Frozen first: a garbage collection that happens to fall due walks torch's objects (90 ms).
    code = (
        "import gc, time, torch; gc.collect(); gc.freeze();"
        "start = time.process_time(); import varstream;"
        "print(time.process_time() - start)"
    )
    assert statistics.median(float(run_python(code)) for _ in range(5)) < 0.3


def test_import_brings_in_nothing_heavy():
    loaded = run_python(
        "import sys, torch; before = set(sys.modules); import varstream, varstream.batching;"
        "print(*sorted(set(sys.modules) - before))"
    ).split()
    heavy = ("transformers", "typer", "rich", "matplotlib", "torch._dynamo", "torch._inductor")
    assert not [m for m in loaded if m.startswith(heavy)]


def test_version_is_one():
    assert varstream.__version__ == metadata.version("varstream") == _C.build_info()["version"]


def test_old_torch_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "__version__", "2.10.1+cpu")
    with pytest.raises(ImportError, match=r"needs torch >= 2\.11, found 2\.10\.1\+cpu"):
        _load._load_extension()


def test_missing_module_says_how_to_build(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(varstream, "_C")
    monkeypatch.setitem(sys.modules, "varstream._C", None)
    with pytest.raises(
        ImportError, match=r"varstream\._C could not be loaded.*--no-build-isolation"
    ):
        _load._load_extension()


def test_every_schema_is_there():
    operators = {
        *(
            "pack",
            "unpack",
            "varlen_attention",
            "varlen_attention_composed",
            "varlen_attention_bwd",
        ),
        *("varlen_attention_bwd_composed", "varlen_attention_bwd_accumulate"),
        *("varlen_attention_bwd_accumulate_composed", "linear_cross_entropy"),
        *("linear_distillation", "softmax_rows_", "distillation_rows_"),
        *("token_logprobs", "token_logprobs_bwd", "token_logprobs_bwd_accumulate"),
        *("linear_bias_gelu", "linear_bias_gelu_bwd"),
        *("relative_attention", "relative_attention_bwd"),
        *("bias_residual_layer_norm", "bias_residual_layer_norm_bwd"),
    }
    names = torch._C._dispatch_get_all_op_names()
    assert {
        n.removeprefix("varstream::") for n in names if n.startswith("varstream::")
    } == operators


# --- the binary -----------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
def test_no_cuda_library_is_needed_to_load():
    """Kernels or not, the module asks for nothing that a CPU-only torch lacks."""
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", _C.__file__], capture_output=True, text=True, check=True
    ).stdout.split()
    cuda = [s for s in symbols if re.search(r"^(__)?cu[A-Zdb]|cudnn|cublas|c10_?cuda|_cuda_", s)]
    assert not cuda


@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf")
def test_linked_libraries():
    dynamic = subprocess.run(
        ["readelf", "-d", _C.__file__], capture_output=True, text=True, check=True
    ).stdout
    needed = set(re.findall(r"NEEDED.*\[(.*?)\]", dynamic))
    assert "libtorch_cpu.so" in needed
    assert not [n for n in needed if re.search(r"cuda|cudart|cudnn|cublas|torch_python", n)]
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic


def test_binary_names_no_machine_path():
    assert str(ROOT / "csrc").encode() not in Path(_C.__file__).read_bytes()


def test_stub_matches_module():
    stub = ast.parse((PACKAGE / "_C.pyi").read_text())
    functions = {n.name: n for n in stub.body if isinstance(n, ast.FunctionDef)}
    assert set(functions) == {n for n in dir(_C) if not n.startswith("_")}
    for name, node in functions.items():
        bound = re.findall(r"(\w+):", getattr(_C, name).__doc__.splitlines()[0].split("->")[0])
        assert [a.arg for a in node.args.args] == bound, name
    (info,) = (n for n in stub.body if isinstance(n, ast.ClassDef) and n.name == "BuildInfo")
    assert [n.target.id for n in info.body] == list(_C.build_info())


def test_build_info_is_consistent():
    info = _C.build_info()
    assert info["cuda"] == bool(info["kernels"]) == bool(info["nvcc"]) == bool(info["cuda_archs"])
    assert info["cuda_reason"]
    if torch.version.cuda is None:
        assert not any(_C.cuda_symbols().values())


# --- configure ------------------------------------------------------------------------------------


def without_options() -> dict[str, str]:
    """This environment without what chooses the build."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("VARSTREAM", "CUDA", "MAKE"))}


def configure(
    tmp_path: Path, *options: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    import pybind11

    return subprocess.run(
        [
            *(CMAKE, "-S", ROOT, "-B", tmp_path / "build", f"-DPython_EXECUTABLE={sys.executable}"),
            *(f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", *options),
        ],
        capture_output=True,
        text=True,
        env=without_options() | environment,
    )


@needs_cmake
def test_configure_off_says_cpu_only(tmp_path: Path):
    result = configure(tmp_path, "-DVARSTREAM_CUDA=OFF")
    assert result.returncode == 0, result.stderr
    assert "varstream: CPU only (VARSTREAM_CUDA=OFF); no CUDA kernel is built" in result.stdout


@needs_cmake
def test_configure_without_nvcc_says_cpu_only(tmp_path: Path):
    result = configure(tmp_path, "-DVARSTREAM_NVCC=/nonexistent/nvcc")
    assert result.returncode == 0, result.stderr
    assert "varstream: CPU only (no nvcc found); no CUDA kernel is built" in result.stdout


@needs_cmake
def test_configure_on_without_nvcc_fails_and_says_what_to_do(tmp_path: Path):
    result = configure(tmp_path, "-DVARSTREAM_CUDA=ON", "-DVARSTREAM_NVCC=/nonexistent/nvcc")
    words = " ".join(result.stderr.split())
    assert result.returncode != 0
    assert "VARSTREAM_CUDA=ON, but no nvcc found." in words
    assert "set CUDA_HOME, or build without kernels: VARSTREAM_CUDA=OFF" in words


@needs_cmake
def test_configure_refuses_other_modes(tmp_path: Path):
    result = configure(tmp_path, "-DVARSTREAM_CUDA=MAYBE")
    assert result.returncode != 0
    assert "VARSTREAM_CUDA must be AUTO, ON or OFF, got MAYBE" in result.stderr


@needs_cmake
@pytest.mark.skipif(NVCC is None, reason="no nvcc")
def test_configure_takes_the_usual_spellings_of_archs(tmp_path: Path):
    result = configure(tmp_path, "-DVARSTREAM_CUDA_ARCHS=sm_90a,compute_90")
    assert result.returncode == 0, result.stderr
    assert "varstream: CUDA kernels for 90a-real 90-virtual, nvcc" in result.stdout


@needs_cmake
def test_configure_reads_the_environment_each_time(tmp_path: Path):
    """In one build directory: a define, else this configure's environment, else the default."""
    nowhere = {"VARSTREAM_NVCC": "/nonexistent/nvcc"}
    assert "CPU only (VARSTREAM_CUDA=OFF)" in configure(tmp_path, VARSTREAM_CUDA="OFF").stdout
    on = configure(tmp_path, VARSTREAM_CUDA="ON", **nowhere)
    assert "VARSTREAM_CUDA=ON, but no nvcc found." in " ".join(on.stderr.split())
    assert "CPU only (no nvcc found)" in configure(tmp_path, **nowhere).stdout
    defined = configure(tmp_path, "-DVARSTREAM_CUDA=OFF", VARSTREAM_CUDA="ON")
    assert "CPU only (VARSTREAM_CUDA=OFF)" in defined.stdout


@needs_cmake
@pytest.mark.parametrize(
    ("answer", "reason"),
    [("release 12.6, V12.6.85", "is of CUDA 12.6, older than 12.8"), ("", "tells no version")],
)
def test_configure_refuses_an_old_cuda(tmp_path: Path, answer: str, reason: str):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, {answer}'\n")
    nvcc.chmod(0o755)
    auto = configure(tmp_path, VARSTREAM_NVCC=str(nvcc))
    assert auto.returncode == 0, auto.stderr
    assert f"{reason}); no CUDA kernel is built" in auto.stdout
    on = configure(tmp_path, VARSTREAM_CUDA="ON", VARSTREAM_NVCC=str(nvcc))
    words = " ".join(on.stderr.split())
    assert on.returncode != 0
    assert f"{reason}. Install the CUDA toolkit (12.8 or newer)" in words


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_installs_again_when_the_options_change(tmp_path: Path):
    for name in ("Makefile", "CMakeLists.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)

    def installs(**options: str) -> bool:
        command = ["make", "-C", tmp_path, "env", "PYTHON=true"]
        env = without_options() | options
        result = subprocess.run(command, capture_output=True, text=True, env=env)
        assert result.returncode == 0, result.stderr
        return "pip install" in result.stdout

    assert installs() and not installs()
    assert installs(VARSTREAM_CUDA="OFF") and not installs(VARSTREAM_CUDA="OFF")
    assert installs(VARSTREAM_CUDA_ARCHS="80-real;90a-real")
    assert installs()


# --- the wheel ------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def cpu_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from this tree with VARSTREAM_CUDA=OFF."""
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps"),
            *("--config-settings", f"build-dir={out / 'build'}", "--wheel-dir", out, ROOT),
        ],
        check=True,
        env={**os.environ, "VARSTREAM_CUDA": "OFF"},
    )
    (wheel,) = out.glob("varstream-*.whl")
    return wheel


@needs_cmake
def test_wheel_holds_the_package_and_nothing_else(cpu_wheel: Path):
    with zipfile.ZipFile(cpu_wheel) as archive:
        names = set(archive.namelist())
        entry_points = archive.read(next(n for n in names if n.endswith("entry_points.txt")))
    assert re.search(rb"^varstream ?= ?varstream\.cli:main$", entry_points, flags=re.M)
    assert any(n.endswith(".dist-info/licenses/LICENSE") for n in names)
    ours = {n for n in names if ".dist-info/" not in n}
    binaries = {n for n in ours if n.endswith(".so")}
    assert len(binaries) == 1 and binaries.pop().startswith("varstream/_C.")
    sources = {
        f"varstream/{p.relative_to(PACKAGE).as_posix()}"
        for p in PACKAGE.rglob("*")
        if p.suffix in (".py", ".pyi", ".typed") and "__pycache__" not in p.parts
    }
    assert {"varstream/py.typed", "varstream/_C.pyi"} <= sources
    benchmarks = {
        f"varstream/bench/{p.relative_to(ROOT / 'bench').as_posix()}"
        for p in (ROOT / "bench").rglob("*")
        if p.suffix in (".py", ".md") or p.name == "schema.json"
    }
    assert {n for n in ours if not n.endswith(".so")} == sources | benchmarks


@needs_cmake
def test_cpu_only_build_works_and_says_so(cpu_wheel: Path, tmp_path: Path):
    with zipfile.ZipFile(cpu_wheel) as archive:
        archive.extractall(tmp_path)
    # The development install puts an import hook in front of sys.path; the wheel must win here.
    prelude = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'Redirect' not in repr(f)];"
        f"sys.path.insert(0, {str(tmp_path)!r}); import varstream, torch;"
        f"assert varstream.__file__.startswith({str(tmp_path)!r}), varstream.__file__;"
    )
    run_python(
        prelude + "x = torch.arange(6.).view(2, 3); p = varstream.pack(x, x > 2);"
        "assert p.values.tolist() == [3, 4, 5]; assert p.cu_seqlens.tolist() == [0, 0, 3]",
        cwd=tmp_path,
    )
    info = prelude + "from varstream.cli.info import show; show(as_json={})"
    report = json.loads(run_python(info.format(True), cwd=tmp_path))
    assert report["cuda"]["built"] is False
    assert report["cuda"]["reason"] == "VARSTREAM_CUDA=OFF"
    assert report["operators"]["pack"] == {"CPU": "ATen", "CUDA": "ATen"}
    text = " ".join(run_python(info.format(False), cwd=tmp_path).split())
    assert "Built CPU only: VARSTREAM_CUDA=OFF. No CUDA kernel is in this build." in text


# --- the command ----------------------------------------------------------------------------------


def test_info_reports_what_is_here():
    report = json.loads(run_python("from varstream.cli.info import show; show(as_json=True)"))
    assert report["versions"]["varstream"] == varstream.__version__
    assert report["versions"]["torch"] == torch.__version__
    assert report["cuda"]["kernels"] == _C.build_info()["kernels"]
    assert report["devices"][0].startswith("CPU")
    assert report["operators"]["unpack"]["CPU"] == "ATen"


def test_gpu_status_is_told_of_builds_with_kernels_only():
    from varstream.cli.info import GPU_STATUS, _summary

    build = {"built": True, "usable": True, "reason": "", "symbols": {}}
    assert _summary(build) == GPU_STATUS
    assert GPU_STATUS in _summary(build | {"usable": False})
    assert GPU_STATUS not in _summary(build | {"built": False})


def test_metadata_names_what_is_imported_and_the_oldest_python():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert {"torch", "numpy", "rich", "typer"} == {
        re.split(r"\W", d)[0] for d in project["project"]["dependencies"]
    }
    oldest = project["project"]["requires-python"].removeprefix(">=")
    assert project["tool"]["mypy"]["python_version"] == oldest
    assert project["tool"]["ruff"]["target-version"] == f"py{oldest.replace('.', '')}"
    assert f"Programming Language :: Python :: {oldest}" in project["project"]["classifiers"]


def test_command_line_lists_its_commands():
    result = subprocess.run(
        [sys.executable, "-m", "varstream", "--help"], capture_output=True, text=True
    )
    assert result.returncode == 0
    assert all(f" {name} " in result.stdout for name in COMMANDS)


def test_commands_import_only_what_they_run():
    loaded = run_python("import sys, varstream.cli; print(*sys.modules)").split()
    assert not {f"varstream.cli.{name}" for name in COMMANDS} & set(loaded)
