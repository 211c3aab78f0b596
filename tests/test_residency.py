"""Where the head's row kernels hold their rows (csrc/cross_entropy/residency.h): on H100 and A100
for the vocabularies of known models, and what holds for any row and device."""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
WORD, THREADS, STEP, RING = 16, 256, 2, 8
H100, A100, ADA = (227 << 10, 8), (163 << 10, 1), (99 << 10, 1)  # shared memory, cluster
FIXED = 96  # of the softmax without options and one target


class Case(NamedTuple):
    words: int
    once: int
    shared: int
    fixed: int
    rows: int  # side by side in a block
    cluster: int


Residency = tuple[int, int, int]  # blocks, slots of a thread, whether they hold the row
Answer = Callable[[Iterable[Case]], list[Residency]]


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory) -> Answer:
    """What residency_of says for each case."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    program = tmp_path_factory.mktemp("residency") / "residency"
    source = ROOT / "tests/cpp/residency_test.cpp"
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}"]
    subprocess.run([compiler, *flags, source, "-o", program], check=True)

    def ask(cases: Iterable[Case]) -> list[Residency]:
        lines = "".join(" ".join(map(str, case)) + "\n" for case in cases)
        result = subprocess.run(program, input=lines, capture_output=True, text=True, check=True)
        first, *rest = result.stdout.splitlines()
        assert first == f"{WORD} {THREADS} {STEP} {RING}"
        return [(int(a), int(b), int(c)) for a, b, c in map(str.split, rest)]

    return ask


RING_OF_ONE = (1, RING, 0)
# (device, classes, bytes of a logit, rows side by side): what holds the row.
EXPECTED = {
    (H100, 32000, 2, 1): (1, 16, 1),
    (H100, 32000, 4, 1): (2, 16, 1),
    (H100, 128256, 2, 1): (4, 16, 1),
    (H100, 128256, 4, 1): (8, 16, 1),
    (H100, 256000, 2, 1): (8, 16, 1),
    (H100, 256000, 4, 1): (8, 32, 1),  # one block on an SM
    (A100, 32000, 2, 1): (1, 16, 1),
    (A100, 32000, 4, 1): (1, 32, 1),  # one block on an SM
    (A100, 128256, 2, 1): RING_OF_ONE,
    (A100, 128256, 4, 1): RING_OF_ONE,
    (A100, 256000, 2, 1): RING_OF_ONE,
    (A100, 256000, 4, 1): RING_OF_ONE,
    # The distillation holds a student's and a teacher's row.
    (H100, 32000, 4, 2): (4, 8, 1),
    (H100, 128256, 4, 2): (8, 16, 1),  # one block on an SM
    (H100, 256000, 4, 2): RING_OF_ONE,
    (A100, 32000, 4, 2): RING_OF_ONE,
}


def test_known_vocabularies(answer: Answer):
    def case(device: tuple[int, int], classes: int, size: int, rows: int) -> Case:
        return Case(-(-classes * size // WORD), 0, device[0], FIXED, rows, device[1])

    found = answer(case(*key) for key in EXPECTED)
    assert dict(zip(EXPECTED, found, strict=True)) == EXPECTED


def some_cases(seed: int, number: int) -> list[Case]:
    chosen = random.Random(seed)
    edges = [b * THREADS * STEP * s for b in (1, 2, 4, 8) for s in (1, 2, 5, 8, 9, 28)]
    cases = []
    for _ in range(number):
        shared, _ = chosen.choice([H100, A100, ADA, (chosen.randrange(40 << 10, 256 << 10), 1)])
        words = chosen.choice([chosen.choice(edges) + chosen.randint(-1, 1), 1, 2, 3])
        if chosen.random() < 0.5:
            words = chosen.randrange(1, 80000)
        fixed, rows = chosen.choice([16, FIXED, 336, 4432]), chosen.choice([1, 2])
        once, cluster = chosen.random() < 0.1, chosen.choice([1, 2, 4, 8])
        cases.append(Case(words, int(once), shared, fixed, rows, cluster))
    return cases


def needed(case: Case, blocks: int) -> int:
    """Shared bytes of a block where ``blocks`` share a row, whole steps for each thread."""
    share = -(-case.words // blocks)
    steps = -(-share // (THREADS * STEP))
    return case.fixed + case.rows * steps * STEP * THREADS * WORD


def test_what_holds_for_any_row(answer: Answer):
    cases = some_cases(0, 5000)
    for case, (blocks, slots, kept) in zip(cases, answer(cases), strict=True):
        assert blocks in (1, 2, 4, 8) and blocks <= case.cluster
        powers = [b for b in (1, 2, 4, 8) if b <= case.cluster]
        half = (case.shared + 1024) // 2 - 1024
        if not kept:
            assert (blocks, slots) == (1, RING)
            assert case.once or all(needed(case, b) > case.shared for b in powers)
            continue
        assert not case.once
        # The slots hold the largest share of a block, as the kernel cuts a row.
        cuts = [case.words * rank // blocks for rank in range(blocks + 1)]
        largest = max(b - a for a, b in zip(cuts, cuts[1:], strict=False))
        assert slots >= -(-largest // THREADS) and slots % STEP == 0
        assert slots <= -(-largest // THREADS) + STEP - 1
        bytes_used = case.fixed + case.rows * slots * THREADS * WORD
        assert bytes_used == needed(case, blocks) <= case.shared
        # The fewest blocks that leave room for a second one on the SM, else the fewest at all.
        roomy = [b for b in powers if needed(case, b) <= half]
        fitting = [b for b in powers if needed(case, b) <= case.shared]
        assert blocks == (roomy or fitting)[0]


def test_two_blocks_of_half_fit_an_sm(answer: Answer):
    """An SM of sm_90 has 228 KiB, of which each block takes 1 KiB besides its own."""
    cases = [Case(words, 0, H100[0], FIXED, 1, 8) for words in range(1, 40000, 7)]
    for case, (blocks, slots, kept) in zip(cases, answer(cases), strict=True):
        assert kept and 2 * (needed(case, blocks) + 1024) <= 228 << 10
        assert slots * THREADS * WORD < 114 << 10
