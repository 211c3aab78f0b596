"""The recipes' command line, model, progress bar and table."""

import argparse
from contextlib import contextmanager
from pathlib import Path

import torch
from _text import train_tokenizer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen3Config
from transformers.utils import logging

import varstream as vs

SIZES = {"width": 128, "layers": 4, "vocab": 2048, "corpus": 4_000_000}  # corpus in characters
QUICK = {"width": 32, "layers": 2, "vocab": 300, "corpus": 100_000}


class Parser(argparse.ArgumentParser):
    """The options of every recipe; `--quick` puts other defaults in place; an error is one line."""

    def __init__(self, description, defaults, quick):
        super().__init__(description=description)
        self.set_defaults(**SIZES, **defaults)
        self.quick, self.numbers, self.rates = QUICK | quick, {}, []
        self.number("--steps", "optimizer steps")
        self.number("--tokens", "of a packed row, at most")
        self.number("--chunk-size", "rows of a layer's chunk in the backward")
        self.rate("--learning-rate", "of AdamW")
        self.add_argument("--model", help="a causal language model's folder, name or config.json")
        self.add_argument("--device", default="cpu", help="where to run, such as cuda")
        self.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float64"])
        self.add_argument("--seed", type=int, default=0)
        self.add_argument("--check", action="store_true", help="compare with plain autograd")
        self.add_argument("--quick", action="store_true", help="tiny sizes, a few seconds")

    def number(self, name, words, least=1):
        """An option that is a whole number."""
        self.add_argument(name, type=int, help=f"{words} ({self.get_default(_key(name))})")
        self.numbers[name] = least

    def rate(self, name, words):
        """An option that is a number above 0 and below 1."""
        self.add_argument(name, type=float, help=f"{words} ({self.get_default(_key(name))})")
        self.rates.append(name)

    def error(self, message):
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")

    def read(self, args):
        options = self.parse_args(args)
        if options.quick:
            self.set_defaults(**self.quick)
            options = self.parse_args(args)
        for name, least in self.numbers.items():
            if (value := getattr(options, _key(name))) < least:
                self.error(f"{name} must be at least {least}, got {value}")
        for name in self.rates:
            if not 0 < (value := getattr(options, _key(name))) < 1:
                self.error(f"{name} must be above 0 and below 1, got {value}")
        try:
            torch.empty(0, device=options.device)
        except (RuntimeError, AssertionError) as error:
            self.error(f"--device {options.device} can't be used: {error}")
        torch.manual_seed(options.seed)
        return options


def _key(name):
    return name.removeprefix("--").replace("-", "_")


def load(parser, options, texts):
    """The streamed model and its tokenizer: a small random Qwen3 if no `--model` is given.

    A configuration alone gives random weights; without a tokenizer one is learned from `texts`.
    """
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    name, dtype = options.model, getattr(torch, options.dtype)
    folder = Path(name or ".")
    try:
        config = AutoConfig.from_pretrained(name) if name else small_config(options)
        if name and (any(folder.glob("*.safetensors")) or not folder.exists()):
            model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        else:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if name and ((folder / "tokenizer.json").exists() or not folder.exists()):
            tokenizer = AutoTokenizer.from_pretrained(name)
        else:
            tokenizer = train_tokenizer(texts, min(options.vocab, config.vocab_size))
        if len(tokenizer) > config.vocab_size:
            raise ValueError(f"has {config.vocab_size} tokens, its tokenizer {len(tokenizer)}")
        if tokenizer.eos_token is None:
            raise ValueError("has a tokenizer without an end token")
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        model = vs.stream(model.train().to(options.device), chunk_size=options.chunk_size)
    except (OSError, ValueError) as error:  # not there, broken, or not one that streams
        parser.error(f"--model {name}: {str(error).splitlines()[0]}")
    return model, tokenizer


def small_config(options):
    return Qwen3Config(
        vocab_size=options.vocab,
        hidden_size=options.width,
        intermediate_size=3 * options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=options.width // 4,
        max_position_embeddings=options.tokens,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )


def optimizer_of(model, rate):
    return torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)


def update(model, optimizer):
    """An optimizer step with clipped gradients, which are gone afterwards."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


@contextmanager
def progress(what, steps):
    """A bar on stderr; what it yields ends a step, with news."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    news = TextColumn("{task.fields[news]}")
    with Progress(*columns, news, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=steps, news="")
        yield lambda text: bar.update(task, advance=1, news=text)


def show(title, columns, rows):
    """A table on stdout; numbers have three digits after the point."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for name, *values in rows:
        table.add_row(name, *(f"{x:.3f}" if isinstance(x, float) else str(x) for x in values))
    Console().print(table)
