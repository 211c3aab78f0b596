"""What attention allocates inside its operators, beside the results that a trace sees."""

from __future__ import annotations

from dataclasses import dataclass

from varstream.planner.trace import AttentionShape
from varstream.reference import attention

# ATen's CPU flash kernel: rows of a block by rows of the tile, and keys of a block.
_FLASH_BLOCKS, _FLASH_KEYS = ((768, 256), (192, 64), (0, 32)), 512
_BORDER = attention.FLASH_BORDER_ROWS
_SMALL = 112 << 10
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
    of scores at a window's border; else, and on other devices, blocks of scores alone.

    A tile has ``rows`` queries and ``keys`` keys; gradients of one tile live until the next one's
    are there.
    """

    def __init__(self, a: AttentionShape, itemsize: int, threads: int, flash: bool) -> None:
        self.a, self.itemsize, self.threads = a, itemsize, threads
        self.acc = max(4, itemsize)
        self.wide = itemsize < self.acc  # sums are in a wider dtype
        self.flash = flash and a.plain

    def forward(self, rows: int, spans: list[Span]) -> int:
        """A partial result beside the sum."""
        sums = rows * self.a.heads * self.a.value_dim * (self.acc - self.itemsize)
        return sums + max(self._forward_of(span) for span in spans)

    def backward(self, rows: int, spans: list[Span]) -> int:
        """Gradients of tiles beside their sums."""
        sums = rows * self.a.q_width * (self.acc - self.itemsize)
        sums += 3 * rows * self.a.heads * self.acc + _SMALL  # of dO O, LSE
        return sums + max(self._backward_of(span) for span in spans)

    def _forward_of(self, span: Span) -> int:
        a, border = self.a, min(span.rows, _BORDER)
        out = a.heads * (a.value_dim + 1) * self.acc  # bytes a row, with its LSE
        if self.flash and a.window < 0:
            rows = self._strip(span)
            inside = self._whole_tile(rows, 2, self._workspace(rows * self._group) // 2)
            return max(rows * out + inside, 4 * border * out)
        blocks = _DROPOUT if a.dropout else 2 if a.plain else 3
        rows, keys = self._block(span)
        return self._scores(rows, keys, blocks) + 8 * rows * keys + 3 * rows * out

    def _backward_of(self, span: Span) -> int:
        if self.flash and self.a.window < 0:
            return self._tiles(span)
        rows, keys = self._block(span)
        copies = 1 + self.wide
        if not self.flash:
            blocks = _DROPOUT if self.a.dropout else 5
            return self._scores(rows, keys, blocks) + self._copies(rows, keys, 1.25 * copies)
        tiles = 1 if span.rows <= _BORDER else 2  # the one before, in another block of rows
        scores = self._scores(rows, keys, 3) + self._copies(rows, keys, tiles)
        scores += keys * self.a.q_width * self.acc  # dK of each query's head
        scores += self.wide * (self._copies(rows, 0, 2) + self._copies(0, keys, 0.5))
        sums = self._scores(rows, keys, 2) + self._copies(span.rows, 0, 1 + 2 * self.wide)
        inner = max(0, self.a.window + 1 - rows)  # keys that all rows of a block see
        return max(scores, sums + self._copies(rows, keys, 1), self._pair(rows, inner, rows))

    def _workspace(self, rows: int) -> int:
        """Scores and their gradients for each thread of ATen's kernel."""
        block = next(size for least, size in _FLASH_BLOCKS if rows >= least) * _FLASH_KEYS
        return self.threads * block * (2 * self.acc + (2 * self.itemsize if self.wide else 0))

    def _scores(self, rows: int, keys: int, blocks: int) -> int:
        """So many blocks of scores at once."""
        return blocks * self.a.heads * rows * keys * self.acc

    def _copies(self, rows: int, keys: int, count: float) -> int:
        """Rows of Q or dO, keys and values or their gradients, in acc dtype."""
        return int(count * (rows * self.a.q_width + keys * self.a.kv_width)) * self.acc

    def _block(self, span: Span) -> tuple[int, int]:
        """Rows and keys of the largest block of scores: on the diagonal, or before the rows."""
        rows, window = min(span.rows, _BORDER), self.a.window
        before = span.before + span.rows - rows
        if 0 <= window < rows:
            return rows, rows + min(window, before)
        if self.flash:
            return rows, rows
        keys = before if window < 0 else min(before, window + 1 - rows)
        return rows, max(rows, min(keys, attention.SCORE_KEYS))

    def _strip(self, span: Span) -> int:
        """Rows that see the keys before them in one tile: all, or strips while fewer keys precede
        the rows than there are rows."""
        if span.before >= span.rows:
            return span.rows
        return max(min(span.rows, _BORDER), span.rows // 4)

    def _tiles(self, span: Span) -> int:
        rows, border = self._strip(span), min(span.rows, _BORDER)
        before = span.before if span.before >= span.rows else span.before + span.rows - border
        return self._pair(rows, before, border)

    def _pair(self, rows: int, keys: int, border: int) -> int:
        """Two tiles in a row: ``rows`` queries on at most FLASH_KEYS keys each, else one of them
        and a border tile; a wide sum converts what it adds."""
        first = min(keys, attention.FLASH_KEYS)
        second = min(keys - first, attention.FLASH_KEYS)
        next_rows, next_keys = (rows, second) if second else (border, border)
        one = self._gradients(rows, first)
        inside = self._whole_tile(rows, 4, self._workspace(rows * self._group))
        alone = one + max(inside, rows * self.a.q_width * self.acc * self.wide)
        again = inside if second else self._workspace(border)
        return max(alone, one + self._gradients(next_rows, next_keys) + again)

    @property
    def _group(self) -> int:
        """Query heads of a key head, whose rows run as one head's where no key is hidden."""
        return self.a.heads // self.a.kv_heads

    def _whole_tile(self, rows: int, copies: int, workspace: int) -> int:
        """ATen's workspace and so many copies of Q, the output and their gradients."""
        copies *= self._group > 1
        return copies * rows * self.a.q_width * self.itemsize + workspace

    def _gradients(self, rows: int, keys: int) -> int:
        return (rows * self.a.q_width + keys * self.a.kv_width) * self.itemsize
