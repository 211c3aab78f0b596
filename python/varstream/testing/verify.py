"""Is streaming exact for a model like yours? A small float64 copy of a configuration, dense against
streamed, over awkward batches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from varstream._checks import check_float, check_int
from varstream.streaming.huggingface import stream, unstream
from varstream.testing.compare import relative_error
from varstream.testing.float64 import exact_routers, float64_twin
from varstream.testing.shrink import describe_kept, describe_shrunk, shrink_config

TOLERANCE = 1e-12
TOKENS = 97  # of the packed row
SHORT = [2, 1, 3, 5, 7, 11, 1]  # documents beside the long one, which takes the other tokens
CHUNKS = (1, 7, 16, None)  # None: the whole row
PADDED_CHUNK = 7
IGNORE_INDEX = -100
SMALL = 1e-3  # of the largest gradient; smaller ones are compared with this much of it

Batch = dict[str, Tensor]
Gradients = dict[str, Tensor]
Progress = Callable[[str, int, int], None]


class ConfigError(ValueError):
    """Nothing can be said of the configuration's model; the message says why."""


@dataclass(frozen=True)
class Case:
    """One way to run the batch: its form and rows of a chunk."""

    form: str  # "packed", "left-padded", "right-padded"
    chunk_size: int

    def __str__(self) -> str:
        return f"{self.form}, {self.chunk_size}"


@dataclass(frozen=True)
class Difference:
    """The largest relative difference seen (Frobenius norms) and the case it was seen in."""

    error: float
    case: str


@dataclass(frozen=True)
class Verification:
    """What ``verify`` found.

    A gradient below a thousandth of the largest is compared with that thousandth.

    Attributes:
        model_type: of the configuration.
        shrunk: changed numbers by name, (yours, the copy's).
        kept: features of the architecture that the copy has too, in words.
        lengths: of the packed documents, in tokens.
        cases: what was run.
        loss: the loss's worst difference over all cases.
        gradients: that of each parameter's gradient, by name.
        shapes: of each parameter of the copy.
        tolerance: bound of a relative difference that counts as exact.
    """

    model_type: str
    shrunk: dict[str, tuple[Any, Any]]
    kept: list[str]
    lengths: list[int]
    cases: list[str]
    loss: Difference
    gradients: dict[str, Difference]
    shapes: dict[str, tuple[int, ...]]
    tolerance: float

    @property
    def worst(self) -> tuple[str, Difference]:
        """What differs most, ``"loss"`` or a parameter's name, and by how much."""
        found = {"loss": self.loss, **self.gradients}
        return max(found.items(), key=lambda item: item[1].error)

    @property
    def exact(self) -> bool:
        return self.worst[1].error <= self.tolerance

    def as_json(self) -> dict[str, Any]:
        """Plain data, with the verdict."""
        name, worst = self.worst
        verdict = {"exact": self.exact, "worst": {"name": name, **asdict(worst)}}
        return {**verdict, **asdict(self)}


def verify(
    config: Any,
    *,
    tokens: int = TOKENS,
    chunk_size: int | None = None,
    seed: int = 0,
    tolerance: float = TOLERANCE,
    progress: Progress | None = None,
) -> Verification:
    """Compare a model's streamed loss and gradients with the dense ones, in float64, without
    dropout.

    A small copy of the configuration (``shrink_config``) gets random weights and loses the float32
    casts of its classes (``float64_twin``). Its dense losses and gradients, packed documents run
    one by one (with a router loss, which sees all rows at once, together behind a mask) and padded
    batches as they are, stand against those of ``vs.stream`` over one packed row of documents of
    1 token, 2, primes and one long, and over the same documents padded left and right; in chunks of
    1, 7, 16 rows and of the whole row.

    Args:
        config: a Hugging Face configuration of a causal language model that ``vs.stream`` takes.
        tokens: of the packed row, at least 32; no document may be longer than a model's table of
            positions.
        chunk_size: rows of a layer's and the head's chunks; None for those above.
        seed: of weights and tokens.
        tolerance: the largest relative difference (Frobenius norms) that counts as exact.
        progress: called before each step with its name, its number from 0, the number of steps.

    Raises:
        UnsupportedModelError: a ValueError naming the part of the model that ``vs.stream`` does
            not understand.
        ConfigError: a ValueError: the configuration builds no model, or one with too few positions
            or without an exact float64 copy.
        TypeError, ValueError: an argument breaks its contract.
    """
    check_int("tokens", tokens, low=sum(SHORT) + 2)
    if chunk_size is not None:
        check_int("chunk_size", chunk_size, low=1)
    check_int("seed", seed, low=0)
    check_float("tolerance", tolerance, low=0.0)
    small = shrink_config(config)
    lengths = [*SHORT[:4], tokens - sum(SHORT), *SHORT[4:]]
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        model = _random_model(small)
        unstream(stream(model))  # refuses what it doesn't understand
        _check_positions(model, max(lengths))
        twin = _twin(model)
        documents = [torch.randint(small.vocab_size, (n,)) for n in lengths]
    cases = list(_cases(tokens, chunk_size))
    forms = list(dict.fromkeys(case.form for case in cases))
    tell = progress or (lambda *_: None)
    steps = len(forms) + len(cases)
    references = {}
    with torch.enable_grad(), exact_routers(twin):
        for i, form in enumerate(forms):
            tell(f"dense, {form}", i, steps)
            references[form] = _dense(twin, form, documents)
            if not any(grad.any() for grad in references[form][1].values()):
                raise ConfigError(
                    "every gradient of this model is zero: there is nothing to compare"
                )
        loss, gradients = Difference(0.0, ""), dict[str, Difference]()
        for i, case in enumerate(cases, len(forms)):
            tell(str(case), i, steps)
            got_loss, got = _streamed(twin, case, documents)
            want_loss, want = references[case.form]
            loss = _worse(loss, relative_error(got_loss, want_loss), case)
            least = SMALL * max(grad.norm().item() for grad in want.values())
            for name, grad in want.items():
                before = gradients.get(name, Difference(0.0, ""))
                gradients[name] = _worse(before, _difference(got[name], grad, least), case)
    return Verification(
        model_type=config.model_type,
        shrunk=describe_shrunk(config, small),
        kept=describe_kept(small, twin),
        lengths=lengths,
        cases=[str(case) for case in cases],
        loss=loss,
        gradients=gradients,
        shapes={name: tuple(p.shape) for name, p in twin.named_parameters()},
        tolerance=tolerance,
    )


