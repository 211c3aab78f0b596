"""What attention allocates inside its operators, beside the results that a trace sees."""

from __future__ import annotations

from dataclasses import dataclass

from varstream.planner.trace import AttentionShape
from varstream.reference import attention

_FLASH_Q, _FLASH_K = 256, 512  # blocks of ATen's CPU flash kernel
_BORDER = attention.FLASH_BORDER_ROWS
_DROPOUT = 8  # blocks of scores that exist at once while their random numbers are drawn


@dataclass(frozen=True)
class Span:
    """Rows of a chunk in one document and the document's keys before them."""

    rows: int
    before: int


def spans(tokens: int, longest: int, chunk: int) -> list[Span]:
    """The spans of any chunk that can need the most; a chunk has at most ``chunk`` rows."""
    rows = min(chunk, tokens)
    if longest == tokens:  # one document: its first chunk, its last, and the last full one
        begin = (tokens - 1) // chunk * chunk
        found = [Span(rows, 0), Span(tokens - begin, begin)]
        return found + ([Span(chunk, begin - chunk)] if begin > chunk else [])
    # Chunk edges fall anywhere: the worst split of the longest document. In strips, or whole at
    # the corners of what is linear piece by piece in the rows.
    rows = min(rows, longest)
    whole, tile = min(rows, longest // 2), attention.FLASH_KEYS
    corners = {whole, longest - tile, longest - tile - 1, longest - 2 * tile}
    found = [Span(rows, 0), Span(rows, max(0, min(rows - 1, longest - rows)))]
    return found + [Span(r, longest - r) for r in sorted(corners) if 0 < r <= whole]


def cuda_forward(a: AttentionShape, rows: int) -> int:
    """Work lists: 32 bytes for each block of queries and head, at most."""
    return 32 * a.heads * (rows // 64 + 2)


def cuda_backward(a: AttentionShape, rows: int) -> int:
    """dQ in float32, two statistics a row and head, a copy of dO in the kernel's layout."""
    return rows * (4 * a.q_width + 8 * a.heads + 2 * a.heads * a.value_dim) + cuda_forward(a, rows)


class Composed:
    """The reference operators: on the CPU flash tiles where nothing modifies the scores, and blocks
    of scores at a window's border; else, and on other devices, blocks of scores alone."""

    def __init__(self, a: AttentionShape, itemsize: int, threads: int, flash: bool) -> None:
        self.a, self.itemsize, self.threads = a, itemsize, threads
        self.acc = max(4, itemsize)
        self.flash = flash and a.plain

    def forward(self, rows: int, spans: list[Span]) -> int:
        """A partial result beside the sum, which is in acc dtype."""
        sums = rows * self.a.heads * self.a.value_dim * (self.acc - self.itemsize)
        return sums + max(self._forward_of(span) for span in spans)

    def backward(self, rows: int, spans: list[Span]) -> int:
        """Tiles of dQ, dK, dV, of one and of the one before; dQ in acc dtype."""
        sums = rows * self.a.q_width * (self.acc - self.itemsize)
        return sums + max(self._backward_of(span) for span in spans)

    def _forward_of(self, span: Span) -> int:
        a, rows = self.a, min(span.rows, _BORDER)
        if not self.flash:
            blocks = _DROPOUT if a.dropout else 3
            return self._scores(*self._block(span), blocks) + 6 * rows * a.heads * a.value_dim * 4
        if a.window < 0:  # strips where fewer keys precede the rows than there are rows
            rows = span.rows if span.before >= span.rows else max(rows, span.rows // 4)
        part = rows * a.heads * (a.value_dim * self.itemsize + self.acc)
        if a.window < 0:
            return part + self._workspace(span)
        return 3 * part + self._scores(*self._border(span), 2.25)

    def _backward_of(self, span: Span) -> int:
        if not self.flash:
            rows, keys = self._block(span)
            return self._scores(rows, keys, _DROPOUT if self.a.dropout else 5) + self._copies(
                rows, keys, 1.5 if self.itemsize == self.acc else 2.5
            )
        tiles = self._tiles(span) + self._workspace(span)
        if self.a.window < 0:
            return tiles
        rows, keys = self._border(span)
        copies = self._copies(rows, keys, 2 if self.itemsize == self.acc else 5.5)
        return max(tiles, self._scores(rows, keys, 3) + 10 * rows * keys + copies)

    def _workspace(self, span: Span) -> int:
        """A block of scores for each thread of ATen's kernel."""
        longest = span.rows + span.before
        block = min(_FLASH_Q, longest) * min(_FLASH_K, longest)
        copies = 2 * self.acc + (2 * self.itemsize if self.itemsize < self.acc else 0)
        return self.threads * block * copies

    def _scores(self, rows: int, keys: int, blocks: float) -> int:
        """So many blocks of scores at once."""
        return int(blocks * self.a.heads * rows * keys * self.acc)

    def _copies(self, rows: int, keys: int, count: float) -> int:
        """Rows of Q and dO, keys and values and their gradients, in acc dtype."""
        return int(count * (rows * self.a.q_width + keys * self.a.kv_width) * self.acc)

    def _block(self, span: Span) -> tuple[int, int]:
        """Rows and keys of the largest block of scores: before the rows, or on the diagonal."""
        rows = min(span.rows, attention.SCORE_ROWS)
        window, before = self.a.window, span.before + span.rows - rows
        if 0 <= window < rows:
            return rows, min(rows + window, rows + before)
        keys = before if window < 0 else min(before, window + 1 - rows)
        return rows, max(rows, min(keys, attention.SCORE_KEYS))

    def _border(self, span: Span) -> tuple[int, int]:
        """Rows and keys of a tile that a window's border runs through."""
        rows, window = min(span.rows, _BORDER), self.a.window + 1
        return rows, rows + (window if window < rows else 0)

    def _tiles(self, span: Span) -> int:
        rows, before = span.rows, span.before
        border = min(rows, _BORDER)
        if self.a.window >= 0:
            return self._pair(border, min(self.a.window + 1, rows + before), border)
        if before >= rows:
            return self._pair(rows, before, border)
        # in strips while fewer keys precede the rows than there are rows
        return self._pair(max(border, rows // 4), before + rows - border, border)

    def _pair(self, rows: int, keys: int, border: int) -> int:
        """Two tiles in a row: ``rows`` queries on at most FLASH_KEYS keys each, else one of them
        and a border tile."""
        first = min(keys, attention.FLASH_KEYS)
        second = min(keys - first, attention.FLASH_KEYS)
        q = rows + (rows if second else border)
        keys = first + max(second, border)
        return (q * self.a.q_width + keys * self.a.kv_width) * self.itemsize
