"""Cases of the vocabulary-parallel head, and the work of the ranks that run them.

Starting processes is what takes time, so 4 ranks run every case once, the first two of them also as
a group of two, and leave their results in files.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from head_cases import (
    EVERYTHING,
    FEATURES,
    Problem,
    dense,
    problem,
    several_targets,
    shrink_blocks,
)
from torch import Tensor

import varstream as vs
from varstream import parallel
from varstream.reference import head as blocks
from varstream.testing import assert_exact

# Rows of W on each rank: 23 classes in uneven shards, one of a single class.
SIZES = {2: (9, 14), 4: (5, 1, 11, 6)}
Calls = tuple[Callable[..., Any], Callable[..., Any], dict[str, Any]]
Results = dict[str, Any]


# --- cases: an option set, run by the whole head and by a shard of it -----------------------------


def loss(p: Problem, calls: Calls, names: tuple[str, ...] = (), **options: Any) -> list[Any]:
    """Loss, then metrics where they are asked for."""
    call, _, where = calls
    for name in names:
        torch.manual_seed(4)
        # The class weights are those of all 23 classes on every rank; all are the same numbers
        # whatever the dtype of the problem.
        whole = problem() if name == "class_weight" else p.cast(torch.float64)
        options |= FEATURES[name](whole)
    found = call(p.input, p.weight, p.target, linear_bias=p.bias, **where, **options)
    return [found] if isinstance(found, Tensor) else [found[0], *found[1]]


def logp(p: Problem, calls: Calls, **options: Any) -> list[Any]:
    _, call, where = calls
    found = call(p.input, p.weight, p.target, linear_bias=p.bias, **where, **options)
    return [found] if isinstance(found, Tensor) else list(found)


def autocast(p: Problem, calls: Calls) -> list[Any]:
    with torch.autocast("cpu", torch.bfloat16):
        return loss(p, calls)


def tied(p: Problem, calls: Calls) -> list[Any]:
    """The shard is used elsewhere too, as a tied embedding is."""
    elsewhere = p.weight.square().sum()
    return [loss(p, calls, chunk_size=5)[0] + (elsewhere - elsewhere.detach())]


def frozen(p: Problem, calls: Calls, which: str) -> list[Any]:
    getattr(p, which).requires_grad_(False)
    return loss(p, calls, EVERYTHING) + logp(p, calls, return_entropy=True)


def plain(dtype: torch.dtype = torch.float64, **settings: Any) -> Problem:
    return problem(ignored=[0, 5, 6, 15], dtype=dtype, **settings)


def first_shard() -> Problem:
    """Only classes that rank 0 holds."""
    p = plain()
    p.target[p.valid] %= 5
    return p


def offset() -> Problem:
    """Logits with a large common offset, banned classes (a whole shard of 4 ranks among them)."""
    p = problem()
    with torch.no_grad():
        p.bias += 1e3
        p.bias[5:8] = -torch.inf
    p.target[(p.target >= 5) & (p.target < 8)] = 9
    return p


def banned() -> Problem:
    """The one class of a shard of 4 ranks is banned."""
    p = problem()
    with torch.no_grad():
        p.bias[5] = -torch.inf
    p.target[p.target == 5] = 22
    return p


def narrow_targets() -> Problem:
    p = plain()
    return Problem(p.input, p.weight, p.bias, p.target.int())


def without_bias() -> Problem:
    return plain(bias=False)


Case = tuple[Callable[[], Problem], Callable[..., list[Any]]]
CASES: dict[str, Case] = {"float32": (partial(plain, torch.float32), loss)}
for reduction in ("mean", "sum", "none"):
    for feature in ((), *((name,) for name in FEATURES), EVERYTHING):
        title = "+".join(feature) if len(feature) < 2 else "everything"
        CASES[f"{reduction}-{title}"] = (
            plain,
            partial(loss, names=feature, reduction=reduction, chunk_size=4),
        )
    CASES[f"{reduction}-several"] = (
        lambda: several_targets(plain()),
        partial(loss, names=EVERYTHING, reduction=reduction, return_metrics=True, chunk_size=7),
    )
    CASES[f"{reduction}-ignored"] = (
        lambda: problem(ignored=list(range(16))),
        partial(loss, names=EVERYTHING, reduction=reduction, return_metrics=True),
    )
    CASES[f"{reduction}-no_rows"] = (lambda: problem(rows=0), partial(loss, reduction=reduction))
    CASES[f"{reduction}-first_shard"] = (first_shard, partial(loss, reduction=reduction))
    CASES[f"{reduction}-offset"] = (offset, partial(loss, reduction=reduction))
    CASES[f"{reduction}-banned"] = (banned, partial(loss, reduction=reduction))
CASES |= {
    "metrics": (plain, partial(loss, names=EVERYTHING, return_metrics=True, chunk_size=1)),
    "normalizer": (plain, partial(loss, normalizer=37.5)),
    "normalizer_tensor": (plain, partial(loss, normalizer=torch.tensor([3]), z_loss=0.1)),
    "options": (
        plain,
        partial(loss, options=torch.nn.LinearCrossEntropyOptions(batch_chunk_size=3)),
    ),
    "ignore_index": (lambda: problem(), partial(loss, ignore_index=3)),
    "max_rows": (plain, partial(loss, max_rows=12, chunk_size=5)),
    "narrow_targets": (narrow_targets, partial(loss, names=("smoothing",))),
    "without_bias": (without_bias, partial(loss, names=EVERYTHING)),
    "tied": (plain, tied),
    "autocast": (partial(plain, torch.float32), autocast),
    **{f"frozen_{name}": (plain, partial(frozen, which=name)) for name in ("input", "weight")},
    "logp": (plain, logp),
    "logp_entropy": (plain, partial(logp, return_entropy=True, chunk_size=5, temperature=0.7)),
    "logp_softcap": (plain, partial(logp, return_entropy=True, softcap=2.5, logit_scale=-1.3)),
    "logp_stats": (plain, partial(logp, return_stats=True, softcap=4.0)),
    "logp_several": (lambda: several_targets(plain()), partial(logp, return_stats=True)),
    "logp_ignored": (
        lambda: problem(ignored=list(range(16))),
        partial(logp, return_stats=True),
    ),
    "logp_first_shard": (first_shard, partial(logp, return_entropy=True)),
    "logp_banned": (banned, partial(logp, return_entropy=True)),
}
LOW = {
    "plain": (1.0, 0.0, {}),
    "sharp": (4.0, 0.0, {}),
    "smoothing": (1.0, 0.0, {"label_smoothing": 0.1, "z_loss": 0.01}),
    "softcap": (2.0, 0.0, {"softcap": 2.5, "reduction": "sum"}),
    "none": (1.0, 0.0, {"reduction": "none"}),
    "softcap_everything": (
        2.0,
        0.0,
        {
            "weight": torch.linspace(0.2, 1.3, 23),
            "token_weight": torch.linspace(-0.6, 1.4, 64),
            **{"label_smoothing": 0.1, "z_loss": 0.01},
            **{"softcap": 4.0, "logit_scale": -1.3, "temperature": 0.8},
        },
    ),
    # W's rows have much in common, which drops out of dX only in the sum over all ranks.
    "common": (1.0, 16.0, {}),
}
TOLERANCE = {"float32": 1e-5, "autocast": 1e-2, "offset": 1e-10}


def run(name: str, calls: Calls, own: slice, dtype: torch.dtype | None = None) -> Results:
    """Outputs of a case and the gradients of its operands under fixed upstream gradients; with a
    ``dtype`` of the case's operands rounded to float32."""
    make, case = CASES[name]
    torch.manual_seed(zlib.crc32(name.encode()))
    p = make() if dtype is None else make().cast(torch.float32).cast(dtype)
    p = shard_of(p, own)
    leaves = p.input, p.weight, p.bias
    outputs = case(p, calls)
    torch.manual_seed(3)
    roots = [out for out in outputs if out.requires_grad]
    upstream = [torch.randn(root.shape, dtype=torch.float64).to(root.dtype) for root in roots]
    torch.autograd.backward(roots, upstream)
    grads = [None if leaf is None else leaf.grad for leaf in leaves]
    return {"outputs": [out.detach() for out in outputs], "grads": grads}


