"""Real text that comes with Python, for the recipes: the standard library's own sources.

Whole files (very unequal lengths), docstrings as words, one-line function signatures; and a
byte-level BPE tokenizer learned from any of them.
"""

import ast
import random
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SKIPPED = {"__pycache__", "dist-packages", "idlelib", "lib2to3", "site-packages", "test", "tests"}
SIGNATURE = re.compile(r"^ *def (\w+)(\(.*\)[^#\n]*:)$", re.MULTILINE)
END = "<|end|>"


def sources(seed: int, limit: int) -> list[str]:
    """Files of the standard library in random order, until they hold `limit` characters; none that
    would be much of them."""
    folder = Path(sysconfig.get_path("stdlib"))
    paths = [p for p in folder.rglob("*.py") if not SKIPPED & set(p.relative_to(folder).parts)]
    paths.sort()
    random.Random(seed).shuffle(paths)
    texts, total = [], 0
    for path in paths:
        text = path.read_text(encoding="utf-8", errors="replace")
        if text.strip() and len(text) <= limit // 32:
            texts.append(text)
            total += len(text)
        if total >= limit:
            break
    return texts


def docstrings(texts: list[str]) -> Iterator[list[str]]:
    """The words of every docstring of a module, class or function."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for text in texts:
        with warnings.catch_warnings(action="ignore"):  # of the sources themselves
            tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(node, kinds):
                yield (ast.get_docstring(node) or "").split()


def signatures(texts: list[str]) -> list[tuple[str, str]]:
    """Different one-line definitions as ("def name", "(parameters):"), in the order of the text."""
    found = dict.fromkeys(match.groups() for text in texts for match in SIGNATURE.finditer(text))
    return [(f"def {name}", rest) for name, rest in found]


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with one token of its own that ends a document and pads."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def encode(tokenizer, texts: list[str]) -> list[list[int]]:
    """The tokens of pieces of text, without any that begin or end a document."""
    return tokenizer(texts, add_special_tokens=False)["input_ids"]
