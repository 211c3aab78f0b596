"""The tile schedule: the plan against brute force, the emulated kernel against the plan."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate, product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from varstream import _C

ROOT = Path(__file__).resolve().parent.parent
COMPILER = shutil.which("g++") or shutil.which("c++")
FLAGS = ["-std=c++17", "-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
SCHEDULES = ["warp-greedy", "round-robin", "1", "2"]
BUCKETS = 1024
INT_MAX = 2**31 - 1

Window = tuple[int, int]
OPEN, CAUSAL = (-1, -1), (-1, 0)
WINDOWS: list[Window] = [OPEN, CAUSAL, (0, 0), (2, 1), (1, -1), (-1, 2)]


@dataclass(frozen=True)
class Batch:
    """Lengths and tile sizes; ``cu_q`` and ``cu_k`` replace the cumulative lengths with lies."""

    q: tuple[int, ...] = ()
    k: tuple[int, ...] = ()
    used: tuple[int, ...] | None = None
    tail: int = 0
    spare_keys: int = 0
    window: Window = OPEN
    rows_per_query: int = 1
    tile_rows: int = 4
    tile_keys: int = 4
    cu_q: tuple[int, ...] | None = None
    cu_k: tuple[int, ...] | None = None

    @property
    def total_q(self) -> int:
        return sum(self.q) + self.tail

    @property
    def total_k(self) -> int:
        return sum(self.k) + self.spare_keys

    @property
    def cumulative(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (
            self.cu_q or tuple(accumulate(self.q, initial=0)),
            self.cu_k or tuple(accumulate(self.k, initial=0)),
        )

    @property
    def max_cost(self) -> int:
        keys = self.k if self.used is None else map(min, self.k, self.used)
        return -(-max(keys, default=0) // self.tile_keys)

    def plan(self) -> np.ndarray:
        cu_q, cu_k = (np.array(cu, dtype=np.int32) for cu in self.cumulative)
        used = None if self.used is None else np.array(self.used, dtype=np.int32)
        sizes = (self.rows_per_query, self.tile_rows, self.tile_keys)
        return _C.tile_schedule(cu_q, cu_k, used, self.total_q, self.total_k, *self.window, *sizes)

    def command(self, max_cost: int | None = None, max_tiles: int = -1) -> str:
        cu_q, cu_k = self.cumulative
        numbers = [len(cu_q) - 1, self.total_q, self.total_k, *self.window, self.rows_per_query]
        numbers += [self.tile_rows, self.tile_keys]
        numbers += [self.max_cost if max_cost is None else max_cost, max_tiles]
        numbers += [int(self.used is not None), *cu_q, *cu_k, *(self.used or ())]
        return "run " + " ".join(map(str, numbers))


def bucket_of(cost, max_cost: int):
    """The smallest shift that fits costs up to max_cost into the buckets."""
    limit = max(max_cost, 0)
    shift = max(0, limit.bit_length() - BUCKETS.bit_length() + 1)
    return np.minimum(cost, limit) >> shift


# --- brute force --------------------------------------------------------------------------------


@cache
def tiles_of(
    sq: int, sk: int, window: Window, rows_per_query: int, tile_rows: int, tile_keys: int
) -> list[list[int]]:
    """(tile, first row, last row, key begin, key end, cost) of a sequence, from a dense mask."""
    at = np.arange(sq)[:, None] + sk - sq
    key = np.arange(sk)[None, :]
    mask = np.ones((sq, sk), dtype=bool)
    if window[0] >= 0:
        mask &= key >= at - window[0]
    if window[1] >= 0:
        mask &= key <= at + window[1]
    mask = np.repeat(mask, rows_per_query, axis=0)
    tiles = []
    for tile, first in enumerate(range(0, len(mask), tile_rows)):
        rows = mask[first : first + tile_rows]
        seen = np.flatnonzero(rows.any(axis=0))
        keys = [int(seen[0]), int(seen[-1]) + 1] if len(seen) else [0, 0]
        cost = len(set((seen // tile_keys).tolist()))
        tiles.append([tile, first, first + len(rows) - 1, *keys, cost])
    return tiles


def expected(batch: Batch) -> list[list[int]]:
    """What the plan has to be, in its order; key ranges that hold no key read 0, 0."""
    keys = batch.k if batch.used is None else tuple(map(min, batch.k, batch.used))
    sizes = (batch.rows_per_query, batch.tile_rows, batch.tile_keys)
    listed = []
    for b, (sq, sk) in enumerate(zip((*batch.q, batch.tail), (*keys, 0), strict=True)):
        listed += [[b, *tile] for tile in tiles_of(sq, sk, batch.window, *sizes)]
    return sorted(listed, key=lambda tile: -int(bucket_of(tile[-1], batch.max_cost)))


def planned(batch: Batch) -> list[list[int]]:
    plan = batch.plan()
    assert plan.dtype == np.int32 and plan.shape[1:] == (7,)
    empty = plan[:, 4] >= plan[:, 5]
    plan[empty, 4:6] = 0
    return plan.tolist()


SIZES = list(product((1, 2), (1, 2, 3), (1, 2, 3)))  # rows per query, tile rows, tile keys


@pytest.mark.parametrize("window", WINDOWS)
def test_plan_of_every_short_list(window: Window):
    """All lists of up to three query lengths 0 to 6; key lengths, tails, used keys go along."""
    lists = [q for n in range(4) for q in product(range(7), repeat=n)]
    for number, q in enumerate(lists):
        k = tuple((3 * length + 2 * i + number // 7) % 7 for i, length in enumerate(q))
        used = (
            tuple((5 * length + i) % 7 for i, length in enumerate(k)) if number % 3 == 0 else None
        )
        for sizes in SIZES:
            batch = Batch(q, k, used, number % 5, number % 2, window, *sizes)
            assert planned(batch) == expected(batch), batch


@pytest.mark.parametrize("window", WINDOWS)
def test_plan_of_every_short_pair_of_lengths(window: Window):
    for q, k, sizes in product(range(7), range(7), SIZES):
        batch = Batch((q,), (k,), None, 0, 0, window, *sizes)
        plan = planned(batch)
        assert plan == expected(batch), batch
        rows = sorted(row for tile in plan for row in range(tile[2], tile[3] + 1))
        assert rows == list(range(q * batch.rows_per_query))


lengths = st.lists(st.tuples(st.integers(0, 90), st.integers(0, 150)), max_size=12)
sides = st.one_of(st.just(-1), st.integers(0, 160))


@settings(max_examples=60, deadline=None)
@given(lengths, st.integers(0, 40), st.data())
def test_plan_of_longer_lists(pairs: list[tuple[int, int]], tail: int, data: st.DataObject):
    q, k = tuple(zip(*pairs, strict=True)) if pairs else ((), ())
    used = data.draw(st.none() | st.tuples(*[st.integers(0, 160)] * len(k)))
    window = data.draw(st.tuples(sides, sides))
    sizes = data.draw(st.tuples(st.integers(1, 8), st.integers(1, 70), st.integers(1, 70)))
    batch = Batch(q, k, used, tail, 3, window, *sizes)
    assert planned(batch) == expected(batch)


@pytest.mark.parametrize("keys", [1023, 1024, 2047, 2048, 5000])
def test_costs_beyond_the_buckets_share_them(keys: int):
    lengths_q, lengths_k = (60, keys // 2), (keys, keys // 2)
    batch = Batch(lengths_q, lengths_k, window=(keys // 3, 0), tile_rows=1, tile_keys=1)
    plan = planned(batch)
    assert plan == expected(batch)
    assert len({tile[-1] for tile in plan}) > 50


def test_plan_at_the_limits_of_its_numbers():
    batch = Batch((INT_MAX,), (INT_MAX,), window=(INT_MAX, INT_MAX), tile_rows=2**30)
    last = INT_MAX - 1
    whole = [0, INT_MAX, 2**29]
    assert batch.plan().tolist() == [[0, 0, 0, 2**30 - 1, *whole], [0, 1, 2**30, last, *whole]]
    batch = replace(batch, window=(0, 0), tile_keys=INT_MAX)
    ranges = [[0, 2**30, 1], [2**30, INT_MAX, 1]]
    assert [tile[4:] for tile in batch.plan().tolist()] == ranges


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens_q": []}, r"cu_seqlens_q must have batch \+ 1 entries, got 0"),
        ({"cu_seqlens_q": [[0]]}, "cu_seqlens_q must have one dimension, got 2"),
        ({"cu_seqlens_k": [0]}, r"cu_seqlens_k must have as many .* \(2\), got 1"),
        ({"seqused_k": [1, 1]}, r"seqused_k must have batch entries \(1\), got 2"),
        ({"total_q": -1}, "total_q must be at least 0, got -1"),
        ({"total_k": -2}, "total_k must be at least 0, got -2"),
        ({"rows_per_query": 0}, "rows_per_query must be at least 1, got 0"),
        ({"tile_rows": 0}, "tile_rows must be at least 1, got 0"),
        ({"tile_keys": -3}, "tile_keys must be at least 1, got -3"),
        ({"total_q": 2**30, "rows_per_query": 2}, r"below 2\*\*31, got 2147483648"),
    ],
)
def test_what_the_plan_refuses(change: dict, message: str):
    call = {"cu_seqlens_q": [0, 3], "cu_seqlens_k": [0, 3], "seqused_k": None} | {
        **{"total_q": 3, "total_k": 3, "left": -1, "right": 0},
        **{"rows_per_query": 1, "tile_rows": 4, "tile_keys": 4},
        **change,
    }
    for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_k"):
        if call[name] is not None:
            call[name] = np.array(call[name], dtype=np.int32)
    with pytest.raises(ValueError, match=message):
        _C.tile_schedule(**call)


# --- the kernel, emulated -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if COMPILER is None:
        pytest.skip("needs a host C++ compiler")
    path = tmp_path_factory.mktemp("tile_schedule") / "tile_schedule_test"
    emulator = [p for p in sorted((ROOT / "csrc/emu").glob("*.cpp")) if p.name != "matrix.cpp"]
    sources = [*emulator, ROOT / "tests/cpp/tile_schedule_test.cpp"]
    kernel = ["-x", "c++", ROOT / "csrc/varlen/tile_schedule_launch.cu"]
    include = ["-DVARSTREAM_EMULATED", f"-I{ROOT / 'csrc'}"]
    subprocess.run([COMPILER, *FLAGS, *include, *sources, *kernel, "-o", path], check=True)
    return path


def run(binary: Path, schedule: str, commands: list[str]) -> list[np.ndarray]:
    """The numbers that answer each command."""
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    text = "\n".join(commands)
    result = subprocess.run(
        [binary, schedule], input=text, capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr[:4000]
    lines = result.stdout.splitlines()
    assert len(lines) == len(commands)
    return [np.array(line.split(), dtype=np.int64) for line in lines]


def random_lengths(seed: int, n: int, longest: int) -> tuple[int, ...]:
    generator = random.Random(seed)
    return tuple(generator.randint(0, longest) for _ in range(n))


PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 127, 257)
TINY = tuple(i % 3 for i in range(10_000))
GROUPED = {"rows_per_query": 4, "tile_rows": 6, "tile_keys": 5}
AWKWARD = {
    "none": Batch(),
    "only a tail": Batch(tail=9),
    "empty": Batch((0,), (0,)),
    "one": Batch((1,), (1,)),
    "all empty": Batch((0, 0, 0), (0, 5, 0), tail=2),
    "primes": Batch(PRIMES, PRIMES, window=CAUSAL, tail=3),
    "primes, grouped": Batch(PRIMES, PRIMES[::-1], window=(7, 2), **GROUPED),
    "keys in use": Batch(PRIMES, PRIMES, used=PRIMES[::-1], spare_keys=4, window=(9, -1)),
    "1023": Batch(random_lengths(1, 1023, 6), random_lengths(2, 1023, 60), tail=1),
    "1024": Batch(random_lengths(3, 1024, 6), random_lengths(4, 1024, 60), tail=1),
    "10,000 tiny": Batch(TINY, TINY, window=CAUSAL, tail=5, tile_rows=1),
    "one huge, many tiny": Batch((1,) * 500 + (20_000,) + TINY[:1500], (2,) * 500 + (20_000,)
                                 + TINY[:1500], window=CAUSAL, tile_rows=2, tile_keys=64),
    "over 1024 costs": Batch((3000, 50), (5000, 70), window=CAUSAL, tile_rows=1, tile_keys=1),
}  # fmt: skip


def check_against_plan(answer: np.ndarray, batch: Batch, max_cost: int) -> None:
    slots = answer.reshape(-1, 2)
    plan = batch.plan()
    assert len(plan) <= len(slots)
    used, unused = slots[: len(plan)], slots[len(plan) :]
    assert (unused == [-1, 0]).all()
    assert sorted(used.tolist()) == sorted(plan[:, :2].tolist())
    cost = {(b, tile): cost for b, tile, *_, cost in plan.tolist()}
    buckets = bucket_of(np.array([cost[b, tile] for b, tile in used.tolist()], int), max_cost)
    assert (np.diff(buckets) <= 0).all()
    if max_cost == batch.max_cost and not (batch.cu_q or batch.cu_k):
        assert buckets.tolist() == bucket_of(plan[:, 6], max_cost).tolist()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_kernel_lists_the_tiles_of_the_plan(binary: Path, schedule: str):
    answers = run(binary, schedule, [batch.command() for batch in AWKWARD.values()])
    for batch, answer in zip(AWKWARD.values(), answers, strict=True):
        check_against_plan(answer, batch, batch.max_cost)


@pytest.mark.parametrize("max_cost", [-(2**31), 0, 1, 3, 1023, 1024, INT_MAX])
def test_kernel_under_any_max_cost(binary: Path, max_cost: int):
    lengths_q, lengths_k = (*PRIMES, 900), (*PRIMES, 2000)
    batch = Batch(lengths_q, lengths_k, window=CAUSAL, tail=3, tile_rows=2, tile_keys=1)
    check_against_plan(run(binary, "1", [batch.command(max_cost)])[0], batch, max_cost)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_slots_past_max_tiles_are_not_written(binary: Path, schedule: str):
    batch = AWKWARD["1024"]
    plan = {(b, tile) for b, tile, *_ in batch.plan().tolist()}
    for max_tiles in (0, 1, 33, 1025, len(plan) - 1):
        (answer,) = run(binary, schedule, [batch.command(max_tiles=max_tiles)])
        tiles = set(map(tuple, answer.reshape(-1, 2).tolist()))
        assert len(tiles) == max_tiles and tiles <= plan


def test_rows_beyond_32_bits(binary: Path):
    """2**31 - 1 queries of 16 rows: tile t ends with query 2**21 (t + 1), key tile 2 (t + 1)."""
    sizes = {"rows_per_query": 16, "tile_rows": 2**25, "tile_keys": 2**20}
    batch = Batch((INT_MAX,), (INT_MAX,), window=CAUSAL, **sizes)
    tiles = run(binary, "1", [batch.command()])[0].reshape(-1, 2)
    tiles, unused = tiles[:1024], tiles[1024:]
    assert (unused == [-1, 0]).all()
    assert sorted(tiles.tolist()) == [[0, tile] for tile in range(1024)]
    assert (np.diff(bucket_of(2 * (tiles[:, 1] + 1), batch.max_cost)) <= 0).all()


def lying_batches() -> list[Batch]:
    true = Batch((7, 0, 12, 3), (9, 4, 0, 8), used=(3, 9, 1, 8), tail=2, spare_keys=1)
    wild = (-(2**31), -5, 0, 1, 10, 20, 24, 25, 1000, INT_MAX)
    lies = [
        replace(true, cu_q=(24, 18, 11, 7, 0)),
        replace(true, cu_q=(0, 24, 0, 24, 0), cu_k=(0, 22, 0, 22, 0)),
        replace(true, cu_q=(-3, -2, -1, 5, 9), cu_k=(-9, 5, 3, 22, 70)),
        replace(true, cu_q=(0, 7, 7, 40, 50), used=(-1, 99, INT_MAX, -(2**31))),
        replace(true, cu_q=(0, INT_MAX, -(2**31), INT_MAX, 0), tile_rows=1),
        # Each of 3000 sequences claims every row.
        Batch(tail=50, spare_keys=50, cu_q=(0, 50) * 1500 + (0,), cu_k=(0, 50) * 1500 + (0,)),
    ]
    generator = random.Random(0)
    for _ in range(40):
        n = generator.randint(1, 5)
        lies.append(
            Batch(
                tail=25,
                spare_keys=22,
                used=generator.choice([None, tuple(generator.choices(wild, k=n))]),
                window=generator.choice(WINDOWS),
                rows_per_query=generator.randint(1, 3),
                tile_rows=generator.randint(1, 5),
                tile_keys=generator.randint(1, 5),
                cu_q=tuple(generator.choices(wild, k=n + 1)),
                cu_k=tuple(generator.choices(wild, k=n + 1)),
            )
        )
    return lies


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_lengths_that_lie(binary: Path, schedule: str):
    """Nothing outside the buffers is touched, and the kernel clamps as the plan does."""
    batches = lying_batches()
    answers = run(binary, schedule, [batch.command(max_cost=6) for batch in batches])
    for batch, answer in zip(batches, answers, strict=True):
        check_against_plan(answer, batch, 6)


def splits(total: int, parts: int):
    """Every way to write total as a sum of so many parts, in order."""
    if parts == 1:
        yield (total,)
        return
    for first in range(total + 1):
        for rest in splits(total - first, parts - 1):
            yield (first, *rest)


def test_tile_slots_bound_every_split(binary: Path):
    cases = list(product(range(9), range(4), (1, 2, 3), (1, 2, 3, 5)))
    commands = ["slots " + " ".join(map(str, case)) for case in cases]
    big = f"slots {INT_MAX} {10**6} 128 64"
    *answers, large = run(binary, "1", [*commands, big])
    assert large.item() == INT_MAX * 2 + 10**6 + 1
    for (total, batch, rows_per_query, tile_rows), slots in zip(cases, answers, strict=True):
        counts = [
            sum(-(-part * rows_per_query // tile_rows) for part in parts)
            for parts in splits(total, batch + 1)
        ]
        assert max(counts) <= slots.item() <= min(counts) + batch + 1
