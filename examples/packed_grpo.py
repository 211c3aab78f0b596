"""Group-relative policy optimisation on packed samples, with a streamed backward.

    python examples/packed_grpo.py                    # about a minute on two cores
    python examples/packed_grpo.py --quick --check    # a few seconds, compared with plain autograd
    python examples/packed_grpo.py --model path/to/model --device cuda --dtype bfloat16

The task: continue `def name` to the end of the definition's line. A completion is worth 1 where
Python's own parser takes it as a function of at least `--parameters` parameters, else 0. Names
are those of the standard library's functions, whose real signatures teach the policy first
(`--warmup` steps). A step samples `--group` completions for each of `--prompts` names with
`generate`, from the streamed model itself, packs all of them without padding, and takes `--inner`
optimizer steps on these rows against the log-probabilities under the policy that sampled.
"""

import ast
import random
import time
import warnings

import torch
from _packed import compare, document, fixed_logprobs, pack, streamed_logprobs, warm_up
from _setup import Parser, load, optimizer_of, progress, show, update
from _text import encode, signatures, sources

from varstream import objectives

TASK = {"prompts": 8, "group": 8, "inner": 2, "length": 24, "parameters": 3}
RATES = {"learning_rate": 1e-3, "warmup_rate": 3e-3}
DEFAULTS = {"steps": 25, "warmup": 60, "tokens": 1024, "chunk_size": 256} | RATES | TASK
QUICK_TASK = {"prompts": 4, "length": 12, "parameters": 1, "corpus": 400_000, "warmup_rate": 1e-2}
QUICK = {"steps": 3, "tokens": 256, "chunk_size": 128} | QUICK_TASK
HELD_OUT = 64  # names
SHOWN = 3  # samples in the table


def reward(definition, parameters):
    """1.0 for one line that begins a function of so many parameters or more, else 0.0."""
    if "\n" in definition:
        return 0.0
    try:
        with warnings.catch_warnings(action="ignore"):  # such as of odd escapes in a default
            tree = ast.parse(definition + "\n    pass")
            compile(tree, "<sample>", "exec")  # refuses one name for two parameters; runs nothing
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return 0.0
    taken = tree.body[0].args
    return float(len(taken.posonlyargs + taken.args + taken.kwonlyargs) >= parameters)


@torch.no_grad()
def sample(model, tokenizer, prompts, length):
    """A completion (a list of tokens) of each prompt, at temperature 1, ended by the end token or
    cut at `length` tokens."""
    end = tokenizer.eos_token_id
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    batch = batch.to(model.device)
    model.eval()
    tokens = model.generate(
        **batch,
        max_new_tokens=length,
        do_sample=True,  # from the policy itself, nothing cut off or sharpened
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        pad_token_id=end,
        eos_token_id=end,
    )
    model.train()
    rows = tokens[:, batch["input_ids"].shape[1] :].tolist()
    return [row[: row.index(end) + 1] if end in row else row for row in rows]


def rewards_of(tokenizer, names, completions, parameters):
    """The reward of every completion (completions,); one without an end is worth nothing."""
    rewards = []
    for name, ids in zip(names, completions, strict=True):
        ended = ids[-1] == tokenizer.eos_token_id
        rewards.append(reward(name + tokenizer.decode(ids[:-1]), parameters) if ended else 0.0)
    return torch.tensor(rewards)


def collect(model, tokenizer, names, options):
    """One step's samples as packed rows with what the objective needs, and their mean reward."""
    names = [name for name in names for _ in range(options.group)]
    prompts = encode(tokenizer, names)
    completions = sample(model, tokenizer, prompts, options.length)
    rewards = rewards_of(tokenizer, names, completions, options.parameters)
    groups = rewards.view(-1, options.group)
    advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    documents = [
        [document(prompt, completion, advantages=advantage)]
        for prompt, completion, advantage in zip(
            prompts, completions, advantages.flatten().tolist(), strict=True
        )
    ]
    rows = pack(documents, options)
    for row in rows:
        row.constants["old_logp"] = fixed_logprobs(model, row)
    return rows, rewards.mean().item()


