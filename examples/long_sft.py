"""Fine-tune on documents of very different lengths, packed, with a streamed backward.

    python examples/long_sft.py                       # about a minute on two cores
    python examples/long_sft.py --quick --check       # a few seconds, compared with plain autograd
    python examples/long_sft.py --model path/to/model --device cuda --dtype bfloat16

Documents are files of Python's standard library, from a few tokens to many times a chunk; one
longer than a row is cut. Best-fit packing puts them into full rows without padding. A step takes
`--accumulate` rows, and each row's loss is divided by the trained tokens of all of them: every
token counts the same, in whatever row it stands.
"""

import time
from itertools import cycle, islice

from _packed import compare, fixed_logprobs, pack, streamed_logprobs
from _setup import Parser, load, optimizer_of, progress, show, update
from _text import encode, sources

from varstream import objectives

DEFAULTS = {"steps": 20, "tokens": 4096, "chunk_size": 512, "accumulate": 2, "learning_rate": 3e-3}
QUICK = {"steps": 4, "tokens": 512, "chunk_size": 64}


def objective_of(rows):
    """The loss of one of `rows`, such that the losses' sum is the mean over all their tokens."""
    trained = sum(row.mask.sum() for row in rows)
    return lambda row, logp: objectives.sft(logp, row.mask, normalizer=trained)


def train(model, rows, options):
    """The loss of every step, and the tokens a second."""
    optimizer, stream = optimizer_of(model, options.learning_rate), cycle(rows)
    losses, tokens, began = [], 0, time.perf_counter()
    with progress("training", options.steps) as advance:
        for _ in range(options.steps):
            group = list(islice(stream, options.accumulate))
            objective, total = objective_of(group), 0.0
            for row in group:
                loss = objective(row, streamed_logprobs(model, row))
                loss.backward()
                total += loss.item()
                tokens += len(row.target)
            update(model, optimizer)
            losses.append(total)
            speed = tokens / (time.perf_counter() - began)
            advance(f"loss {total:.3f}, {speed:,.0f} tokens/s")
    return losses, speed


def evaluate(model, rows):
    objective = objective_of(rows)
    return sum(objective(row, fixed_logprobs(model, row)).item() for row in rows)


def main(args=None):
    parser = Parser("Fine-tune on packed long documents, streamed.", DEFAULTS, QUICK)
    parser.number("--accumulate", "rows of an optimizer step")
    options = parser.read(args)
    texts = sources(options.seed, options.corpus)
    model, tokenizer = load(parser, options, texts)
    longest = min(options.tokens, getattr(model.config, "max_position_embeddings", options.tokens))
    documents = [
        {"input_ids": (ids + [tokenizer.eos_token_id])[:longest]}  # every token is trained
        for ids in encode(tokenizer, texts)
    ]
    lengths = sorted(len(document["input_ids"]) for document in documents)
    rows = pack([[document] for document in documents], options)
    if len(rows) < 2:
        parser.error(f"--tokens {options.tokens} is too much: the whole text is one row")
    held_out, rows = rows[:1], rows[1:]
    print(
        f"{len(lengths)} documents of {lengths[0]:,} to {lengths[-1]:,} tokens, median "
        f"{lengths[len(lengths) // 2]:,}; rows of {options.tokens:,}, "
        f"{sum(lengths) / (len(rows) + 1) / options.tokens:.1%} full"
    )

    before = evaluate(model, held_out)
    losses, speed = train(model, rows, options)
    after = evaluate(model, held_out)
    table = [["trained rows", losses[0], losses[-1]], ["a row held out", before, after]]
    show(f"Loss per token, {options.steps} steps", ["", "first", "last"], table)
    print(f"training: {speed:,.0f} tokens/s")
    longest_row = max(rows, key=lambda row: row.inputs["max_length_q"])
    few = [longest_row, *rows[: options.accumulate - 1]]
    compare(model, few, objective_of(few), options)
    return losses, before, after


if __name__ == "__main__":
    main()
