"""``relative_attention``: the public call, and its op's kernels, fakes and autograd formula."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from varstream import _load
from varstream._checks import (
    FLOATING,
    INTEGERS,
    check_bool,
    check_cu_seqlens,
    check_float,
    check_int,
    check_same_dtype,
    check_tensor,
    op_errors,
    values_visible,
)
from varstream.ops._autocast import cast_for_autocast
from varstream.ops._head import refuse_second_derivative
from varstream.reference import relative_attention as reference
from varstream.reference.relative_attention_backward import backward

NAME = "relative_attention"
TABLES = ("table", "key_table", "query_table")


class Call(NamedTuple):
    """The op's arguments after q, k and v, in schema order, checked and with every default
    resolved."""

    cu_seqlens: Tensor
    buckets: Tensor
    table: Tensor | None
    key_table: Tensor | None
    query_table: Tensor | None
    rng_state: Tensor | None
    max_seqlen: int
    softmax_scale: float
    dropout_p: float
    deterministic: bool


def relative_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    buckets: Tensor,
    *,
    max_seqlen: int | None = None,
    table: Tensor | None = None,
    key_table: Tensor | None = None,
    query_table: Tensor | None = None,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    deterministic: bool = False,
    rng_state: Tensor | None = None,
    validate: bool = False,
) -> Tensor:
    """Bidirectional self-attention over packed sequences with bias by relative position.

    With ``r = buckets[M - 1 + j - i]``, i the query's and j the key's index in their sequence, head
    h's score is ``softmax_scale * q_i . k_j + table[r, h] + q_i . key_table[r, h] + k_j .
    query_table[r, h]``; a table that isn't given adds nothing. No score matrix of the batch exists,
    and the backward forms the scores again in pieces.

    Args:
        q: ``(total, H, D)``, float64, float32, bfloat16 or float16.
        k: ``(total, H, D)``.
        v: ``(total, H, Dv)``.
        cu_seqlens: int32 ``(B+1,)`` cumulative lengths. With ``max_seqlen`` given they may end
            before ``total``: the rows left over are an inert tail (out 0, gradients 0).
        buckets: int64 or int32 ``(2 M - 1,)``, M at least ``max_seqlen``: the table row of each
            distance j - i from -(M - 1) to M - 1.
        max_seqlen: upper bound of the lengths; ``None`` reads it from ``cu_seqlens``.
        table: ``(R, H)``, any floating dtype: the bias of T5 and MPNet; differentiable.
        key_table: ``(R, H, D)``, likewise: DeBERTa's content-to-position term. No scale is applied
            to it: fold in your own.
        query_table: ``(R, H, D)``, likewise: its position-to-content term.
        softmax_scale: factor on q.k, default ``1 / sqrt(D)``.
        dropout_p: probability of dropping a probability, in [0, 1).
        deterministic: make the backward bitwise repeatable on CUDA too (always so on the CPU).
        rng_state: int64 ``(2,)`` dropout state; ``None`` draws one with torch's generator.
        validate: check the values in ``cu_seqlens`` and ``buckets`` on a GPU too (a device
            synchronisation); on the CPU they always are.

    Returns:
        out ``(total, H, Dv)`` in q's dtype; it can be differentiated once.

    Raises:
        TypeError, ValueError: an argument breaks its contract; the message names it.

    Source: T5 (1910.10683), MPNet (2004.09297) and DeBERTa (2006.03654) for the terms;
    Philox4x32-10 for dropout, with the same draws as ``varlen_attention``.
    """
    q, k, v = cast_for_autocast(q, k, v)
    call = _check(
        q,
        k,
        v,
        cu_seqlens,
        buckets,
        table,
        key_table,
        query_table,
        rng_state,
        max_seqlen,
        softmax_scale,
        dropout_p,
        deterministic,
        validate=validate,
    )
    out: Tensor = torch.ops.varstream.relative_attention(q, k, v, *call)
    return out


# --- checks ---------------------------------------------------------------------------------------


def _check(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens: Any,
    buckets: Any,
    table: Any,
    key_table: Any,
    query_table: Any,
    rng_state: Any,
    max_seqlen: Any,
    softmax_scale: Any,
    dropout_p: Any,
    deterministic: Any,
    *,
    validate: Any = False,
) -> Call:
    check_bool("validate", validate)
    check_tensor("q", q, ndim=3, dtypes=FLOATING, layout="(total, H, D)")
    check_tensor("k", k, shape=q.shape, device=q.device, layout="(total, H, D)")
    value_shape = (*q.shape[:2], None)
    check_tensor("v", v, shape=value_shape, device=q.device, layout="(total, H, Dv)")
    check_same_dtype(q=q, k=k, v=v)
    for name, tensor in (("q", q), ("v", v)):
        if tensor.shape[2] < 1:
            raise ValueError(f"{name} must have a head dim of at least 1, got 0")
    max_seqlen = _check_lengths(cu_seqlens, max_seqlen, q, validate)
    heads, width = q.shape[1:]
    rows = _check_tables(
        {
            "table": (table, (heads,)),
            **{
                name: (t, (heads, width))
                for name, t in (("key_table", key_table), ("query_table", query_table))
            },
        },
        q.device,
    )
    _check_buckets(buckets, max_seqlen, rows, q.device, validate)
    dropout_p = check_float("dropout_p", dropout_p, low=0.0, high=1.0)
    if dropout_p == 1.0:
        raise ValueError("dropout_p must be below 1, got 1.0")
    if rng_state is not None:
        check_tensor("rng_state", rng_state, shape=(2,), dtypes=(torch.int64,), device=q.device)
    elif dropout_p > 0.0:
        rng_state = torch.randint(2**62, (2,), dtype=torch.int64, device=q.device)
    if softmax_scale is None:
        softmax_scale = 1.0 / math.sqrt(width)
    return Call(
        cu_seqlens,
        buckets,
        table,
        key_table,
        query_table,
        rng_state,
        max_seqlen,
        check_float("softmax_scale", softmax_scale),
        dropout_p,
        check_bool("deterministic", deterministic),
    )


def _check_lengths(cu: Any, max_seqlen: Any, q: Tensor, validate: bool) -> int:
    """Check the cumulative lengths and return an upper bound of the lengths."""
    total = q.shape[0]
    if max_seqlen is None:
        check_cu_seqlens("cu_seqlens", cu, total, q.device, validate)
        return int((cu[1:] - cu[:-1]).max()) if cu.shape[0] > 1 else 0
    check_cu_seqlens("cu_seqlens", cu, None, q.device, validate)
    check_int("max_seqlen", max_seqlen, low=0)
    if values_visible(cu, validate=validate):
        values = cu.tolist()
        if values[-1] > total:
            raise ValueError(f"cu_seqlens must not pass q's {total} rows, got {values[-1]}")
        longest = max((b - a for a, b in pairwise(values)), default=0)
        if longest > max_seqlen:
            raise ValueError(
                f"max_seqlen must be at least the longest length {longest}, got {max_seqlen}"
            )
    return max_seqlen


def _check_tables(
    tables: dict[str, tuple[Any, tuple[int, ...]]], device: torch.device
) -> int | None:
    """Check the tables that are given and return their number of rows."""
    rows, first = None, ""
    for name, (table, shape) in tables.items():
        if table is None:
            continue
        layout = "(R, H)" if len(shape) == 1 else "(R, H, D)"
        check_tensor(
            name, table, shape=(None, *shape), dtypes=FLOATING, device=device, layout=layout
        )
        if rows is None:
            rows, first = table.shape[0], name
        if table.shape[0] < 1:
            raise ValueError(f"{name} must have at least one row {layout}, got none")
        if table.shape[0] != rows:
            raise ValueError(
                f"{name} must have {rows} rows like {first}, got shape {tuple(table.shape)}"
            )
    return rows


def _check_buckets(
    buckets: Any, max_seqlen: int, rows: int | None, device: torch.device, validate: bool
) -> None:
    check_tensor("buckets", buckets, ndim=1, dtypes=INTEGERS, device=device, layout="(2 M - 1,)")
    if buckets.shape[0] % 2 != 1:
        raise ValueError(
            "buckets must have an odd number of entries (2 M - 1,), distance 0 in the middle, "
            f"got {buckets.shape[0]}"
        )
    if buckets.shape[0] < 2 * max_seqlen - 1:
        raise ValueError(
            f"buckets must have at least 2 * {max_seqlen} - 1 entries, one a distance, "
            f"got {buckets.shape[0]}"
        )
    if rows is not None and values_visible(buckets, validate=validate):
        low, high = (int(value) for value in buckets.aminmax())
        if low < 0 or high >= rows:
            raise ValueError(
                f"buckets must be between 0 and the tables' last row {rows - 1}, "
                f"got {low if low < 0 else high}"
            )


# --- kernels, fakes, autograd ---------------------------------------------------------------------


def _guard(name: str, q: Tensor, k: Tensor, v: Tensor, call: Call, dout: Tensor | None) -> None:
    """The op's own checks: what the public call has checked already, a direct call has not."""
    with op_errors(name):
        _check(q, k, v, *call)
        if call.dropout_p > 0.0 and call.rng_state is None:
            raise ValueError("rng_state must be given when dropout_p > 0, got None")
        if dout is not None:
            check_tensor(
                "dout",
                dout,
                shape=v.shape,
                dtypes=(q.dtype,),
                device=q.device,
                layout="(total, H, Dv)",
            )


