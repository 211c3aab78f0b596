"""Microbenchmark of pack and unpack on a GPU: ``python -m bench.gpu_pack``.

Each case is checked against torch first, then timed with CUDA events over rotating inputs that are
together larger than the L2 cache; the median counts. Two yardsticks stand beside every number:
torch's own ``index_select`` / ``index_copy``, and the time a plain device copy takes for the bytes
that must move (every packed row read and written once, and every padded row once more by unpack,
which fills before it scatters). Results go to ``bench/results/<gpu>.json``.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
from collections.abc import Callable

import torch
from torch import Tensor

import varstream as vs
from bench import timing
from varstream import _C

REPEATS = 50
COLD_BYTES = 512 * 2**20

# name, batch, padded length, trailing width, dtype
CASES = [
    ("hidden_4096_bf16", 16, 2048, 4096, torch.bfloat16),
    ("hidden_1024_bf16", 64, 512, 1024, torch.bfloat16),
    ("hidden_768_fp32", 64, 512, 768, torch.float32),
    ("odd_width_77_bf16", 64, 2048, 77, torch.bfloat16),
    ("token_ids_int64", 256, 4096, None, torch.int64),
]


def median_ms(run: Callable[[int], object]) -> tuple[float, float]:
    """Median and interquartile range of ``run(i)`` in milliseconds, after warm-up."""
    for i in range(5):
        run(i)
    times = []
    for i in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run(i)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    quarter, median, three = statistics.quantiles(times, n=4)
    return median, three - quarter


def copy_ms(byte_count: int) -> float:
    """What copying takes: ``byte_count`` bytes moved, half read and half written."""
    size = max(byte_count // 2, 1)
    copies = min(max(1, COLD_BYTES // size), 64)
    src = [torch.randint(0, 127, (size,), dtype=torch.int8, device="cuda") for _ in range(copies)]
    dst = torch.empty_like(src[0])
    return median_ms(lambda i: dst.copy_(src[i % copies]))[0]


def measure(
    batch: int, seqlen: int, width: int | None, dtype: torch.dtype
) -> dict[str, dict[str, float]]:
    """Times of one case: {pack, unpack} -> {ours, torch, copy floor} in ms, and their ratios."""
    lengths = torch.randint(seqlen // 5, seqlen + 1, (batch,))
    mask = (torch.arange(seqlen) < lengths[:, None]).cuda()
    shape = (batch * seqlen,) if width is None else (batch * seqlen, width)
    row_bytes = dtype.itemsize * (width or 1)
    rotations = min(max(1, COLD_BYTES // (batch * seqlen * row_bytes)), 16)
    xs = [(torch.rand(shape, device="cuda") * 100).to(dtype) for _ in range(rotations)]
    indices = mask.flatten().nonzero().squeeze(1)
    rows, total = batch * seqlen, indices.numel()
    values = [x.index_select(0, indices) for x in xs]

    def ours_pack(i: int) -> Tensor:
        return torch.ops.varstream.pack(xs[i % rotations], indices)

    def ours_unpack(i: int) -> Tensor:
        return torch.ops.varstream.unpack(values[i % rotations], indices, rows, 0.0)

    def torch_pack(i: int) -> Tensor:
        return xs[i % rotations].index_select(0, indices)

    def torch_unpack(i: int) -> Tensor:
        value = values[i % rotations]
        return value.new_zeros(shape).index_copy_(0, indices, value)

    moved = {"pack": 2 * total * row_bytes, "unpack": (2 * total + rows) * row_bytes}
    result = {}
    for name, ours, theirs in (
        ("pack", ours_pack, torch_pack),
        ("unpack", ours_unpack, torch_unpack),
    ):
        if not torch.equal(ours(0), theirs(0)):
            raise SystemExit(f"{name} disagrees with torch: not timed")
        (ours_ms, spread), (torch_ms, _) = median_ms(ours), median_ms(theirs)
        floor = copy_ms(moved[name])
        result[name] = {
            "ms": ours_ms,
            "iqr_ms": spread,
            "torch_ms": torch_ms,
            "copy_floor_ms": floor,
            "gb_per_s": moved[name] / ours_ms / 1e6,
            "speedup_over_torch": torch_ms / ours_ms,
            "over_copy_floor": ours_ms / floor,
        }
    return result


def main() -> None:
    """Measure all cases, print one line each and store everything."""
    if not torch.cuda.is_available():
        sys.exit("bench.gpu_pack: no GPU here")
    torch.manual_seed(0)
    properties = torch.cuda.get_device_properties(0)
    report = {
        "device": {
            "name": properties.name,
            "capability": f"sm_{properties.major}{properties.minor}",
            "memory_bytes": properties.total_memory,
        },
        "versions": {
            "varstream": vs.__version__,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "nvcc": _C.build_info()["nvcc"],
            "archs": _C.build_info()["cuda_archs"],
            "python": platform.python_version(),
            "git_commit": timing.git_commit(),
        },
        "pack": {},
    }
    for name, *case in CASES:
        result = measure(*case)
        report["pack"][name] = result
        for op, numbers in result.items():
            print(
                f"{name:20} {op:7} {numbers['ms']:.4f} ms, {numbers['gb_per_s']:.0f} GB/s, "
                f"{numbers['speedup_over_torch']:.2f}x torch, "
                f"{numbers['over_copy_floor']:.2f}x the copy floor"
            )
    timing.RESULTS.mkdir(exist_ok=True)
    path = timing.RESULTS / f"{properties.name.lower().replace(' ', '_').replace('/', '_')}.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
