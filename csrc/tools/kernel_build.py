"""Compiles every kernel for every architecture and keeps what ptxas and nvdisasm say of it.

Sources are the generated instances and each ``*_launch.cu``. Results are kept in build/kernels
until a file that a source includes changes. Needs nvcc; instruction counts need nvdisasm too, of
the CUDA toolkit or of an installed triton.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kernel_sass
from kernel_devices import DEVICES

TOOLS = Path(__file__).resolve().parent
CSRC = TOOLS.parent
ROOT = CSRC.parent
CACHE = ROOT / "build/kernels"
ARCHITECTURES = ("sm_80", "sm_90")
VOCABULARIES = (32000, 128256, 151936, 256000)  # Llama 2, Llama 3, Qwen 3, Gemma
ELEMENTS = {"fp32": "float", "bf16": "__nv_bfloat16", "fp16": "__half"}
FLAGS = ("-std=c++17", "-O3", "-DNDEBUG")  # those of the release build
AT_ONCE = 2


class BuildError(RuntimeError):
    """A tool failed; the message holds what it printed."""


def output_of(*command: str | Path, cwd: Path | None = None) -> str:
    result = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    if result.returncode != 0:
        raise BuildError(f"{' '.join(map(str, command))}\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr


# --- tools ----------------------------------------------------------------------------------------


def cuda_tool(name: str, *variables: str) -> Path | None:
    """Named by one of the environment's variables, else of the toolkit, else on PATH."""
    candidates = [os.environ.get(v) for v in variables]
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates += [f"{home}/bin/{name}" for home in homes if home]
    candidates += [shutil.which(name), f"/usr/local/cuda/bin/{name}"]
    return next((Path(c) for c in candidates if c and os.access(c, os.X_OK)), None)


def nvcc() -> Path | None:
    return cuda_tool("nvcc", "VARSTREAM_NVCC", "CUDACXX")


def nvdisasm() -> Path | None:
    found = cuda_tool("nvdisasm", "VARSTREAM_NVDISASM")
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        bundled = Path(triton.origin).parent / "backends/nvidia/bin/nvdisasm"
        found = bundled if os.access(bundled, os.X_OK) else None
    return found


def headers() -> Path | None:
    """The toolkit's, which a host compiler reads too."""
    compiler = nvcc()
    homes = [compiler.resolve().parent.parent if compiler else None, Path("/usr/local/cuda")]
    found = [home / "include" for home in homes if home]
    return next((folder for folder in found if (folder / "cuda_bf16.h").is_file()), None)


def version(tool: Path) -> str:
    answer = re.search(r"release [\d.]+, V([\d.]+)", output_of(tool, "--version"))
    assert answer, f"{tool} --version tells no version"
    return answer[1]


# --- sources --------------------------------------------------------------------------------------


def generated_sources() -> list[Path]:
    """The instances, written by the build's own CMake function."""
    cmake = shutil.which("cmake", path=str(Path(sys.executable).parent)) or shutil.which("cmake")
    if cmake is None:
        raise BuildError("cmake is missing (requirements-dev.txt)")
    folder = CACHE / "generated"
    folder.mkdir(parents=True, exist_ok=True)
    return [Path(p) for p in output_of(cmake, "-P", TOOLS / "instances.cmake", cwd=folder).split()]


@functools.cache
def code_and_includes(source: Path) -> tuple[str, tuple[Path, ...]]:
    code = re.sub(r"//.*", "", source.read_text())  # words change no machine code
    names = re.findall(r'^\s*#\s*include\s+"([^"]+)"', code, re.M)
    return " ".join(code.split()), tuple(CSRC / name for name in names)


def included(source: Path, seen: dict[Path, str]) -> None:
    """Adds to seen the code of source and of all it includes; csrc/emu is for the host."""
    if source in seen or not source.is_file() or (CSRC / "emu") in source.parents:
        return
    seen[source], names = code_and_includes(source)
    for name in names:
        included(name, seen)


def digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def digest_of(source: Path) -> str:
    seen: dict[Path, str] = {}
    included(source, seen)
    return digest(*seen.values())


# --- constants of the kernels ---------------------------------------------------------------------


def head_calls(sources: list[Path]) -> list[str]:
    """What prints the constants of the head's instances."""
    calls = []
    for source in sources:
        named = re.fullmatch(r"(softmax|distillation)_(\w+)_(\w+)", source.stem)
        if named is None:
            continue
        kernel, values, gradient = named.groups()
        elements = ", ".join(f"{ELEMENTS[x]}" for x in (values, gradient))
        kinds = ("false", "true") if kernel == "softmax" else ("",)
        for kind in kinds:
            arguments = ", ".join(filter(None, (elements, kind)))
            calls.append(f'  print_{kernel}<{arguments}>("{values}/{gradient}");')
    return calls


