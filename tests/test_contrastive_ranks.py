"""The contrastive loss over gloo groups of 2 and 4 processes, against one process with all rows."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from varstream.objectives import cached_embeddings, contrastive
from varstream.testing import assert_exact

D = 6
# Queries and keys of each rank, by world size: keys are more than queries or not, a rank has none.
EQUAL = {2: ((5, 5), (5, 5)), 4: ((3, 3),) * 4}
HARD = {2: ((5, 8), (5, 8)), 4: ((3, 5),) * 4}
UNEVEN = {2: ((5, 7), (2, 2)), 4: ((4, 4), (1, 6), (0, 0), (5, 5))}
CASES: dict[str, tuple[dict[int, Any], dict[str, Any]]] = {
    "default": (EQUAL, {}),
    "hard": (HARD, {"temperature": 0.3}),
    "uneven": (UNEVEN, {}),
    "symmetric": (EQUAL, {"symmetric": True}),
    "symmetric_uneven": (UNEVEN, {"symmetric": True, "temperature": 0.5}),
    "dot": (HARD, {"similarity": "dot", "temperature": 2.0, "chunk_size": 2}),
    "positives": (UNEVEN, {"positives": True}),
    "symmetric_positives": (HARD, {"positives": True, "symmetric": True}),
    "frozen_keys": (HARD, {}),
    "bfloat16": (HARD, {"symmetric": True, "temperature": 0.5}),
    "autocast": (HARD, {"temperature": 0.5}),
}
Results = dict[str, Any]


class Rows(NamedTuple):
    """What each rank of a world holds."""

    queries: list[Tensor]
    keys: list[Tensor]
    positives: list[Tensor]  # by own keys

    def whole(self) -> tuple[Tensor, Tensor, Tensor]:
        starts = torch.tensor([0, *(k.shape[0] for k in self.keys)]).cumsum(0)
        own = zip(self.positives, starts.tolist(), strict=False)
        targets = [torch.where(p < 0, p, p + start) for p, start in own]
        return torch.cat(self.queries), torch.cat(self.keys), torch.cat(targets)


def rows_of(name: str, world: int) -> Rows:
    sizes, options = CASES[name]
    torch.manual_seed(17)
    dtype = {"bfloat16": torch.bfloat16, "autocast": torch.float32}.get(name, torch.float64)
    parts = Rows([], [], [])
    for q, k in sizes[world]:
        parts.queries.append(torch.randn(q, D, dtype=torch.float64).to(dtype))
        parts.keys.append(torch.randn(k, D, dtype=torch.float64).to(dtype))
        own = torch.arange(q)
        if "positives" in options and q:
            own = torch.randint(k, (q,))
            own[0] = -100
        parts.positives.append(own)
    return parts


def loss_of(name: str, queries: Tensor, keys: Tensor, positives: Tensor, **where: Any) -> Tensor:
    options = CASES[name][1] | where
    if "positives" in options or not where:
        options = options | {"positives": positives}
    with torch.autocast("cpu", torch.bfloat16, enabled=name == "autocast"):
        return contrastive(queries, keys, **options)


def run(name: str, rank: int, world: int, group: Any) -> Results:
    parts = rows_of(name, world)
    queries = parts.queries[rank].requires_grad_()
    keys = parts.keys[rank].requires_grad_(name != "frozen_keys")
    loss = loss_of(name, queries, keys, parts.positives[rank], gather=True, group=group)
    loss.backward()
    return {"loss": loss.detach(), "queries": queries.grad, "keys": keys.grad}


# --- probes ---------------------------------------------------------------------------------------


def message(call) -> str:
    try:
        call()
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def errors(rank: int, world: int, group: Any) -> Results:
    """Messages of arguments that are wrong on the last rank only."""
    last = rank == world - 1
    x = torch.randn(3, D, dtype=torch.float64, requires_grad=True)

    def call(queries=x, keys=x, **options):
        return message(lambda: contrastive(queries, keys, gather=True, group=group, **options))

    empty = x[:0]
    return {
        "kind": call(keys=x.tolist() if last else x),
        "few": call(keys=x[:2] if last else x),
        "range": call(positives=torch.tensor([0, 1, 3 if last else 2])),
        "width": call(*(x[:, :5], x[:, :5]) if last else (x, x)),
        "dtype": call(*(x.float(), x.float()) if last else (x, x)),
        "grad": call(keys=x.detach() if last else x),
        "query_grad": call(queries=x.detach() if last else x),
        "options": call(temperature=0.1 if last else 0.2),
        "none": call(empty, empty),
        "group": message(lambda: contrastive(x, x, gather=True, group="world")),
    }


class Step(nn.Module):
    """A shared encoder of queries and keys with cached gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(D, 16), nn.Tanh(), nn.Linear(16, 4))

    def forward(self, queries: Tensor, keys: Tensor, **where: Any) -> Tensor:
        rows = (cached_embeddings(self.encoder, list(r.split(2))) for r in (queries, keys))
        return contrastive(*rows, symmetric=True, temperature=0.5, **where)