def _difference(got: Tensor, want: Tensor, least: float) -> float:
    """``relative_error``, but relative to ``least`` where ``want`` is smaller.

    A gradient that is zero in exact arithmetic (of keys, where a window holds one key) is rounding
    in both and would differ by all of itself.
    """
    small = want.norm().item() < least and bool(got.isfinite().all())
    return (got - want).norm().item() / least if small else relative_error(got, want)


def _worse(before: Difference, error: float, case: Case) -> Difference:
    return Difference(error, str(case)) if error > before.error or not before.case else before


def _cases(tokens: int, chunk_size: int | None) -> Iterator[Case]:
    for size in CHUNKS if chunk_size is None else (chunk_size,):
        yield Case("packed", size or tokens)
    for form in ("right-padded", "left-padded"):
        yield Case(form, chunk_size or PADDED_CHUNK)


def _random_model(config: Any) -> Any:
    """A model with random weights; norms and biases too, whose errors would hide at 1 and 0."""
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float64, attn_implementation="eager"
        )
    except Exception as error:  # an unknown activation or rotary type surfaces as any of many
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"transformers builds no model of this config ({reason}); mend it"
        ) from error
    model.config._experts_implementation = "eager"  # the grouped product knows no float64
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()  # dropout would differ


def _twin(model: Any) -> Any:
    try:
        return float64_twin(model)
    except ValueError as error:
        raise ConfigError(f"this model has no exact copy to compare with: {error}") from error


def _check_positions(model: Any, longest: int) -> None:
    """A table of positions has no row past its end."""
    positions = getattr(model.config, "max_position_embeddings", None) or longest
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    if longest > positions and any(m.num_embeddings == positions for m in tables):
        raise ConfigError(f"the model has {positions} positions; give fewer tokens than {longest}")


# --- batches --------------------------------------------------------------------------------------


def _labels(document: Tensor) -> Tensor:
    """A third of a document isn't trained, as a prompt would be; nor is its first token."""
    labels = document.clone()
    labels[: max(len(document) // 3, 1)] = IGNORE_INDEX
    return labels


def _batch(form: str, documents: list[Tensor]) -> Batch:
    """The documents as one packed row or as a padded batch."""
    if form == "packed":
        return {
            "input_ids": torch.cat(documents)[None],
            "labels": torch.cat([_labels(document) for document in documents])[None],
            "position_ids": torch.cat([torch.arange(len(d)) for d in documents])[None],
        }
    side = form.removesuffix("-padded")

    def pad(rows: list[Tensor], value: int) -> Tensor:
        return nn.utils.rnn.pad_sequence(rows, True, value, padding_side=side)

    return {
        "input_ids": pad(documents, 0),
        "labels": pad([_labels(document) for document in documents], IGNORE_INDEX),
        "attention_mask": pad([torch.ones_like(document) for document in documents], 0),
    }


def _trained(documents: list[Tensor]) -> int:
    """The loss's normaliser: tokens with a label."""
    return sum(int((_labels(document) != IGNORE_INDEX).sum()) for document in documents)


def _dense(twin: Any, form: str, documents: list[Tensor]) -> tuple[Tensor, Gradients]:
    """The reference: packed documents one by one, with nothing between them; padded ones at once,
    and all where the loss is more than a sum over tokens."""
    if form != "packed" or getattr(twin.config, "output_router_logits", False):
        batches = [_batch(form, documents)]
    else:  # a document of one token predicts nothing
        batches = [_batch("packed", [document]) for document in documents if len(document) > 1]
    twin.zero_grad(set_to_none=True)
    loss = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        part = twin(**batch, use_cache=False, num_items_in_batch=_trained(documents)).loss
        part.backward()
        loss += part.detach()
    return loss, _gradients(twin)


def _streamed(twin: Any, case: Case, documents: list[Tensor]) -> tuple[Tensor, Gradients]:
    model = stream(
        copy.deepcopy(twin),
        chunk_size=case.chunk_size,
        head_chunk_size=case.chunk_size,
    )
    model.zero_grad(set_to_none=True)
    batch = _batch(case.form, documents)
    loss = model(**batch, num_items_in_batch=_trained(documents)).loss
    loss.backward()
    return loss.detach(), _gradients(model)


def _gradients(model: Any) -> Gradients:
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }
