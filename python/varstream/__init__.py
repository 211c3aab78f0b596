"""Train transformers on real tokens only, and on long sequences in little memory.

Public names are re-exported here; each is documented where it is defined.
"""

import importlib
from typing import TYPE_CHECKING, Any

from varstream import nn, objectives
from varstream._load import extension as _extension
from varstream.ops.attention import varlen_attention
from varstream.ops.attention_backward import varlen_attention_backward
from varstream.ops.linear_cross_entropy import CrossEntropyMetrics, linear_cross_entropy
from varstream.ops.merge import merge_attention
from varstream.ops.packing import Packed, cu_seqlens, pack, unpack
from varstream.ops.token_logprobs import TokenStats, token_logprobs
from varstream.planner import MemoryPlan, plan_memory
from varstream.streaming import UnsupportedModelError, stream, stream_layer, unstream

if TYPE_CHECKING:
    from varstream.encoder import padding_free, restore_padding

__version__: str = _extension.build_info()["version"]

__all__ = [
    "CrossEntropyMetrics",
    "MemoryPlan",
    "Packed",
    "TokenStats",
    "UnsupportedModelError",
    "__version__",
    "cu_seqlens",
    "linear_cross_entropy",
    "merge_attention",
    "nn",
    "objectives",
    "pack",
    "padding_free",
    "plan_memory",
    "restore_padding",
    "stream",
    "stream_layer",
    "token_logprobs",
    "unpack",
    "unstream",
    "varlen_attention",
    "varlen_attention_backward",
]


def __getattr__(name: str) -> Any:
    """The encoders, imported when they are first asked for: many families, and few use them."""
    if name not in ("encoder", "padding_free", "restore_padding"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    encoder = importlib.import_module("varstream.encoder")
    return encoder if name == "encoder" else getattr(encoder, name)