def model() -> Step:
    torch.manual_seed(23)
    return Step().double()


def trained(rank: int, world: int, group: Any) -> Results:
    """Gradients under DistributedDataParallel, whose mean over ranks is that of all rows."""
    parts = rows_of("hard", world)
    step = nn.parallel.DistributedDataParallel(model(), process_group=group)
    loss = step(parts.queries[rank], parts.keys[rank], gather=True, group=group)
    loss.backward()
    return {"loss": loss.detach(), "grads": [p.grad for p in step.module.parameters()]}


def sharded(rank: int, world: int, group: Any) -> Results:
    """The same under FSDP2, which gathers parameters around the step and scatters gradients."""
    parts = rows_of("hard", world)
    mesh = DeviceMesh.from_group(group or dist.group.WORLD, "cpu")
    step = fully_shard(model(), mesh=mesh)
    step(parts.queries[rank], parts.keys[rank], gather=True, group=group).backward()
    return {"grads": [p.grad.full_tensor() for p in step.parameters()]}


def collectives(rank: int, world: int, group: Any) -> Results:
    """Gathers and sums of a forward and of a backward."""
    seen = {"all_gather": 0, "all_reduce": 0}
    kept = {name: getattr(dist, name) for name in seen}

    def counted(name):
        def call(*args, **options):
            seen[name] += 1
            return kept[name](*args, **options)

        return call

    x = torch.randn(4, D, requires_grad=True)
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for name in seen:
            patch.setattr(dist, name, counted(name))
        for symmetric in (False, True):
            loss = contrastive(x, x, gather=True, group=group, symmetric=symmetric)
            forward = dict(seen)
            loss.backward()
            found[symmetric] = forward, dict(seen)
            seen.update(dict.fromkeys(seen, 0))
    return found


def results(rank: int, world: int, group: Any) -> Results:
    found = {name: run(name, rank, world, group) for name in CASES}
    for probe in (errors, trained, sharded, collectives):
        found[probe.__name__] = probe(rank, world, group)
    return found


def work(rank: int, folder: str) -> None:
    """One of 4 processes; the first two are also a group of two."""
    torch.set_num_threads(1)
    pytest.MonkeyPatch().setenv("GLOO_SOCKET_IFNAME", "lo")
    store, wait = dist.FileStore(f"{folder}/store", 4), timedelta(seconds=120)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=4, timeout=wait)
    pair = dist.new_group([0, 1])
    torch.save(results(rank, 4, None), f"{folder}/4-{rank}.pt")
    if rank < 2:
        torch.save(results(rank, 2, pair), f"{folder}/2-{rank}.pt")
    else:
        x = torch.randn(2, D)
        call = message(lambda: contrastive(x, x, gather=True, group=pair))
        assert call.startswith("ValueError: group must contain this process")
    dist.barrier()
    dist.destroy_process_group()


