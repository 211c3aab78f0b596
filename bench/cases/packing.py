"""``vs.pack`` and ``vs.unpack``: padded batches to rows of real tokens and back, and on a GPU the
two row copies alone, with the indices known."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

import varstream as vs

from .. import floors
from ..case import Case, Peer, Setup, Shape, floor

COPY_NOTE = "floor: a copy of the bytes that must move"


class Operands:
    """x (B, S[, W]), its mask, and the packed rows; ``width`` 0 stands for token ids without W."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        batch, seqlen, width = shape["batch"], shape["seqlen"], shape["width"]
        lengths = torch.randint(seqlen // 5, seqlen + 1, (batch,), generator=draw)
        self.mask = (torch.arange(seqlen) < lengths[:, None]).to(device)
        size = (batch, seqlen, width) if width else (batch, seqlen)
        self.x = (torch.rand(size, generator=draw) * 100).to(device, dtype)
        self.rows = self.x.flatten(0, 1)
        self.indices = self.mask.flatten().nonzero().squeeze(1)
        self.packed = vs.pack(self.x, self.mask)
        self.values = self.packed.values
        row_bytes = self.x.nbytes // (batch * seqlen)
        kept = self.indices.numel() * row_bytes
        # Every real row is read and written once; unpack writes the padding besides.
        self.moved = {"pack": 2 * kept, "unpack": kept + self.x.nbytes}


def _build_pack(dtype: str, shape: Shape, device: torch.device, seed: int) -> Setup:
    o = Operands(shape, getattr(torch, dtype), device, seed)

    def select() -> Tensor:
        return o.rows.index_select(0, o.mask.flatten().nonzero().squeeze(1))

    return Setup(
        runs={
            "varstream": lambda: vs.pack(o.x, o.mask).values,
            "index_select": select,
            "boolean": lambda: o.x[o.mask],
            "copy_floor": floors.copy(o.moved["pack"], device),
        },
        operand_bytes=o.x.nbytes,
    )


def _scattered(o: Operands) -> Tensor:
    return torch.zeros_like(o.rows).index_copy_(0, o.indices, o.values).view_as(o.x)


def _boolean_unpack(o: Operands) -> Tensor:
    padded = torch.zeros_like(o.x)
    padded[o.mask] = o.values
    return padded


def _build_unpack(dtype: str, shape: Shape, device: torch.device, seed: int) -> Setup:
    o = Operands(shape, getattr(torch, dtype), device, seed)
    return Setup(
        runs={
            "varstream": lambda: vs.unpack(o.packed),
            "index_copy": partial(_scattered, o),
            "boolean": partial(_boolean_unpack, o),
            "copy_floor": floors.copy(o.moved["unpack"], device),
        },
        operand_bytes=o.x.nbytes,
    )


def _build_gather(dtype: str, shape: Shape, device: torch.device, seed: int) -> Setup:
    o = Operands(shape, getattr(torch, dtype), device, seed)
    return Setup(
        runs={
            "varstream": lambda: torch.ops.varstream.pack(o.rows, o.indices),
            "index_select": lambda: o.rows.index_select(0, o.indices),
            "copy_floor": floors.copy(o.moved["pack"], device),
        },
        operand_bytes=o.x.nbytes,
    )


def _build_scatter(dtype: str, shape: Shape, device: torch.device, seed: int) -> Setup:
    o = Operands(shape, getattr(torch, dtype), device, seed)
    rows = o.rows.shape[0]
    return Setup(
        runs={
            "varstream": lambda: torch.ops.varstream.unpack(o.values, o.indices, rows, 0.0),
            "index_copy": lambda: _scattered(o).flatten(0, 1),
            "copy_floor": floors.copy(o.moved["unpack"], device),
        },
        operand_bytes=o.x.nbytes,
    )


# name, batch, padded length, trailing width, dtype
SHAPES = (
    ("hidden_4096_bf16", 16, 2048, 4096, "bfloat16"),
    ("hidden_1024_bf16", 64, 512, 1024, "bfloat16"),
    ("hidden_768_fp32", 64, 512, 768, "float32"),
    ("odd_width_77_bf16", 64, 2048, 77, "bfloat16"),
    ("token_ids_int64", 256, 4096, 0, "int64"),
)
ON_CPU = ("hidden_768_fp32", "hidden_1024_bf16", "token_ids_int64")
# topic, operator, build, the peer that is the right result, other peers
PUBLIC: tuple[tuple[str, str, Any, str, tuple[str, ...]], ...] = (
    ("pack", "pack", _build_pack, "index_select", ("boolean",)),
    ("unpack", "unpack", _build_unpack, "index_copy", ("boolean",)),
)
ROWS: tuple[tuple[str, str, Any, str, tuple[str, ...]], ...] = (
    ("pack_rows", "pack", _build_gather, "index_select", ()),
    ("unpack_rows", "unpack", _build_scatter, "index_copy", ()),
)


def _cases(
    topics: tuple[tuple[str, str, Any, str, tuple[str, ...]], ...],
    names: tuple[str, ...],
    devices: tuple[str, ...],
    note: str,
) -> tuple[Case, ...]:
    return tuple(
        Case(
            f"{topic}/{name}",
            op,
            {"batch": batch, "seqlen": seqlen, "width": width},
            partial(build, dtype),
            {"batch": 3, "seqlen": 11, "width": min(width, 5)},
            dtype=dtype,
            devices=devices,
            peers=(*map(Peer, (reference, *others)), floor("copy_floor")),
            reference=reference,
            tolerance=0.0,
            note=note,
        )
        for topic, op, build, reference, others in topics
        for name, batch, seqlen, width, dtype in SHAPES
        if name in names
    )


CASES = (
    *_cases(PUBLIC, ON_CPU, ("cpu", "cuda"), COPY_NOTE),
    *_cases(
        ROWS,
        tuple(shape[0] for shape in SHAPES),
        ("cuda",),
        f"the row copy alone, indices known; {COPY_NOTE}",
    ),
)