def shard_of(p: Problem, own: slice) -> Problem:
    """The part of a problem that a rank sees, as new leaves."""
    bias = None if p.bias is None else p.bias.detach()[own].clone().requires_grad_()
    weight = p.weight.detach()[own].clone().requires_grad_()
    return Problem(p.input.detach().clone().requires_grad_(), weight, bias, p.target)


WHOLE: Calls = (vs.linear_cross_entropy, vs.token_logprobs, {})
ALL = slice(None)


def low_precision(name: str, calls: Calls, own: slice, dtype: torch.dtype, **more: Any) -> Results:
    """Loss and gradients of a bfloat16 problem; for the whole head by all logits and autograd,
    but where plain PyTorch itself loses what rows have in common, by the whole head's operator."""
    spread, common, options = LOW[name]
    torch.manual_seed(5)
    p = problem(rows=64, width=32, ignored=[0, 5], spread=spread, dtype=torch.float64)
    p.weight.detach().add_(common)
    p = shard_of(p.cast(torch.bfloat16).cast(dtype), own)
    if dtype == torch.bfloat16 and (common or calls is not WHOLE):
        value = loss(p, calls, chunk_size=16, **options, **more)[0]
    else:
        value = dense(p, **({"reduction": "mean"} | options))
    value.sum().backward()
    return {"outputs": [value.detach()], "grads": [p.input.grad, p.weight.grad, p.bias.grad]}