def attention_calls(sources: list[Path], function: str) -> str:
    """Calls of a function of the constants of attention's instances."""
    named = [re.fullmatch(r"forward_[a-z]+16_(\d+)_(\d+)", s.stem) for s in sources]
    dims = {(int(found[1]), int(found[2])) for found in named if found}
    return "\n".join(
        f"  {function}<{dim}, {value_dim}, {modified}>();"
        for dim, value_dim in sorted(dims)
        for modified in ("false", "true")
    )


def host_program(name: str, values: dict[str, str]) -> Path:
    """The program of `name`.cpp.in with the kernels' headers, its @names@ filled in."""
    toolkit = headers()
    if toolkit is None:
        raise BuildError("needs the CUDA toolkit's headers")
    text = (TOOLS / f"{name}.cpp.in").read_text()
    for key, value in values.items():
        text = text.replace(f"@{key}@", value)
    source, program, stamp = (CACHE / f"{name}{end}" for end in (".cpp", "", ".digest"))
    source.write_text(text)
    wanted = digest_of(source)
    if not stamp.is_file() or stamp.read_text() != wanted:
        flags = ["-std=c++17", "-O1", "-DVARSTREAM_EMULATED", f"-I{CSRC}", "-isystem", str(toolkit)]
        output_of("g++", *flags, source, "-o", program)
        stamp.write_text(wanted)
    return program


def traits(sources: list[Path]) -> list[dict[str, Any]]:
    """Threads, shared memory and tiles of each kernel, printed by a program with its headers."""
    limits = [f'{{"{n}", {d.block_shared}, {d.cluster}}}' for n, d in DEVICES.items()]
    values = {
        "attention_instances": attention_calls(sources, "print_attention"),
        "devices": ", ".join(limits),
        "vocabularies": ", ".join(map(str, VOCABULARIES)),
        "head_instances": "\n".join(head_calls(sources)),
    }
    answer = output_of(host_program("kernel_traits", values))
    return [json.loads(line) for line in answer.splitlines()]


# --- compiling ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compiled:
    """What one source became for one architecture."""

    source: str
    arch: str
    ptxas: str  # its report
    sass: dict[str, dict[str, Any]] | None  # by mangled name; None without nvdisasm
    peak_kib: int  # of the largest process of the compiler
    seconds: float  # of processor time


def compile_one(compiler: Path, source: Path, arch: str, folder: Path) -> None:
    """Fills folder; a folder without result.json is not done."""
    name = f"{arch}-{source.stem}-"
    for old in CACHE.glob(name + "*"):
        shutil.rmtree(old)
    folder.mkdir()
    report = folder / "ptxas.txt"
    flags = [*FLAGS, f"-I{CSRC}", f"-arch={arch}", "-cubin", "-Xptxas", "-v"]
    command = [str(compiler), *flags, "-o", str(folder / "kernel.cubin"), str(source)]
    with report.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise BuildError(f"{source.name} for {arch}:\n{report.read_text()}")
    result = {"peak_kib": usage.ru_maxrss, "seconds": usage.ru_utime + usage.ru_stime}
    (folder / "result.json").write_text(json.dumps(result))


def sass_of(disassembler: Path, folder: Path) -> dict[str, dict[str, Any]]:
    kept = folder / f"sass-{digest(Path(kernel_sass.__file__).read_text())}.json"
    if not kept.is_file():
        for old in folder.glob("sass-*.json"):
            old.unlink()
        listing = output_of(disassembler, "-c", folder / "kernel.cubin")
        kept.write_text(json.dumps(kernel_sass.counts_by_kernel(listing)))
    counts: dict[str, dict[str, Any]] = json.loads(kept.read_text())
    return counts


def build() -> tuple[list[Compiled], list[dict[str, Any]]]:
    """All sources for all architectures, and the kernels' constants."""
    compiler, disassembler = nvcc(), nvdisasm()
    if compiler is None:
        raise BuildError("needs nvcc")
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        generated = generated_sources()
        sources = [*generated, *sorted(CSRC.rglob("*_launch.cu"))]
        prefix = digest(version(compiler), *FLAGS)

        def one(job: tuple[Path, str]) -> Compiled:
            source, arch = job
            key = digest(prefix, digest_of(source))
            folder = CACHE / f"{arch}-{source.stem}-{key}"
            if not (folder / "result.json").is_file():
                compile_one(compiler, source, arch, folder)
            sass = sass_of(disassembler, folder) if disassembler else None
            result = json.loads((folder / "result.json").read_text())
            return Compiled(source.stem, arch, (folder / "ptxas.txt").read_text(), sass, **result)

        with ThreadPoolExecutor(AT_ONCE) as pool:
            jobs = [(source, arch) for source in sources for arch in ARCHITECTURES]
            return list(pool.map(one, jobs)), traits(generated)
