"""Real documents as token sequences: the standard library's sources, or the user's text files."""

from __future__ import annotations

import os
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from varstream.demo.settings import DemoError, Settings

SKIPPED = {"__pycache__", "dist-packages", "idlelib", "lib2to3", "site-packages", "test", "tests"}
START = "<|document|>"
BYTES_PER_TOKEN = 16  # no more than this is read per token of the maximum length
# With less a few steps learn the text by heart: gradients vanish, and so does what a difference is
# relative to.
LEAST_TOKENS = 64
LEAST_DIFFERENT = 16
LEAST_LENGTH = 8  # of a compared document: shorter ones hardly attend to anything


@dataclass(frozen=True)
class Corpus:
    """Tokenized documents, each a sequence of its own that begins with a start token."""

    source: str
    documents: list[Tensor]  # int64 (length,), on the CPU
    vocab_size: int
    cut: int  # documents longer than the maximum length

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(document) for document in self.documents])

    def statistics(self) -> dict[str, float]:
        """The corpus table: numbers of documents and tokens, how lengths spread."""
        lengths = self.lengths
        return {
            "documents": len(lengths),
            "tokens": int(lengths.sum()),
            "median length": int(np.median(lengths)),
            "90 % are below": int(np.quantile(lengths, 0.9)),
            "longest (cut there)" if self.cut else "longest": int(lengths.max()),
            "fill if padded to the longest": float(lengths.mean() / lengths.max()),
        }

    def joined(self, length: int) -> Tensor:
        """One document of ``length`` tokens: the corpus end to end, repeated when too short."""
        tokens = torch.cat(self.documents)
        return tokens.repeat(-(-length // len(tokens)))[:length]

    def sample(self, count: int, padded_tokens: int) -> list[Tensor]:
        """Documents at evenly spaced quantiles of length, fewer where their padded batch is large.

        So the sample spreads as the corpus does: no luck of the draw, no choosing by hand.
        """
        ordered = sorted(self.documents, key=len)
        for number in range(min(count, len(ordered)), 0, -1):
            picked = [ordered[int(len(ordered) * (i + 0.5) / number)] for i in range(number)]
            if number * len(picked[-1]) <= padded_tokens:
                break
        random.Random(0).shuffle(picked)
        return picked


def load_corpus(settings: Settings) -> Corpus:
    """Read, train a byte-level BPE tokenizer on what was read, tokenize and cut.

    Raises:
        DemoError: nothing readable, or too little to learn from.
    """
    if settings.data is None:
        source = f"standard library of Python {sysconfig.get_python_version()}"
        paths = [path for path in _files(_stdlib(), SKIPPED) if path.suffix == ".py"]
    else:
        source = settings.data.name or "the given folder"
        if not settings.data.exists():
            raise DemoError(
                f"--data {settings.data} doesn't exist; give a text file or a folder of them"
            )
        paths = [settings.data] if settings.data.is_file() else list(_files(settings.data, set()))
    random.Random(settings.seed).shuffle(paths)
    texts = _read(paths, settings)
    if not texts:
        looked = f"{len(paths)} file{'' if len(paths) == 1 else 's'} looked at"
        raise DemoError(
            f"no readable UTF-8 text in {settings.data or source} ({looked}); "
            "give --data a text file or a folder of them"
        )
    corpus = _tokenize(source, texts, settings)
    _check_enough(corpus, settings)
    return corpus


def _check_enough(corpus: Corpus, settings: Settings) -> None:
    """Refuse a corpus whose gradients would say nothing; start tokens don't count."""
    tokens = torch.cat([document[1:] for document in corpus.documents])
    different = len(tokens.unique())
    if len(tokens) < LEAST_TOKENS or different < LEAST_DIFFERENT:
        raise DemoError(
            f"{corpus.source} is too little text: {len(tokens):,} "
            f"token{'' if len(tokens) == 1 else 's'}, {different:,} different; "
            f"give --data at least {LEAST_TOKENS} tokens, {LEAST_DIFFERENT} different "
            "(a page of prose is enough)"
        )
    longest = max(map(len, corpus.sample(settings.compared, settings.compared_tokens)))
    if longest < LEAST_LENGTH:
        raise DemoError(
            f"{corpus.source}: its documents are too short: the longest of those compared has "
            f"{longest} tokens; give --data documents of at least {LEAST_LENGTH}"
        )


def _stdlib() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _files(folder: Path, skipped: set[str]) -> Iterator[Path]:
    """All files below, hidden ones and those in ``skipped`` folders left out, in sorted order."""
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if f not in skipped and not f.startswith("."))
        yield from (Path(root, name) for name in sorted(names) if not name.startswith("."))


def _read(paths: list[Path], settings: Settings) -> list[str]:
    """Texts of the readable files, in order, until the corpus is as large as it may be."""
    texts: list[str] = []
    total = 0
    for path in paths:
        text = _read_text(path, settings.max_length * BYTES_PER_TOKEN)
        if text is not None:
            texts.append(text)
            total += len(text)
        if len(texts) == settings.max_documents or total >= settings.max_bytes:
            break
    return texts


def _read_text(path: Path, limit: int) -> str | None:
    """At most ``limit`` bytes of a text file; None for what is blank, binary or unreadable."""
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError:
        return None
    if b"\0" in data:
        return None
    try:
        text = data[:limit].decode("utf-8")
    except UnicodeDecodeError as error:
        if len(data) <= limit or error.start < limit - 3:
            return None
        text = data[: error.start].decode("utf-8")  # the cut fell inside a character
    return text if text.strip() else None


def _tokenize(source: str, texts: list[str], settings: Settings) -> Corpus:
    tokenizer = _train_tokenizer(texts, settings.vocab_size)
    start = tokenizer.token_to_id(START)
    documents, cut = [], 0
    for encoding in tokenizer.encode_batch(texts):
        ids = [start, *encoding.ids]
        cut += len(ids) > settings.max_length
        documents.append(torch.tensor(ids[: settings.max_length]))
    return Corpus(source, documents, tokenizer.get_vocab_size(), cut)


def _train_tokenizer(texts: list[str], vocab_size: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[START],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
