"""Rows of a chunk of the head on a GPU: the model, the budget, the shapes that count."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from varstream.cross_entropy.chunk_rule import (
    BUDGET,
    MOST,
    PEAK,
    STEP,
    call_seconds,
    chunk_rows,
    chunk_seconds,
)
from varstream.cross_entropy.products import ChunkBuffer
from varstream.cross_entropy.rows import select_rows

ROWS = st.integers(0, 70_000)
WIDTHS = st.integers(1, 17_000)
CLASSES = st.integers(1, 400_000)
ITEMSIZES = st.sampled_from([2, 4])
BUDGETS = st.sampled_from([1, 1 << 20, 64 << 20, BUDGET // 2, BUDGET, 8 * BUDGET])
many = settings(deadline=None, max_examples=150)


def buffer_bytes(rows, classes, itemsize):
    """Bytes of the buffer that the drivers make, without making it."""
    like = torch.empty(0, dtype=torch.bfloat16, device="meta")
    dtype = torch.float32 if itemsize == 4 else torch.bfloat16
    return ChunkBuffer(rows, classes, like, dtype).padded.nbytes


# --- the rule -------------------------------------------------------------------------------------


@many
@given(ROWS, WIDTHS, CLASSES, ITEMSIZES, BUDGETS)
def test_multiples_within_the_budget(rows, width, classes, itemsize, budget):
    chunk = chunk_rows(rows, width, classes, itemsize, budget)
    assert 1 <= chunk <= MOST
    assert chunk == 1 or buffer_bytes(chunk, classes, itemsize) <= budget
    if chunk % STEP:  # not even a step fits: as many as do
        assert chunk < STEP
        assert buffer_bytes(chunk + 1, classes, itemsize) > budget
    assert chunk < max(1, rows) + STEP  # no more than there are, to a step


@many
@given(ROWS, WIDTHS, CLASSES, ITEMSIZES, BUDGETS)
def test_no_choice_is_more_than_a_hundredth_faster(rows, width, classes, itemsize, budget):
    chunk = chunk_rows(rows, width, classes, itemsize, budget)
    if chunk % STEP or rows <= STEP:
        return
    ours = call_seconds(rows, chunk, width, classes, itemsize)
    for other in range(STEP, min(MOST, rows + STEP - 1) + 1, STEP):
        if buffer_bytes(other, classes, itemsize) > budget:
            break
        theirs = call_seconds(rows, other, width, classes, itemsize)
        assert ours <= 1.0101 * theirs
        # What is smaller would be slower than that: memory is not spent for nothing.
        assert other >= chunk or theirs > ours / 1.0101


def test_budget_of_an_odd_vocabulary():
    """Rows of the buffer are padded; the budget counts that."""
    classes = BUDGET // (1280 * 4)
    assert classes % 64 and 1280 * classes * 4 <= BUDGET < buffer_bytes(1280, classes, 4)
    assert buffer_bytes(chunk_rows(1280, 8192, classes), classes, 4) <= BUDGET


@pytest.mark.parametrize(
    "budget, rows", [(1, 1), (256 * 4, 1), (256 * 4 * 5, 5), (256 * 4 * 127, 127)]
)
def test_as_many_rows_as_fit(budget, rows):
    assert chunk_rows(10_000, 64, 256, 4, budget) == rows


# --- the model ------------------------------------------------------------------------------------


@many
@given(st.integers(1, 9000), st.integers(0, 500), WIDTHS, CLASSES, ITEMSIZES)
def test_more_rows_take_longer(rows, more, width, classes, itemsize):
    few = chunk_seconds(rows, width, classes, itemsize)
    assert few <= chunk_seconds(rows + more, width, classes, itemsize) * (1 + 1e-12)


@pytest.mark.parametrize("width", [896, 2304, 4096, 8192])
def test_a_row_past_a_tile_takes_longer(width):
    """A partly filled row of tiles counts whole."""
    for rows in range(STEP, MOST + 1, STEP):
        full = chunk_seconds(rows, width, 128_256)
        assert full <= chunk_seconds(rows + 1, width, 128_256) * (1 + 1e-12)


@many
@given(st.integers(1, 9000), WIDTHS, CLASSES, st.integers(0, 500))
def test_a_larger_head_takes_longer(rows, width, classes, more):
    seconds = chunk_seconds(rows, width, classes) * (1 - 1e-12)
    assert seconds <= chunk_seconds(rows, width + more, classes)
    assert seconds <= chunk_seconds(rows, width, classes + more)
    assert seconds >= chunk_seconds(rows, width, classes, 2) * (1 - 1e-12)


@many
@given(st.integers(1, 70_000), st.integers(1, 4096), WIDTHS, CLASSES)
def test_never_faster_than_its_products(rows, chunk, width, classes):
    floor = 3 * 2 * rows * width * classes / PEAK
    assert call_seconds(rows, chunk, width, classes) >= floor * (1 - 1e-12)


@many
@given(st.integers(1, 5000), st.integers(1, 4096))
def test_a_call_is_cut_as_the_walk_cuts_it(rows, chunk):
    """As many chunks as the model counts, the largest of the size it takes."""
    parts = list(select_rows(torch.ones(rows, dtype=torch.bool), rows).chunks(chunk))
    size = max(part.stop - part.start for part in parts)
    assert call_seconds(rows, chunk, 512, 9999) == len(parts) * chunk_seconds(size, 512, 9999)


# --- shapes that count ----------------------------------------------------------------------------

# rows, d, V, bytes of a logit: the chunk
SHAPES = {
    (8192, 4096, 128256, 4): 2048,  # 0.98 GiB
    (8192, 4096, 128256, 2): 2048,
    (8192, 2304, 256000, 4): 1024,  # all that 1 GiB takes
    (32768, 4096, 128256, 4): 2048,
    (8192, 4096, 262144, 4): 1024,
    (8192, 4096, 262144, 2): 2048,
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_chunks_of_known_heads(shape):
    rows, width, classes, itemsize = shape
    assert chunk_rows(*shape) == SHAPES[shape]
    assert buffer_bytes(SHAPES[shape], classes, itemsize) <= BUDGET


@pytest.mark.parametrize(
    "width, classes, bar", [(4096, 128256, 1.08), (2304, 256000, 1.10)], ids=["4096", "2304"]
)
def test_the_models_time_leaves_room_below_the_bar(width, classes, bar):
    """Chunking alone, without row kernels, must cost less than the bar allows."""
    floor = 3 * 2 * 8192 * width * classes / PEAK
    chunk = chunk_rows(8192, width, classes)
    assert call_seconds(8192, chunk, width, classes) < (1 + 0.6 * (bar - 1)) * floor


@pytest.mark.parametrize("rows", [8192, 16384, 65536])
@pytest.mark.parametrize("classes", [32_000, 100_000, 128_256])
def test_2048_to_4096_rows_where_memory_allows(rows, classes):
    """At width 4096; elsewhere waves of tiles may be full at fewer rows."""
    assert 2048 <= chunk_rows(rows, 4096, classes) <= 4096


def test_logits_in_half_the_bytes_double_the_rows_where_memory_binds():
    for classes in (262_144, 524_288, 1 << 20):
        wide, low = (chunk_rows(65_536, 4096, classes, size) for size in (4, 2))
        assert low == 2 * wide
