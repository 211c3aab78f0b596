"""Ways to attention over a pack of sequences: ours, and what torch and the packages for GPUs offer.
Each takes a ``Pack`` and returns out (total, Hq, D), or says how to get it; ``attention_gradients``
differentiates them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from itertools import accumulate
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention as sdpa

import varstream as vs

from .case import OURS

FLEX_BLOCK = 128


@dataclass(frozen=True)
class Pack:
    """q (total, Hq, D), k and v (total, Hkv, D) of packed sequences, and their lengths.

    Attributes:
        dout: (total, Hq, D), the direction in which a backward differentiates.
        lengths: of the sequences' queries.
        prefix: keys that each sequence has before those of its queries; k and v have their rows.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    lengths: tuple[int, ...]
    causal: bool
    prefix: int = 0

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def key_lengths(self) -> tuple[int, ...]:
        return tuple(n + self.prefix for n in self.lengths)

    @property
    def longest_key(self) -> int:
        return self.longest + self.prefix

    @property
    def grouped(self) -> bool:
        return self.q.shape[1] != self.k.shape[1]

    def _cumulative(self, lengths: tuple[int, ...]) -> Tensor:
        return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=self.q.device)

    @cached_property
    def cu(self) -> Tensor:
        return self._cumulative(self.lengths)

    @cached_property
    def cu_k(self) -> Tensor:
        return self._cumulative(self.key_lengths) if self.prefix else self.cu

    @cached_property
    def offsets(self) -> Tensor:
        return self.cu.long()

    @cached_property
    def real(self) -> Tensor:
        """(B, S): the rows of a padded batch that are tokens."""
        lengths = torch.tensor(self.lengths, device=self.q.device)
        return torch.arange(self.longest, device=self.q.device) < lengths[:, None]

    @cached_property
    def padded(self) -> tuple[Tensor, ...]:
        """q, k, v as (B, H, S, D), leaves of a graph of their own; made on first use."""
        return tuple(self.pad(t).requires_grad_() for t in self.tensors)

    def pad(self, t: Tensor) -> Tensor:
        """(total, H, D) as (B, H, S, D), zeros after each sequence."""
        batch = t.new_zeros(*self.real.shape, *t.shape[1:])
        batch[self.real] = t.detach()
        return batch.transpose(1, 2).contiguous()

    def unpad(self, found: Tensor | Sequence[Tensor]) -> list[Tensor]:
        """The tokens' rows of padded results (B, H, S, D)."""
        padded = [found] if isinstance(found, Tensor) else found
        return [t.transpose(1, 2)[self.real] for t in padded]

    def float32(self) -> Pack:
        """The same numbers in float32."""
        q, k, v = (t.detach().float().requires_grad_() for t in self.tensors)
        return replace(self, q=q, k=k, v=v, dout=self.dout.float())


def draw(
    lengths: tuple[int, ...],
    causal: bool,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    prefix: int = 0,
) -> Pack:
    """A pack of normal numbers; the seed changes these, never the lengths."""
    generator = torch.Generator(device).manual_seed(seed)
    rows, keys = sum(lengths), sum(lengths) + prefix * len(lengths)

    def normal(rows: int, count: int) -> Tensor:
        size = (rows, count, head_dim)
        return torch.randn(size, generator=generator, dtype=dtype, device=device)

    q, *kv = normal(rows, heads), normal(keys, kv_heads), normal(keys, kv_heads)
    leaves = [t.requires_grad_() for t in (q, *kv)]
    return Pack(*leaves, normal(rows, heads), lengths, causal, prefix)


def ours(p: Pack, **options: Any) -> Any:
    return vs.varlen_attention(
        *p.tensors,
        p.cu,
        p.cu_k,
        max_seqlen_q=p.longest,
        max_seqlen_k=p.longest_key,
        causal=p.causal,
        **options,
    )


def float32(p: Pack) -> Tensor:
    """A sequence after the other in float32, every query head with keys of its own: the reference,
    whose memory is linear where float64's would not be."""
    group = p.q.shape[1] // p.k.shape[1]
    k, v = (t.float().repeat_interleave(group, 1).split(p.key_lengths) for t in (p.k, p.v))
    outs = []
    for part in zip(p.q.float().split(p.lengths), k, v, strict=True):
        n, keys = part[0].shape[0], part[1].shape[0]
        mask: Any = causal_lower_right(n, keys) if p.causal else None
        outs.append(sdpa(*(t.transpose(0, 1)[None] for t in part), attn_mask=mask))
    return torch.cat([out[0].transpose(0, 1) for out in outs])


# --- SDPA -----------------------------------------------------------------------------------------


def dense_sdpa(backend: Any, p: Pack) -> Tensor:
    """SDPA by one backend over sequences of equal length, which need no copy: (B, S, H, D)."""
    q, k, v = (t.unflatten(0, (len(p.lengths), -1)).transpose(1, 2) for t in p.tensors)
    with torch.nn.attention.sdpa_kernel(backend):
        out = sdpa(q, k, v, is_causal=p.causal, enable_gqa=p.grouped)
    return out.transpose(1, 2).flatten(0, 1)


