"""Documents as packed rows, their log-probabilities streamed and dense, and the check of one
against the other."""

from dataclasses import dataclass
from itertools import cycle, islice, pairwise

import torch
from _setup import optimizer_of, progress, update
from torch import Tensor
from torch.nn.functional import pad

import varstream as vs
from varstream import batching, objectives
from varstream.testing import float64_twin, peak_memory, relative_error, worst_gradient

IGNORED = -100
TOLERANCE = 1e-10


def document(prompt, completion, **constants):
    """Tokens of which only the completion's are trained; `constants` hold for each of them."""
    ids = prompt + completion
    columns = {name: [value] * len(ids) for name, value in constants.items()}
    return {"input_ids": ids, "labels": [IGNORED] * len(prompt) + completion, **columns}


@dataclass
class Row:
    """Documents end to end, N tokens."""

    inputs: dict  # of the model's forward: input_ids and position_ids (1, N), cu_seq_lens_q, ...
    target: Tensor  # (N,) what each token predicts: the next one of its document, or -100
    constants: dict  # of the objective, by name, each (N,)

    @property
    def mask(self):  # (N,)
        return self.target != IGNORED

    @property
    def cu_seqlens(self):  # (documents + 1,)
        return self.inputs["cu_seq_lens_q"]

    def sums(self, values):
        """values (N,) added up over each document's trained tokens, (documents,)."""
        parts = values.masked_fill(~self.mask, 0.0).split(self.cu_seqlens.diff().tolist())
        return torch.stack([part.sum() for part in parts])


def packed_row(documents, device):
    names = documents[0].keys() - {"input_ids", "labels"}
    inputs = batching.PackedCollator(extra=sorted(names))(documents)
    inputs = {k: x.to(device) if isinstance(x, Tensor) else x for k, x in inputs.items()}
    constants = {name: inputs.pop(name)[0] for name in names}
    labels = inputs.pop("labels")[0]  # -100 at the first token of every document
    return Row(inputs, pad(labels[1:], (0, 1), value=IGNORED), constants)


def pack(groups, options):
    """Rows of at most `options.tokens`, nearly all of them full, in random order. The documents of
    a group stay together, in their order."""
    lengths = [sum(len(document["input_ids"]) for document in group) for group in groups]
    packing = batching.best_fit_decreasing(lengths, options.tokens).shuffled(options.seed)
    return [
        packed_row([document for i in bin for document in groups[i]], options.device)
        for bin in packing.bins
    ]


def streamed_logprobs(model, row):
    """Each token's log-probability of its target (N,), 0 where it has none. Logits exist a chunk
    at a time, and the layers' backward runs chunk by chunk."""
    hidden = model.get_decoder()(**row.inputs, use_cache=False).last_hidden_state[0]  # (N, d)
    head, config = model.get_output_embeddings(), model.config
    return vs.token_logprobs(
        *(hidden, head.weight, row.target),
        linear_bias=head.bias,
        softcap=getattr(config, "final_logit_softcapping", None) or 0.0,  # Gemma
        logit_scale=1.0 / getattr(config, "logits_scaling", 1.0),  # Granite
    )


def fixed_logprobs(model, row):
    """The same as constants, dropout off."""
    training = model.training
    with torch.no_grad():
        logp = streamed_logprobs(model.eval(), row)
    model.train(training)
    return logp


def warm_up(model, rows, steps, rate):
    """Plain next-token training, a row a step."""
    optimizer = optimizer_of(model, rate)
    with progress("warm-up", steps) as advance:
        for row in islice(cycle(rows), steps):
            loss = objectives.sft(streamed_logprobs(model, row), row.mask)
            loss.backward()
            update(model, optimizer)
            advance(f"loss {loss.item():.3f}")


# --- the same from plain autograd -----------------------------------------------------------------


def dense_logprobs(model, row):
    """What `streamed_logprobs` gives, from a plain model's logits, one forward a document."""
    found = []
    for begin, end in pairwise(row.cu_seqlens.tolist()):
        target = row.target[begin:end]
        logits = model(row.inputs["input_ids"][:, begin:end], use_cache=False).logits[0]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        logp = logits.log_softmax(-1).gather(-1, target.clamp(min=0)[:, None])[:, 0]
        found.append(logp.masked_fill(target == IGNORED, 0.0))
    return torch.cat(found)


def gradients(model, rows, objective, logprobs):
    """The loss summed over `rows` and its gradients; `objective` maps a row and its log-probs to
    a scalar."""
    model.zero_grad()
    total = torch.zeros(())
    for row in rows:
        loss = objective(row, logprobs(model, row))
        loss.backward()
        total = total + loss.detach().cpu()
    return total, {name: p.grad for name, p in model.named_parameters()}


def compare(model, rows, objective, options):
    """Print the memory that a row's gradients take at most and, with `--check`, how far
    loss and gradients of `rows` are from those of dense documents in float64; exit where that is
    more than rounding."""
    largest = max(rows, key=lambda row: len(row.target))
    tokens, device = len(largest.target), largest.target.device

    def peak(logprobs):
        found = peak_memory(lambda: gradients(model, [largest], objective, logprobs)[1], device)
        model.zero_grad()
        return f"{found / 2**20:.1f} MiB"

    print(f"gradients of {tokens:,} tokens: at most {peak(streamed_logprobs)} streamed", end="")
    vs.unstream(model)
    small = options.model is None or options.check
    print(f", {peak(dense_logprobs)} from dense documents" if small else "")
    if options.check:
        check(model, rows, objective, options.chunk_size)
    vs.stream(model, chunk_size=options.chunk_size)


def check(model, rows, objective, chunk_size):
    """Exit where packed and streamed differs from dense; the model is a plain one."""
    try:
        twin = float64_twin(model).eval()  # dropout would differ
    except ValueError as error:
        raise SystemExit(f"--check is not for this model: {error}") from None
    want_loss, want = gradients(twin, rows, objective, dense_logprobs)
    if not any(grad.any() for grad in want.values()):
        raise SystemExit("--check has nothing to compare: every gradient is zero")
    vs.stream(twin, chunk_size=chunk_size)
    loss, found = gradients(twin, rows, objective, streamed_logprobs)
    error = relative_error(loss, want_loss)
    name, worst = worst_gradient(found.items(), want)
    print(f"check in float64: loss off by {error:.1e}, worst gradient by {worst:.1e} ({name})")
    if not max(error, worst) <= TOLERANCE:
        raise SystemExit(f"packed and dense differ by more than {TOLERANCE:.0e}")