def objective_of(rows):
    """The loss of one of `rows`, such that the losses' sum is the mean over all their sequences."""
    sequences = sum(len(row.cu_seqlens) - 1 for row in rows)
    return lambda row, logp: objectives.grpo(
        logp, row.mask, row.cu_seqlens, normalizer=sequences, **row.constants
    )


def train(model, tokenizer, names, options):
    """The mean reward of every step, the trained tokens a second, and the last step's rows."""
    optimizer, rng = optimizer_of(model, options.learning_rate), random.Random(options.seed)
    rewards, tokens, seconds = [], 0, 0.0
    with progress("reinforcement", options.steps) as advance:
        for _ in range(options.steps):
            rows, mean = collect(model, tokenizer, rng.sample(names, options.prompts), options)
            objective, began = objective_of(rows), time.perf_counter()
            for _ in range(options.inner):
                for row in rows:
                    objective(row, streamed_logprobs(model, row)).backward()
                    tokens += len(row.target)
                update(model, optimizer)
            seconds += time.perf_counter() - began
            rewards.append(mean)
            advance(f"mean reward {mean:.2f}, {tokens / seconds:,.0f} tokens/s")
    return rewards, tokens / seconds, rows


def evaluate(model, tokenizer, names, options):
    """The mean reward of one sample a name, and the first of them as text."""
    completions = sample(model, tokenizer, encode(tokenizer, names), options.length)
    mean = rewards_of(tokenizer, names, completions, options.parameters).mean().item()
    return mean, [names[i] + tokenizer.decode(completions[i]) for i in range(SHOWN)]


def main(args=None):
    parser = Parser("Optimise a policy on packed samples, streamed.", DEFAULTS, QUICK)
    parser.number("--warmup", "steps on real signatures, before", least=0)
    parser.rate("--warmup-rate", "their learning rate")
    parser.number("--prompts", "names of a step")
    parser.number("--group", "completions of a name", least=2)
    parser.number("--inner", "optimizer steps on a step's samples")
    parser.number("--length", "tokens of a completion, at most")
    parser.number("--parameters", "that a function must have")
    options = parser.read(args)
    pairs = signatures(sources(options.seed, options.corpus))
    model, tokenizer = load(parser, options, [name + rest for name, rest in pairs])
    random.Random(options.seed).shuffle(pairs)
    names = list(dict.fromkeys(name for name, _ in pairs))
    known, new = names[HELD_OUT:], names[:HELD_OUT]
    longest = max(map(len, encode(tokenizer, names))) + options.length
    if options.tokens < longest:
        parser.error(f"--tokens must be at least {longest}, a prompt and its completion")
    if options.prompts > len(known):
        parser.error(f"--prompts must be at most {len(known)}, the names there are")

    real = [(name, rest) for name, rest in pairs if name not in set(new)]
    starts, ends = (encode(tokenizer, list(parts)) for parts in zip(*real, strict=True))
    signed = [
        [document([], start + rest + [tokenizer.eos_token_id])]
        for start, rest in zip(starts, ends, strict=True)
    ]
    warm_up(model, pack(signed, options), options.warmup, options.warmup_rate)
    before, samples_before = evaluate(model, tokenizer, new, options)
    rewards, speed, rows = train(model, tokenizer, known, options)
    after, samples_after = evaluate(model, tokenizer, new, options)

    fifth = max(1, options.steps // 5)
    first, last = sum(rewards[:fifth]) / fifth, sum(rewards[-fifth:]) / fifth
    table = [["trained names", first, last], ["names held out", before, after]]
    table += [["", samples_before[i], samples_after[i]] for i in range(SHOWN)]
    show(f"Mean reward, {options.steps} steps", ["", "before", "after"], table)
    print(f"training on samples: {speed:,.0f} tokens/s")
    compare(model, rows, objective_of(rows), options)
    return rewards, before, after


if __name__ == "__main__":
    main()
