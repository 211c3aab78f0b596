"""``vs.varlen_attention`` and ``vs.varlen_attention_backward`` over packed sequences.

The peers are what PyTorch offers for ragged batches: SDPA over the padded batch with a mask, a loop
of SDPA calls, nested tensors, FlexAttention with a document mask, and the packages for GPUs. The
floor is a rate, no run of the same shape: the operations of the visible scores at the speed of a
large matrix product measured in the same rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

import varstream as vs

from .. import floors, lengths, peers
from ..case import Bar, Case, Peer, Setup, Shape, floor

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
FLEX_BLOCK = 128


class Operands:
    """Packed q, k, v (total, H, D), their gradient's direction, and the same rows padded."""

    def __init__(
        self, shape: Shape, causal: bool, dtype: torch.dtype, device: torch.device, seed: int
    ) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.causal, self.seqlen = causal, shape["seqlen"]
        low = shape["shortest_percent"] / 100
        fill = low + (1 - low) * torch.rand(shape["batch"], generator=draw)
        self.lengths = [max(1, int(f * self.seqlen)) for f in fill.tolist()]
        self.cu = torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device=device)
        size = (sum(self.lengths), shape["heads"], shape["head_dim"])

        def normal() -> Tensor:
            return torch.randn(size, generator=draw).to(device, dtype)

        self.packed = [normal().requires_grad_() for _ in range(3)]
        self.dout = normal()
        real = torch.arange(self.seqlen) < torch.tensor(self.lengths)[:, None]
        self.real = real.to(device)  # (B, S)
        self.padded = [self.pad(t).requires_grad_() for t in self.packed]
        self.padded_dout = self.pad(self.dout)
        mask = self.real[:, None, None, :].expand(-1, 1, self.seqlen, -1)
        if causal:
            mask = mask & torch.ones_like(mask[0, 0]).tril()
        self.mask = mask.contiguous()

    def pad(self, t: Tensor) -> Tensor:
        """(total, H, D) to a padded batch (B, H, S, D)."""
        padded = t.new_zeros(*self.real.shape, *t.shape[1:])
        padded[self.real] = t.detach()
        return padded.transpose(1, 2).contiguous()

    def unpad(self, found: tuple[Tensor, ...]) -> list[Tensor]:
        """The real rows of results over the padded batch."""
        return [t.transpose(1, 2)[self.real] for t in found]

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def flops(self, backward: bool) -> float:
        """Operations of the visible scores."""
        _, heads, width = self.packed[0].shape
        pairs = lengths.visible_pairs(self.lengths, self.causal)
        products = lengths.FORWARD_PRODUCTS + lengths.BACKWARD_PRODUCTS * backward
        return lengths.flops(products, pairs, heads, width)


def _differentiated(
    o: Operands, attend: Callable[[Operands, list[Tensor]], Any], backward: bool
) -> list[Tensor]:
    """out (total, H, D) of packed rows and, with ``backward``, dq, dk, dv."""
    if not backward:
        with torch.no_grad():
            return [attend(o, o.packed)]
    out = attend(o, o.packed)
    return [out.detach(), *torch.autograd.grad(out, o.packed, o.dout)]


def _ours(o: Operands, packed: list[Tensor]) -> Any:
    return vs.varlen_attention(
        *packed, o.cu, max_seqlen_q=o.longest, max_seqlen_k=o.longest, causal=o.causal
    )


def _loop(o: Operands, packed: list[Tensor]) -> Tensor:
    parts = zip(*(t.split(o.lengths) for t in packed), strict=True)
    outs = [sdpa(*(t.transpose(0, 1)[None] for t in part), is_causal=o.causal) for part in parts]
    return torch.cat([out[0].transpose(0, 1) for out in outs])


def _nested(o: Operands, packed: list[Tensor]) -> Tensor:
    offsets = o.cu.long()
    sizes = {"min_seqlen": min(o.lengths), "max_seqlen": o.longest}
    q, k, v = (
        torch.nested.nested_tensor_from_jagged(t, offsets, **sizes).transpose(1, 2) for t in packed
    )
    return sdpa(q, k, v, is_causal=o.causal).transpose(1, 2).values()


@cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