# --- the tests ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the ranks left what they found."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, args=(str(folder),), nprocs=4)
    return folder


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, folder) -> list[Results]:
    """What each rank of a group found."""
    paths = [folder / f"{request.param}-{rank}.pt" for rank in range(request.param)]
    return [torch.load(path, weights_only=False) for path in paths]


@pytest.mark.parametrize("name", CASES)
def test_means_over_ranks_are_one_process(ranks, name):
    world = len(ranks)
    queries, keys, positives = rows_of(name, world).whole()
    queries.requires_grad_()
    keys.requires_grad_(name != "frozen_keys")
    want = loss_of(name, queries, keys, positives)
    want.backward()
    tolerance = {"bfloat16": 1e-2, "autocast": 1e-2}.get(name, 1e-12)
    losses = torch.stack([rank[name]["loss"] for rank in ranks])
    assert_exact(losses.mean(), want.detach(), 1e-6 if tolerance > 1e-3 else 1e-12)
    for part, leaf in (("queries", queries), ("keys", keys)):
        parts = [rank[name][part] for rank in ranks]
        if leaf.grad is None:
            assert parts == [None] * world
            continue
        assert all(p.dtype == leaf.dtype for p in parts)
        assert_exact(torch.cat(parts) / world, leaf.grad, tolerance, part)


def test_equal_batches_give_each_rank_its_own_mean(ranks):
    """The loss of a rank is the plain mean over its queries where all hold as many."""
    queries, keys, positives = rows_of("hard", len(ranks)).whole()
    each = queries.shape[0] // len(ranks)
    for i, rank in enumerate(ranks):
        own = slice(i * each, (i + 1) * each)
        want = contrastive(queries[own], keys, positives=positives[own], temperature=0.3)
        assert_exact(rank["hard"]["loss"], want)


def test_data_parallel_training_with_cached_gradients(ranks):
    queries, keys, positives = rows_of("hard", len(ranks)).whole()
    step = model()
    encoder = step.encoder
    want = contrastive(
        encoder(queries), encoder(keys), positives=positives, symmetric=True, temperature=0.5
    )
    want.backward()
    assert_exact(torch.stack([r["trained"]["loss"] for r in ranks]).mean(), want.detach())
    for rank in ranks:
        for wrapper in ("trained", "sharded"):
            for got, p in zip(rank[wrapper]["grads"], step.parameters(), strict=True):
                assert_exact(got, p.grad)


def test_collectives(ranks):
    """One exchange of notes; a gather and, in the backward, a sum for each side."""
    for rank in ranks:
        for symmetric, sides in ((False, 1), (True, 2)):
            forward, both = rank["collectives"][symmetric]
            assert forward == {"all_gather": 1 + sides, "all_reduce": 0}
            assert both == {"all_gather": 1 + sides, "all_reduce": sides}


OWN = {
    "kind": "TypeError: keys must be a torch.Tensor, got list",
    "few": "ValueError: keys must have a row for each of the 3 queries",
    "range": "ValueError: positives must be in [0, K) = [0, 3) or -100, got 3",
}
ALL = {
    "width": "ValueError: queries must have the same width d on every rank of group, got [6",
    "dtype": "ValueError: queries must have the same dtype on every rank of group, got others on",
    "grad": "ValueError: keys must require a gradient on every rank of group or on none",
    "query_grad": "ValueError: queries must require a gradient on every rank of group or on none",
    "options": "ValueError: the options must be the same on every rank of group, got others on",
    "none": "ValueError: keys must have at least one row (K, d), got none",
    "group": "TypeError: group must be a torch.distributed.ProcessGroup or None",
}


def test_errors_are_raised_on_all_ranks(ranks):
    *others, last = (rank["errors"] for rank in ranks)
    for name, text in OWN.items():
        assert last[name].startswith(text)
        for other in others:
            assert other[name] == (
                "ValueError: the arguments must be valid on every rank of group, "
                f"got an error on ranks [{len(ranks) - 1}]"
            )
    for name, text in ALL.items():
        for found in (*others, last):
            assert found[name].startswith(text), found[name]
