"""Documents as packed rows, their log-probabilities streamed and dense, and the check of one
against the other."""

import copy
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
    hidden = model.get_decoder()(**row.inputs).last_hidden_state[0]  # (N, d)
    head, config = model.get_output_embeddings(), model.config
    return vs.token_logprobs(
        *(hidden, head.weight, row.target),
        linear_bias=head.bias,
        softcap=getattr(config, "final_logit_softcapping", None) or 0.0,  # Gemma
        logit_scale=1.0 / getattr(config, "logits_scaling", 1.0),  # Granite
    )


def warm_up(model, rows, steps, rate):
    """Plain next-token training, a row a step; the last loss."""
    optimizer = optimizer_of(model, rate)
    with progress("warm-up", steps) as advance:
        for row in islice(cycle(rows), steps):
            loss = objectives.sft(streamed_logprobs(model, row), row.mask)
            loss.backward()
            update(model, optimizer)
            advance(f"loss {loss.item():.3f}")
    return loss.item()


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


def check(model, rows, objective, chunk_size):
    """The worst relative difference between loss and gradients of packed rows, streamed, and those
    of dense documents, in float64; exits where it is more than rounding."""
    twin = float64_twin(vs.unstream(copy.deepcopy(model)))
    want_loss, want = gradients(twin, rows, objective, dense_logprobs)
    found_loss, found = gradients(
        vs.stream(twin, chunk_size=chunk_size), rows, objective, streamed_logprobs
    )
    if not any(grad.any() for grad in want.values()):
        raise SystemExit("nothing to compare: every gradient is zero")
    name, error = worst_gradient(found.items(), want)
    loss_error = relative_error(found_loss, want_loss)
    print(
        f"packed and streamed against dense documents, in float64: loss {loss_error:.1e}, worst "
        f"gradient {error:.1e} ({name})"
    )
    if not max(error, loss_error) <= TOLERANCE:
        raise SystemExit(f"packed and dense differ by more than {TOLERANCE:.0e}")
    return max(error, loss_error)


def peaks(model, row, objective):
    """In words, the memory that one row's gradients take at most, streamed and dense."""
    dense, device = vs.unstream(copy.deepcopy(model)), row.target.device
    streamed, plain = (
        peak_memory(lambda m=m, f=f: gradients(m, [row], objective, f)[1], device) / 2**20
        for m, f in ((model, streamed_logprobs), (dense, dense_logprobs))
    )
    model.zero_grad()
    return (
        f"memory of the gradients of a row of {len(row.target):,} tokens, at most: {streamed:.1f} "
        f"MiB streamed, {plain:.1f} MiB from dense documents"
    )