def _options(call: Call) -> reference.Options:
    return reference.Options(
        call.cu_seqlens,
        call.buckets,
        call.table,
        call.key_table,
        call.query_table,
        call.rng_state,
        call.softmax_scale,
        call.dropout_p,
        call.deterministic,
    )


@_load.composed_kernel(NAME)
def _forward(q: Tensor, k: Tensor, v: Tensor, *call: Any) -> Tensor:
    _guard(NAME, q, k, v, Call(*call), None)
    return reference.forward(q, k, v, _options(Call(*call)))


@_load.fake_kernel(NAME)
def _fake(q: Tensor, k: Tensor, v: Tensor, *call: Any) -> Tensor:
    return v.new_empty(v.shape)


@_load.composed_kernel(f"{NAME}_bwd")
def _backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    call, need_tables = Call(*rest[:-1]), rest[-1]
    _guard(f"{NAME}_bwd", q, k, v, call, dout)
    dq, dk, dv, tables = backward(dout, q, k, v, _options(call), need_tables)
    return dq, dk, dv, *(q.new_empty(0) if t is None else t for t in tables)


@_load.fake_kernel(f"{NAME}_bwd")
def _backward_fake(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    call, need_tables = Call(*rest[:-1]), rest[-1]
    tables = (call.table, call.key_table, call.query_table)
    return *(t.new_empty(t.shape) for t in (q, k, v)), *(
        q.new_empty(0) if t is None or not need_tables else t.new_empty(t.shape) for t in tables
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, *call = inputs
    tensors, ctx.scalars = call[:6], call[6:]
    ctx.save_for_backward(q, k, v, *tensors)


def _autograd(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, *tensors = ctx.saved_tensors
    call = Call(*tensors, *ctx.scalars)
    # q, k, v, cu_seqlens and buckets come before the tables
    need_tables = any(ctx.needs_input_grad[5:8])
    dq, dk, dv, *dtables = torch.ops.varstream.relative_attention_bwd(
        dout, q, k, v, *call, need_tables
    )
    grads: dict[str, Tensor | None] = dict.fromkeys(Call._fields)
    for name, grad in zip(TABLES, dtables, strict=True):
        grads[name] = grad if need_tables and getattr(call, name) is not None else None
    return dq, dk, dv, *grads.values()


def _no_double_backward(ctx: Any, *grads: Tensor | None) -> None:
    refuse_second_derivative(NAME)


_load.autograd(NAME, _setup_context)(_autograd)
_load.autograd(f"{NAME}_bwd")(_no_double_backward)