# --- probes: what is seen from inside a rank ------------------------------------------------------


class Place(NamedTuple):
    """Where a rank stands in the group whose cases it runs."""

    group: Any
    rank: int
    world: int

    @property
    def sizes(self) -> tuple[int, ...]:
        return SIZES[self.world]

    @property
    def own(self) -> slice:
        return slice(sum(self.sizes[: self.rank]), sum(self.sizes[: self.rank + 1]))

    @property
    def last(self) -> bool:
        return self.rank == self.world - 1

    def calls(self, **where: Any) -> Calls:
        where = {"group": self.group} | where
        return parallel.linear_cross_entropy, parallel.token_logprobs, where


def nan_row(place: Place, dtype: torch.dtype = torch.float64) -> Results:
    """A NaN row that takes part, one that is ignored and one that nothing is asked of."""
    p = shard_of(plain().cast(dtype), place.own)
    with torch.no_grad():
        p.input[[3, 5, 8]] = torch.nan
    upstream = torch.ones(16, dtype=dtype)
    upstream[8] = 0
    value = loss(p, place.calls(), reduction="none", chunk_size=4)[0]
    value.backward(upstream)
    q = shard_of(p, slice(None))
    total = loss(q, place.calls(), reduction="sum", token_weight=token_weight_of(q), chunk_size=4)
    total[0].backward()
    return {"loss": value.detach(), "input": p.input.grad, "weighted": [*total, q.weight.grad]}


def token_weight_of(p: Problem) -> Tensor:
    """Weights that leave out what is NaN."""
    return torch.where(p.input.isnan().any(1), 0.0, 1.5)


def no_grad(place: Place) -> Results:
    p, calls = shard_of(plain(), place.own), place.calls()
    with torch.no_grad(), counted() as seen:
        values = [loss(p, calls, chunk_size=4)[0], logp(p, calls, chunk_size=4)[0]]
    assert not any(value.requires_grad for value in values)
    return {"values": values, "seen": dict(seen)}


