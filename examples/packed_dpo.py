"""Direct preference optimisation on packed pairs, with a streamed backward.

    python examples/packed_dpo.py                     # about a minute on two cores
    python examples/packed_dpo.py --quick --check     # a few seconds, compared with plain autograd
    python examples/packed_dpo.py --model path/to/model --device cuda --dtype bfloat16

Pairs come from the docstrings of Python's standard library. The prompt is a docstring's first
words, chosen the words that follow there, rejected the same words in random order: English word
order is what is preferred. The policy first learns the chosen texts (`--warmup` steps); as it is
then it is the reference, whose log-probabilities are computed once. Rows hold chosen and rejected
alternating, so that a pair is never apart.
"""

import random
import time
from itertools import cycle, islice

import torch
from _packed import compare, document, fixed_logprobs, pack, streamed_logprobs, warm_up
from _setup import Parser, load, optimizer_of, progress, show, update
from _text import docstrings, encode, sources
from torch.nn.functional import logsigmoid

from varstream import objectives

RATES = {"learning_rate": 2e-4, "warmup_rate": 3e-3}
DEFAULTS = {"steps": 40, "warmup": 60, "tokens": 2048, "chunk_size": 256} | RATES
QUICK = {"steps": 8, "warmup": 8, "tokens": 512, "chunk_size": 128, "learning_rate": 2e-3}
PROMPT, COMPLETION = 6, 24  # words, the latter at most
HELD_OUT = 0.1  # of the pairs
BETA = 0.1


def make_pairs(texts, tokenizer, options):
    """[chosen, rejected] of every beginning of a docstring whose order of words says something."""
    rng, pairs = random.Random(options.seed), []
    beginnings = (tuple(words[: PROMPT + COMPLETION]) for words in docstrings(texts))
    for words in dict.fromkeys(beginnings):  # each once: none is both trained and held out
        prompt, rest = list(words[:PROMPT]), list(words[PROMPT:])
        shuffled = rng.sample(rest, len(rest))
        if len(set(rest)) < 4 or shuffled == rest:
            continue
        parts = [" ".join(prompt), " " + " ".join(rest), " " + " ".join(shuffled)]
        prompt, *completions = encode(tokenizer, parts)
        pair = [document(prompt, completion) for completion in completions]
        if sum(len(part["input_ids"]) for part in pair) <= options.tokens:
            pairs.append(pair)
    rng.shuffle(pairs)
    return pairs


def objective(row, logp):
    return objectives.dpo(logp, row.mask, row.cu_seqlens, beta=BETA, **row.constants)


def add_reference(model, rows):
    """Keep the log-probs of the policy as it is: no second model is needed."""
    for row in rows:
        row.constants["ref_logp"] = fixed_logprobs(model, row)


def train(model, rows, options):
    """A row a step; the tokens a second."""
    optimizer = optimizer_of(model, options.learning_rate)
    tokens, began = 0, time.perf_counter()
    with progress("preferences", options.steps) as advance:
        for row in islice(cycle(rows), options.steps):
            loss = objective(row, streamed_logprobs(model, row))
            loss.backward()
            update(model, optimizer)
            tokens += len(row.target)
            speed = tokens / (time.perf_counter() - began)
            advance(f"loss {loss.item():.3f}, {speed:,.0f} tokens/s")
    return speed


def evaluate(model, rows):
    """Means over the pairs of `rows`, by name."""
    found = []
    for row in rows:
        logp = fixed_logprobs(model, row)
        rewards = BETA * row.sums(logp - row.constants["ref_logp"]).view(-1, 2)  # (pairs, 2)
        margin = rewards[:, 0] - rewards[:, 1]
        likelier = row.sums(logp).view(-1, 2)
        found.append(
            {
                "loss": -logsigmoid(margin),
                "margin": margin,
                "margins above 0": (1 + margin.sign()) / 2,  # half of those that are 0
                "reward of chosen": rewards[:, 0],
                "reward of rejected": rewards[:, 1],
                "chosen likelier": (likelier[:, 0] > likelier[:, 1]).float(),
            }
        )
    return {name: torch.cat([part[name] for part in found]).mean().item() for name in found[0]}


def main(args=None):
    parser = Parser("Optimise preferences on packed pairs, streamed.", DEFAULTS, QUICK)
    parser.number("--warmup", "steps on the chosen texts, before", least=0)
    parser.rate("--warmup-rate", "their learning rate")
    options = parser.read(args)
    texts = sources(options.seed, options.corpus)
    model, tokenizer = load(parser, options, texts)
    pairs = make_pairs(texts, tokenizer, options)
    kept = int(len(pairs) * HELD_OUT)
    if kept == 0:
        parser.error(f"--tokens {options.tokens} holds {len(pairs)} pairs of the text, too few")
    held_out, rows = pack(pairs[:kept], options), pack(pairs[kept:], options)
    print(f"{len(pairs)} pairs, {kept} of them held out; {len(rows)} rows of {options.tokens:,}")

    chosen = pack([[{"input_ids": pair[0]["input_ids"]}] for pair in pairs[kept:]], options)
    warm_up(model, chosen, options.warmup, options.warmup_rate)
    rows = rows[: options.steps]  # no step is for the others
    add_reference(model, rows + held_out)
    before = {"trained": evaluate(model, rows), "held out": evaluate(model, held_out)}
    speed = train(model, rows, options)
    after = {"trained": evaluate(model, rows), "held out": evaluate(model, held_out)}

    columns = ["mean over pairs", "trained: before", "after", "held out: before", "after"]
    table = [
        [name, *(when[k][name] for k in before for when in (before, after))]
        for name in after["trained"]
    ]
    show(f"{options.steps} steps, beta {BETA}", columns, table)
    print(f"training: {speed:,.0f} tokens/s")
    compare(model, rows[:2], objective, options)
    return before, after


if __name__ == "__main__":
    main()