class _Flex:
    """FlexAttention over all rows as one sequence, with a mask of the documents; the mask is made
    once, as a model makes it once for all its layers."""

    def __init__(self) -> None:
        self.mask: Any = None

    def __call__(self, o: Operands, packed: list[Tensor]) -> Tensor:
        total = packed[0].shape[0]
        rows = -(-total // FLEX_BLOCK) * FLEX_BLOCK
        if self.mask is None:
            self.mask = self._document_mask(o, rows)
        spare = (0, 0, 0, 0, 0, rows - total)
        q, k, v = (torch.nn.functional.pad(t, spare).transpose(0, 1)[None] for t in packed)
        out = _compiled_flex()(q, k, v, block_mask=self.mask)
        return out[0].transpose(0, 1)[:total]

    def _document_mask(self, o: Operands, rows: int) -> Any:
        from torch.nn.attention.flex_attention import create_block_mask

        counts = torch.tensor([*o.lengths, rows - sum(o.lengths)])
        document = torch.repeat_interleave(torch.arange(len(counts)), counts).to(o.cu.device)

        def visible(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
            same = document[i] == document[j]
            return same & (j <= i) if o.causal else same

        return create_block_mask(visible, None, None, rows, rows, device=str(o.cu.device))


def _flash_attn(o: Operands, packed: list[Tensor]) -> Any:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(*packed, o.cu, o.cu, o.longest, o.longest, causal=o.causal)


def _varlen_attn(o: Operands, packed: list[Tensor]) -> Any:
    from torch.nn.attention.varlen import varlen_attn

    window = {"window_size": (-1, 0)} if o.causal else {}
    return varlen_attn(*packed, o.cu, o.cu, o.longest, o.longest, **window)


def _padded(o: Operands, backward: bool, backend: Any = None) -> list[Tensor]:
    """SDPA on the padded batch, by a backend that is named or torch's own choice."""

    def attend(padded: list[Tensor]) -> Tensor:
        if backend is None:
            return sdpa(*padded, attn_mask=o.mask)
        with torch.nn.attention.sdpa_kernel(backend):
            return sdpa(*padded, attn_mask=o.mask)

    if not backward:
        with torch.no_grad():
            return [attend(o.padded)]
    out = attend(o.padded)
    return [out.detach(), *torch.autograd.grad(out, o.padded, o.padded_dout)]


def _float64(o: Operands, backward: bool) -> list[Tensor]:
    """The loop in float64."""
    packed = [t.detach().double().requires_grad_() for t in o.packed]
    out = _loop(o, packed)
    grads = torch.autograd.grad(out, packed, o.dout.double()) if backward else ()
    return [out.detach(), *grads]


def _build(
    causal: bool, backward: bool, dtype: str, shape: Shape, device: torch.device, seed: int
) -> Setup:
    o = Operands(shape, causal, getattr(torch, dtype), device, seed)
    run = partial(_differentiated, o, backward=backward)
    product, scale = floors.gemm_rate(o.flops(backward), o.dout.dtype, device)
    packed_ways: Mapping[str, Callable[[Operands, list[Tensor]], Any]] = {
        "varstream": _ours,
        "loop_sdpa": _loop,
        "nested_sdpa": _nested,
        "flex_attention": _Flex(),
        "flash_attn": _flash_attn,
        "torch_varlen": _varlen_attn,
    }
    cudnn = torch.nn.attention.SDPBackend.CUDNN_ATTENTION
    return Setup(
        runs={
            **{name: partial(run, attend) for name, attend in packed_ways.items()},
            "padded_sdpa": partial(_padded, o, backward),
            "cudnn_sdpa": partial(_padded, o, backward, cudnn),
            "float64": partial(_float64, o, backward),
            "gemm_rate": product,
        },
        results={"padded_sdpa": o.unpad, "cudnn_sdpa": o.unpad},
        scales={"gemm_rate": scale},
        figures=lambda peaks, ours: {"fill": sum(o.lengths) / o.real.numel()},
        operand_bytes=4 * o.dout.nbytes,
    )


def _peers(causal: bool, backward: bool, device: str) -> tuple[Peer, ...]:
    half = peers.never("takes float16 and bfloat16 only")
    nested = peers.never("torch's nested SDPA refuses is_causal") if causal else peers.cpu
    flex = peers.never("FlexAttention has no backward on the CPU") if backward else peers.cpu
    on_gpu = device == "cuda"
    return (
        Peer("padded_sdpa"),
        Peer("loop_sdpa"),
        Peer("nested_sdpa", peers.cuda if on_gpu else nested),
        Peer("flex_attention", peers.cuda if on_gpu else flex),
        Peer("torch_varlen", peers.varlen_attn if on_gpu else peers.every(peers.cuda, half)),
        Peer("flash_attn", peers.flash_attn if on_gpu else peers.every(peers.cuda, half)),
        Peer("cudnn_sdpa", peers.cudnn if on_gpu else peers.every(peers.cuda, half)),
        floor("gemm_rate"),
    )


BARS = (Bar("time/padded_sdpa", 0.5), Bar("time/loop_sdpa", 1.10))
MAIN = {"batch": 16, "seqlen": 512, "heads": 8, "head_dim": 64, "shortest_percent": 20}
TINY = {"batch": 256, "seqlen": 64, "heads": 8, "head_dim": 64, "shortest_percent": 20}
LONG = {"batch": 1, "seqlen": 4096, "heads": 8, "head_dim": 64, "shortest_percent": 100}
GPU = {"batch": 16, "seqlen": 2048, "heads": 16, "head_dim": 128, "shortest_percent": 20}
QUICK = {"batch": 3, "seqlen": 24, "heads": 2, "head_dim": 8}


def _case(
    name: str,
    shape: Shape,
    causal: bool,
    backward: bool = True,
    bars: tuple[Bar, ...] = (),
    device: str = "cpu",
) -> Case:
    dtype = "float32" if device == "cpu" else "bfloat16"
    return Case(
        f"attention/{name}",
        "varlen_attention",
        shape,
        partial(_build, causal, backward, dtype),
        QUICK,
        dtype=dtype,
        devices=(device,),
        peers=_peers(causal, backward, device),
        bars=bars,
        tolerance=TOLERANCE[dtype],
        note=("causal, " if causal else "")
        + ("forward and backward" if backward else "forward")
        + "; gemm_rate: the visible scores' operations at the speed of a matrix product",
    )


CASES = (
    _case("main", MAIN, False, bars=BARS),
    _case("main_causal", MAIN, True, bars=BARS),
    _case("main_forward", MAIN, False, backward=False),
    _case("main_causal_forward", MAIN, True, backward=False),
    _case("many_tiny", TINY, True),
    _case("one_long", LONG, True),
    _case("gpu", GPU, False, device="cuda"),
    _case("gpu_causal", GPU, True, device="cuda"),
    _case("gpu_forward", GPU, True, backward=False, device="cuda"),
)
