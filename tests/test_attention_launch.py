"""Which blocks an attention launch makes: each tile of each head once, K and V once for the heads
that share a tile, sections of heads; and the numbers of that, up to 2^31."""

from __future__ import annotations

import subprocess
from pathlib import Path

import emulation
import pytest
import torch
from attention_cases import BACKENDS, assert_forward, make
from cases import cu_seqlens

ROOT = Path(__file__).resolve().parent.parent
TILES = {64: (128, 128, 64), 256: (64, 64, 256)}  # head dim: rows, keys, padded head dim
WORD = 8  # values of one copy


def key_tiles(rows: range, sq: int, sk: int, tile_keys: int, causal: bool, left: int) -> int:
    """Key tiles that queries ``rows`` of a sequence look at."""
    begin = max(rows[0] + sk - sq - left, 0) if left >= 0 else 0
    end = min(rows[-1] + sk - sq + 1, sk) if causal else sk
    return max(-(-end // tile_keys) - begin // tile_keys, 0) if begin < end else 0


def copies(lq, lk, head_dim: int, head_slots: int, pack: int, causal=False, left=-1) -> int:
    """16-byte copies where each tile of each head slot is worked on once: Q, then K and V."""
    tile_rows, tile_keys, width = TILES[head_dim]
    words = 0
    for sq, sk in zip(lq, lk, strict=True):
        for first in range(0, sq * pack, tile_rows):
            last = min(first + tile_rows, sq * pack) - 1
            queries = range(first // pack, last // pack + 1)
            tiles = key_tiles(queries, sq, sk, tile_keys, causal, left)
            if tiles:
                words += tile_rows * width // WORD + tiles * 2 * tile_keys * width // WORD
    return words * head_slots


def run(lq, lk, head_dim, heads, kv_heads, **options) -> int:
    """Checks the result of a call; how many copies it made."""
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "value_dim": head_dim}
    q, k, v, keywords, _ = make(lq, lk, options, dtype=torch.bfloat16, **shape)
    q, k, v = (t.detach() for t in (q, k, v))
    cu = cu_seqlens(lq), cu_seqlens(lk)
    backend = BACKENDS["emulated"]
    with emulation.emulated() as operators:
        operators.clear_instruction_counts()
        got = backend.attention(q, k, v, *cu, **keywords)
        made = operators.instruction_count("cp.async")
    assert_forward(backend, got, q, k, v, *cu, **keywords)
    return made


# Lengths, heads, heads of K and V, and how many heads share a tile.
GROUPS = {
    "decode": ([1, 1, 1], [130, 64, 5], 8, 1, 8),
    "decode_of_groups": ([1, 1, 1], [130, 64, 5], 6, 3, 2),
    "short": ([20, 3, 30], [200, 3, 70], 4, 2, 2),
    "over_a_tile": ([70, 50], [140, 50], 5, 1, 5),
    "no_group": ([20, 3], [200, 3], 3, 3, 1),
    "full_tiles": ([128, 128], [130, 128], 4, 2, 1),
    "prime_heads": ([9, 1, 40], [9, 260, 40], 14, 7, 2),
}


@pytest.mark.emulated
@pytest.mark.parametrize("causal", [False, True], ids=["plain", "causal"])
@pytest.mark.parametrize(("lq", "lk", "heads", "kv_heads", "pack"), GROUPS.values(), ids=GROUPS)
def test_each_tile_once_and_k_and_v_once_for_a_group(lq, lk, heads, kv_heads, pack, causal):
    made = run(lq, lk, 64, heads, kv_heads, causal=causal)
    assert made == copies(lq, lk, 64, heads // pack, pack, causal)
    if pack > 1:
        assert made < copies(lq, lk, 64, heads, 1, causal)


# 1 KiB for a key and value of 256: sections of 8 MiB hold one head of 4900 keys, two of 4000.
@pytest.mark.emulated
@pytest.mark.parametrize(("kv_heads", "keys"), [(3, 4900), (4, 4000), (6, 4000), (5, 4000)])
def test_sections_take_each_head_once(kv_heads, keys):
    lq, lk, options = [3, 70, 0], [keys - 70, 70, 0], {"causal": True, "window": (20, -1)}
    made = run(lq, lk, 256, kv_heads, kv_heads, **options)
    assert made == copies(lq, lk, 256, kv_heads, 1, causal=True, left=20)


def test_numbers_of_a_launch_at_their_ends(tmp_path: Path):
    emulation.skip_unless_buildable()
    program = tmp_path / "numbers"
    sanitize = ["-fsanitize=undefined", "-fno-sanitize-recover=all"]
    source = ROOT / "tests/cpp/launch_numbers_test.cpp"
    emulation.run(
        "g++", "-std=c++17", "-O1", *sanitize, f"-I{ROOT / 'csrc'}", str(source), "-o", str(program)
    )
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