@contextlib.contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Counts the collectives that run."""
    seen = {"all_gather": 0, "all_reduce": 0}
    kept = {name: getattr(dist, name) for name in seen}

    def count(name: str, *args: Any, **options: Any) -> Any:
        seen[name] += 1
        return kept[name](*args, **options)

    for name in seen:
        setattr(dist, name, partial(count, name))
    try:
        yield seen
    finally:
        for name, function in kept.items():
            setattr(dist, name, function)


def collectives(place: Place, dtype: torch.dtype = torch.float64) -> Results:
    """Per call: gathers and sums of the forward and of the backward, 12 rows in 3 chunks."""
    found: Results = {}
    told = {"shard_sizes": place.sizes}
    for name, where in {"mean": {}, "sum": told, "none": told}.items():
        p = shard_of(plain(dtype), place.own)
        with counted() as forward:
            value = loss(p, place.calls(**where), reduction=name, chunk_size=4)[0].sum()
        with counted() as backward:
            value.backward()
        found[name] = [*forward.values()], [*backward.values()]
    return found


def twice(value: Tensor, first: Tensor, second: Tensor) -> None:
    (gradient,) = torch.autograd.grad(value, first, create_graph=True)
    torch.autograd.grad(gradient.square().sum(), second)


def message(call: Callable[[], Any]) -> str:
    try:
        call()
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def errors(place: Place) -> Results:
    """Messages on every rank, of arguments that are wrong everywhere or on the last rank only."""
    last, sizes = place.last, place.sizes
    p = shard_of(plain(), place.own)
    x, w, t, b = p.input, p.weight, p.target, p.bias
    call = partial(parallel.linear_cross_entropy, group=place.group, chunk_size=4)
    out_of_range = t.clone()
    out_of_range[2] = 23
    other = t.clone()
    if last:
        other[3] = (other[3] + 1) % 23
    few = x[: 15 if last else 16]
    wants = x.detach().requires_grad_(last)
    low = x.bfloat16(), w.bfloat16()
    cases = {
        "bias": lambda: call(x, w, t, linear_bias=b[:-1] if last else b),
        "kind": lambda: call(x, w.tolist() if last else w, t),
        "rows": lambda: call(few, w, t[: few.shape[0]]),
        "width": lambda: call(x[:, :8], w[:, :8], t) if last else call(x, w, t),
        "target": lambda: call(x, w, other),
        "dtype": lambda: call(x.float(), w.float(), t) if last else call(x, w, t),
        "grad": lambda: call(wants, w, t),
        "options": lambda: call(x, w, t, softcap=1.0 if last else 2.0),
        "token_weight": lambda: call(x, w, t, token_weight=torch.ones(16) if last else None),
        "range": lambda: call(x, w, out_of_range),
        "classes": lambda: call(x, w, t, weight=torch.ones(22)),
        "empty": lambda: call(x, w[:0], t),
        "sizes_kind": lambda: call(x, w, t, shard_sizes=23),
        "sizes_count": lambda: call(x, w, t, shard_sizes=[*sizes, 1]),
        "sizes_own": lambda: call(x, w, t, shard_sizes=[size + 1 for size in sizes]),
        "max_rows": lambda: call(x, w, t, max_rows=11),
        "logits_dtype": lambda: call(*low, t, logits_dtype=torch.bfloat16),
        "group": lambda: call(x, w, t, group="world"),
        "outside": lambda: call(x, w, t, group=dist.GroupMember.NON_GROUP_MEMBER),
        "twice": lambda: twice(call(x, w, t), x, w),
        "twice_rows": lambda: twice(call(x, w, t, reduction="none").sum(), w, w),
    }
    return {name: message(case) for name, case in cases.items()}


PROBES = (nan_row, no_grad, collectives, errors)


def assembled(ranks: list[Results], name: str) -> Results:
    """A case's results for the whole head; what all ranks hold must be the same on all."""
    first, *others = (rank[name] for rank in ranks)
    for other in others:
        for ours, theirs in zip(first["outputs"], other["outputs"], strict=True):
            assert torch.equal(ours, theirs)
        if first["grads"][0] is not None:
            assert_exact(other["grads"][0], first["grads"][0], 1e-15)
    parts = [rank[name]["grads"] for rank in ranks]
    joined = (None if part[0] is None else torch.cat(part) for part in zip(*parts, strict=True))
    _, weight, bias = joined
    return {"outputs": first["outputs"], "grads": [first["grads"][0], weight, bias]}


def results(place: Place) -> Results:
    """Every case and every probe, as one rank of a group sees them."""
    # Half of the cases say who holds what, the others let the ranks find out.
    calls = [place.calls(), place.calls(shard_sizes=place.sizes)]
    found: Results = {name: run(name, calls[i % 2], place.own) for i, name in enumerate(CASES)}
    for name in LOW:
        found[f"low-{name}"] = low_precision(name, calls[0], place.own, torch.bfloat16)
    for probe in PROBES:
        torch.manual_seed(6)
        found[probe.__name__] = probe(place)
    return found


def work(rank: int, folder: str, results: Callable[[Place], Results] = results) -> None:
    """One of 4 processes, the first two also a group of two, that leave what they find."""
    torch.set_num_threads(1)
    patch = pytest.MonkeyPatch()
    patch.setenv("GLOO_SOCKET_IFNAME", "lo")
    shrink_blocks(patch)
    # Chunk sizes that would differ between shards if each rank chose its own.
    patch.setattr(blocks, "CHUNK_LIMITS", {"cpu": (16, 1200), "cuda": (16, 1200)})
    patch.setattr(blocks, "MIN_CHUNK_ROWS", 2)
    store, wait = dist.FileStore(f"{folder}/store", 4), timedelta(seconds=120)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=4, timeout=wait)
    pair = dist.new_group([0, 1])
    torch.save(results(Place(None, rank, 4)), f"{folder}/4-{rank}.pt")
    if rank < 2:
        torch.save(results(Place(pair, rank, 2)), f"{folder}/2-{rank}.pt")
    else:
        p = plain()
        call = partial(parallel.linear_cross_entropy, p.input, p.weight, p.target, group=pair)
        assert message(call).startswith("ValueError: group must contain this process")
    dist.barrier()
    dist.destroy_process_group()