def padded_sdpa(backend: Any, p: Pack) -> Tensor:
    """SDPA by one backend, or by torch's choice, over the padded batch, (B, H, S, D).

    Causal batches need no mask: the padding stands after every token. The batch is padded once.
    """
    mask = None if p.causal else p.real[:, None, None, :]
    call = partial(sdpa, *p.padded, attn_mask=mask, is_causal=p.causal, enable_gqa=p.grouped)
    if backend is None:
        return call()
    with torch.nn.attention.sdpa_kernel(backend):
        return call()


def nested_sdpa(p: Pack) -> Tensor:
    """SDPA over jagged nested tensors, made of the same rows without a copy."""
    sizes = {"min_seqlen": min(p.lengths), "max_seqlen": p.longest}
    q, k, v = (
        torch.nested.nested_tensor_from_jagged(t, p.offsets, **sizes).transpose(1, 2)
        for t in p.tensors
    )
    grouped = {"enable_gqa": True} if p.grouped else {}
    out: Any = sdpa(q, k, v, is_causal=p.causal, **grouped).transpose(1, 2)
    return out.values()


# --- FlexAttention --------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _compiled_flex(lengths: tuple[int, ...], causal: bool) -> Any:
    """FlexAttention compiled for one case: what cases before compiled is dropped, so that no limit
    on recompilation is met and no shape becomes dynamic."""
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()
    torch._functorch.config.donated_buffer = False  # its backward runs more than once
    return torch.compile(flex_attention, dynamic=False)


@lru_cache(maxsize=1)
def _document_mask(lengths: tuple[int, ...], causal: bool, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    rows = -(-sum(lengths) // FLEX_BLOCK) * FLEX_BLOCK
    counts = torch.tensor([*lengths, rows - sum(lengths)])
    document = torch.repeat_interleave(torch.arange(len(counts)), counts).to(device)

    def visible(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        same = document[i] == document[j]
        return same & (j <= i) if causal else same

    return create_block_mask(visible, None, None, rows, rows, device=str(device))


def flex_attention(p: Pack) -> Tensor:
    """All rows as one sequence, with a mask of the documents; a model makes the mask once for all
    its layers, so it is not part of the call."""
    mask = _document_mask(p.lengths, p.causal, p.q.device)
    spare = mask.seq_lengths[0] - p.q.shape[0]
    q, k, v = (
        torch.nn.functional.pad(t, (0, 0, 0, 0, 0, spare)).transpose(0, 1)[None] for t in p.tensors
    )
    compiled: Callable[..., Tensor] = _compiled_flex(p.lengths, p.causal)
    out = compiled(q, k, v, block_mask=mask, enable_gqa=p.grouped)
    return out[0].transpose(0, 1)[: p.q.shape[0]]


# --- kernels that take packed rows ----------------------------------------------------------------


def torch_varlen(p: Pack) -> Any:
    """torch's own varlen_attn."""
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"window_size": (-1, 0)} if p.causal else {}
    if p.grouped:
        options["enable_gqa"] = True
    return varlen_attn(*p.tensors, p.cu, p.cu_k, p.longest, p.longest_key, **options)


def flash_attn(p: Pack, **options: Any) -> Any:
    """FlashAttention-2's package."""
    from flash_attn import flash_attn_varlen_func

    lengths = p.cu, p.cu_k, p.longest, p.longest_key
    return flash_attn_varlen_func(*p.tensors, *lengths, causal=p.causal, **options)


def flash_attn_3(p: Pack, **options: Any) -> Any:
    """FlashAttention-3's package, whose older releases return the LSE as well."""
    from flash_attn_interface import flash_attn_varlen_func

    lengths = p.cu, p.cu_k, p.longest, p.longest_key
    found = flash_attn_varlen_func(*p.tensors, *lengths, causal=p.causal, **options)
    return found[0] if isinstance(found, tuple) else found


Way = Callable[..., Any]
WAYS: Mapping[str, Way] = {
    OURS: ours,
    "sdpa_flash": partial(dense_sdpa, SDPBackend.FLASH_ATTENTION),
    "sdpa_cudnn": partial(dense_sdpa, SDPBackend.CUDNN_ATTENTION),
    "sdpa_efficient": partial(dense_sdpa, SDPBackend.EFFICIENT_ATTENTION),
    "padded_sdpa": partial(padded_sdpa, None),
    "padded_cudnn": partial(padded_sdpa, SDPBackend.CUDNN_ATTENTION),
    "nested_sdpa": nested_sdpa,
    "flex_attention": flex_attention,
    "torch_varlen": torch_varlen,
    "flash_attn": flash_attn,
    "flash_attn_3": flash_attn_3,
}
# These take and give padded batches.
PADDED = frozenset({"padded_sdpa", "padded_cudnn"})
