"""ByteTransformer's BERT layer, same name, arguments and meaning, composed from our operators.

Where the two differ: any floating dtype and any device, a backward, real tokens anywhere in a
sequence, any feed-forward width, accumulation in float32 (float64 for float64).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from varstream._checks import (
    FLOATING,
    INTEGERS,
    check_bool,
    check_int,
    check_mask_values,
    check_same_dtype,
    check_tensor,
)
from varstream.ops.attention import varlen_attention
from varstream.ops.bias_residual_layer_norm import bias_residual_layer_norm
from varstream.ops.linear_bias_gelu import linear_bias_gelu
from varstream.ops.packing import Packed, pack, unpack

EPS = 1e-6  # of both norms, as in ByteTransformer's kernels
_MASKS = (torch.bool, torch.uint8, torch.int8, torch.int16, *INTEGERS, *FLOATING)


class _Weights(NamedTuple):
    """A layer's weights in ByteTransformer's order; H = head_num * head_size."""

    qkv_kernel: Tensor  # (H, 3 H), columns of queries, keys, values, each by head
    qkv_bias: Tensor  # (3 H,)
    attr_output_kernel: Tensor  # (H, H)
    attr_output_bias: Tensor  # (H,)
    attr_output_layernorm_gamma: Tensor  # (H,)
    attr_output_layernorm_beta: Tensor  # (H,)
    inter_kernel: Tensor  # (H, F)
    inter_bias: Tensor  # (F,)
    output_kernel: Tensor  # (F, H)
    output_bias: Tensor  # (H,)
    output_layernorm_gamma: Tensor  # (H,)
    output_layernorm_beta: Tensor  # (H,)


@torch._disable_dynamo  # the number of real tokens is a value in the data
def bert_transformer(
    head_num: int,
    head_size: int,
    qkv_kernel: Tensor,
    qkv_bias: Tensor,
    attr_output_kernel: Tensor,
    attr_output_bias: Tensor,
    attr_output_layernorm_gamma: Tensor,
    attr_output_layernorm_beta: Tensor,
    inter_kernel: Tensor,
    inter_bias: Tensor,
    output_kernel: Tensor,
    output_bias: Tensor,
    output_layernorm_gamma: Tensor,
    output_layernorm_beta: Tensor,
    input: Tensor,
    attr_mask: Tensor,
    is_remove_padding: bool = True,
    use_fused_attention: bool = True,
) -> Tensor:
    """One post-norm BERT layer, ``torch.ops.ByteTransformer.BertTransformer``.

    ``q, k, v = input qkv_kernel + qkv_bias``, ``x = norm(attention(q, k, v) attr_output_kernel +
    attr_output_bias + input)``, ``norm(gelu(x inter_kernel + inter_bias) output_kernel +
    output_bias + x)``, with GELU's tanh form, norms with eps 1e-6 and scores over
    ``sqrt(head_size)``. H is ``head_num * head_size``. Differentiable in ``input`` and all weights.

    Args:
        head_num: heads.
        head_size: width of a head, as ``varlen_attention`` takes it.
        qkv_kernel: ``(H, 3 H)``, kernels lead from rows to columns; the columns are those of the
            queries, of the keys and of the values.
        qkv_bias: ``(3 H,)``.
        attr_output_kernel, attr_output_bias: ``(H, H)`` and ``(H,)``.
        attr_output_layernorm_gamma, attr_output_layernorm_beta: ``(H,)``, in the dtype of ``input``
            or in float32.
        inter_kernel, inter_bias: ``(H, F)`` and ``(F,)``.
        output_kernel, output_bias: ``(F, H)`` and ``(H,)``.
        output_layernorm_gamma, output_layernorm_beta: as those of the first norm.
        input: ``(B, S, H)`` float64, float32, bfloat16 or float16; the weights have its dtype.
        attr_mask: ``(B, S, S)`` of 0 and 1, bool, integer or floating: row i holds 1 at the keys
            that query i sees. Every row of a sequence must mark the same keys, its real tokens,
            which may stand anywhere; rows of padding may be all 0 instead.
        is_remove_padding: run on real tokens only; padded positions of the result then hold 0 and
            get no gradient. False runs every position: a padded query attends to the keys of its
            row of ``attr_mask``, and to nothing (attention 0) where that is all 0.
        use_fused_attention: chooses among ByteTransformer's kernels, not the result; here there is
            one attention, without score matrix, for both.

    Returns:
        ``(B, S, H)`` in the dtype of ``input`` (float32 under autocast).

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a wrong shape, dtype or device, or a mask that is none of real tokens, such as a
            causal one; the message names it. The mask is always looked at: counting real tokens
            costs a device synchronisation anyway.

    Source: ByteTransformer (arXiv 2210.03052), argument order and eps of its public code.
    """
    weights = _Weights(
        qkv_kernel,
        qkv_bias,
        attr_output_kernel,
        attr_output_bias,
        attr_output_layernorm_gamma,
        attr_output_layernorm_beta,
        inter_kernel,
        inter_bias,
        output_kernel,
        output_bias,
        output_layernorm_gamma,
        output_layernorm_beta,
    )
    _check(head_num, head_size, weights, input, attr_mask)
    check_bool("is_remove_padding", is_remove_padding)
    check_bool("use_fused_attention", use_fused_attention)
    seen = attr_mask != 0
    tokens = _real_tokens(seen)
    if is_remove_padding:
        packed = pack(input, tokens)
        return unpack(packed, _layer(weights, head_num, packed.values, packed))
    rows = pack(input, torch.ones_like(tokens))  # every position
    return unpack(rows, _layer(weights, head_num, rows.values, rows, tokens, seen.any(-1)))


class BertTransformer(nn.Module):
    """The layer with its weights, ``torch.classes.ByteTransformer.BertTransformer``.

    Args:
        head_num, head_size: as in ``bert_transformer``.
        weights: its twelve weights, from ``qkv_kernel`` to ``output_layernorm_beta``, by position
            or by name; they become parameters over the same memory.

    Raises:
        TypeError, ValueError: as ``bert_transformer``.
    """

    def __init__(self, head_num: int, head_size: int, *weights: Tensor, **named: Tensor) -> None:
        super().__init__()
        try:
            given = _Weights(*weights, **named)
        except TypeError:
            names = ", ".join(_Weights._fields)
            raise TypeError(
                f"weights must be the twelve {names}, got {len(weights)} by position and "
                f"{sorted(named)} by name"
            ) from None
        first = check_tensor("qkv_kernel", given.qkv_kernel, dtypes=FLOATING)
        _check_weights(head_num, head_size, given, "qkv_kernel", first)
        self.head_num, self.head_size = head_num, head_size
        for name, value in given._asdict().items():
            own = value if isinstance(value, nn.Parameter) else nn.Parameter(value)
            self.register_parameter(name, own)

    def forward(self, input: Tensor, attr_mask: Tensor) -> Tensor:
        """``bert_transformer`` on real tokens: ``(B, S, H)``, ``(B, S, S)`` to ``(B, S, H)``."""
        return self.forwardv2(input, attr_mask, True, True)

    def forwardv2(
        self, input: Tensor, attr_mask: Tensor, is_remove_padding: bool, use_fused_attention: bool
    ) -> Tensor:
        """``bert_transformer`` with its options."""
        weights = {name: getattr(self, name) for name in _Weights._fields}
        return bert_transformer(
            self.head_num,
            self.head_size,
            **weights,
            input=input,
            attr_mask=attr_mask,
            is_remove_padding=is_remove_padding,
            use_fused_attention=use_fused_attention,
        )


# --- checks ---------------------------------------------------------------------------------------


def _check(head_num: Any, head_size: Any, weights: _Weights, input: Any, attr_mask: Any) -> None:
    check_tensor("input", input, ndim=3, dtypes=FLOATING, layout="(B, S, H)")
    _check_weights(head_num, head_size, weights, "input", input)
    batch, seqlen, _ = input.shape
    check_tensor("input", input, shape=(None, None, head_num * head_size), layout="(B, S, H)")
    shape = batch, seqlen, seqlen
    check_tensor("attr_mask", attr_mask, shape=shape, dtypes=_MASKS, layout="(B, S, S)")
    check_tensor("attr_mask", attr_mask, device=input.device)
    check_mask_values("attr_mask", attr_mask)


def _check_weights(
    head_num: Any, head_size: Any, weights: _Weights, name: str, like: Tensor
) -> None:
    """Check the weights, all on the device of ``like`` and, but for the norms, in its dtype."""
    h = check_int("head_num", head_num, low=1) * check_int("head_size", head_size, low=1)
    check_tensor("inter_bias", weights.inter_bias, ndim=1, layout="(F,)")
    f = weights.inter_bias.shape[0]
    shapes: dict[str, tuple[tuple[int, ...], str]] = {
        "qkv_kernel": ((h, 3 * h), "(H, 3 H)"),
        "qkv_bias": ((3 * h,), "(3 H,)"),
        "attr_output_kernel": ((h, h), "(H, H)"),
        "inter_kernel": ((h, f), "(H, F)"),
        "inter_bias": ((f,), "(F,)"),
        "output_kernel": ((f, h), "(F, H)"),
    }
    for field, value in weights._asdict().items():
        shape, layout = shapes.get(field, ((h,), "(H,)"))
        check_tensor(field, value, shape=shape, dtypes=FLOATING, layout=layout)
        check_tensor(field, value, device=like.device)
        if "layernorm" not in field or value.dtype != torch.float32:
            check_same_dtype(**{name: like} | {field: value})


def _real_tokens(seen: Tensor) -> Tensor:
    """The real tokens (B, S) of a mask (B, S, S): the keys that every query sees.

    Raises:
        ValueError: queries see different keys.
    """
    tokens = seen.diagonal(dim1=1, dim2=2)  # a real token sees itself
    same = (seen == tokens[:, None]).all(-1)
    fits = same | ~(tokens | seen.any(-1))
    if not bool(fits.all()):
        sequence, row = (~fits).nonzero()[0].tolist()
        raise ValueError(
            "attr_mask must mark the real tokens of a sequence in each of its rows (rows of "
            "padding may be all 0); a causal or any other mask can't be honoured, got row "
            f"{row} of sequence {sequence} with other keys"
        )
    return tokens


# --- the layer ------------------------------------------------------------------------------------


def _layer(
    weights: _Weights,
    heads: int,
    x: Tensor,
    rows: Packed,
    tokens: Tensor | None = None,
    looking: Tensor | None = None,
) -> Tensor:
    """Packed rows x (total, H) to the layer's output (total, H).

    Where x holds every position, ``tokens`` (B, S) tells which are keys and ``looking`` (B, S)
    which attend to any.
    """
    w, dtype = weights, x.dtype
    split = 3, heads, x.shape[1] // heads
    qkv = linear(x, w.qkv_kernel.t(), w.qkv_bias).unflatten(-1, split)
    q, k, v = qkv.unbind(1)
    lengths: dict[str, Any] = {"max_seqlen_q": rows.max_seqlen}
    if tokens is not None:
        keys = pack(qkv[:, 1:].unflatten(0, tokens.shape), tokens)
        k, v = keys.values.unbind(1)
        lengths |= {"cu_seqlens_k": keys.cu_seqlens, "max_seqlen_k": keys.max_seqlen}
    repeatable = torch.are_deterministic_algorithms_enabled()
    h = varlen_attention(q, k, v, rows.cu_seqlens, deterministic=repeatable, **lengths)
    assert isinstance(h, Tensor)
    if looking is not None:
        h = torch.where(looking.view(-1, 1, 1), h, 0.0)
    first = w.attr_output_layernorm_gamma, w.attr_output_layernorm_beta
    x = _close(h.flatten(1), w.attr_output_kernel, w.attr_output_bias, x, first, dtype)
    h = linear_bias_gelu(x, w.inter_kernel.t(), w.inter_bias, "tanh")
    last = w.output_layernorm_gamma, w.output_layernorm_beta
    return _close(h, w.output_kernel, w.output_bias, x, last, dtype)


def _close(
    h: Tensor,
    kernel: Tensor,
    bias: Tensor,
    residual: Tensor,
    norm: tuple[Tensor, Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """``norm(h kernel + bias + residual)``; float32 norms of a narrower layer are not rounded."""
    x = linear(h, kernel.t())
    if all(t.dtype == dtype for t in norm):
        return bias_residual_layer_norm(x, bias, residual, *norm, EPS)
    x, bias, residual, gamma, beta = (t.float() for t in (x, bias, residual, *norm))
    return bias_residual_layer_norm(x, bias, residual, gamma, beta, EPS).to(dtype)
