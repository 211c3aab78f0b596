"""Streamed models on two gloo ranks: DDP's averaged gradients equal the dense model's, with unequal
documents and with a rank that has no token; sharded parameters of FSDP too."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from models import VOCAB, make_twin, packed_row
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import varstream as vs
from varstream.testing import worst_gradient

LENGTHS = {"uneven": ([5, 1, 17], [30, 2]), "none": ([9, 4], [])}


def row_of(case, rank):
    torch.manual_seed(10 + rank)
    lengths = LENGTHS[case][rank]
    if lengths:
        return packed_row(lengths)
    ids = torch.randint(VOCAB, (1, 6))  # all padding
    return {"input_ids": ids, "attention_mask": torch.zeros_like(ids), "labels": ids}


def model_of(streamed):
    torch.manual_seed(1)
    model = make_twin("qwen3")
    return vs.stream(model, chunk_size=7) if streamed else model


def count(case):
    return sum(int((row_of(case, r)["labels"] != -100).sum()) for r in range(2) if LENGTHS[case][r])


def distributed(rank, case, static):
    """Gradients under DDP, and how often each parameter's hook ran."""
    model = model_of(True)
    fired = dict.fromkeys((n for n, _ in model.named_parameters()), 0)

    def mark(name):
        fired[name] += 1

    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: mark(name))
    wrapped = DistributedDataParallel(model, static_graph=static)
    wrapped(**row_of(case, rank), num_items_in_batch=count(case)).loss.backward()
    return {n: p.grad for n, p in model.named_parameters()}, fired


def sharded(rank, case):
    """Gradients under FSDP, the layers and the rest sharded apart; what each rank has is joined."""
    model = model_of(True)
    mesh = DeviceMesh("cpu", [0, 1])
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model(**row_of(case, rank), num_items_in_batch=count(case)).loss.backward()
    return {n: p.grad.full_tensor() for n, p in model.named_parameters()}


def work(rank, folder):
    torch.set_num_threads(1)
    pytest.MonkeyPatch().setenv("GLOO_SOCKET_IFNAME", "lo")
    store, wait = dist.FileStore(f"{folder}/store", 2), timedelta(seconds=120)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=wait)
    found = {
        (case, static): distributed(rank, case, static) for case in LENGTHS for static in (0, 1)
    }
    found["sharded"] = sharded(rank, "uneven")
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank found."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def expected(case):
    """The mean over ranks of the dense model's gradients."""
    model = model_of(False)
    for rank in range(2):
        if LENGTHS[case][rank]:
            row = row_of(case, rank)
            model(**row, use_cache=False, num_items_in_batch=count(case)).loss.backward()
    return {n: p.grad / 2 for n, p in model.named_parameters()}


@pytest.mark.parametrize("static", [0, 1], ids=["dynamic", "static_graph"])
@pytest.mark.parametrize("case", LENGTHS)
def test_averaged_gradients(found, case, static):
    want = expected(case)
    for results in found:
        grads, fired = results[case, static]
        name, error = worst_gradient(grads.items(), want)
        assert error <= 1e-12, f"{name}: {error:.2e}"
        assert set(fired.values()) == {1}


def test_sharded_parameters(found):
    want = expected("uneven")
    for results in found:
        name, error = worst_gradient(results["sharded"].items(), want)
        assert error <= 1e-12, f"{name}: {error:.2e}"
