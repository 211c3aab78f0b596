"""Training objectives over packed rows: plain functions of tensors that return a scalar.

Those over log-probabilities take ``logp`` (N,) from ``vs.token_logprobs``, a ``mask`` (N,) of
trained tokens and, where sequences matter, ``cu_seqlens`` (B+1,); ordinary autograd leads from
there back through the head, so others are easily written beside them. The divergences take hidden
states of student and teacher. No objective holds an ``(N, V)`` tensor.
"""

from varstream.objectives.cached import cached_embeddings
from varstream.objectives.contrastive import contrastive
from varstream.objectives.divergence import distillation, jsd, kl
from varstream.objectives.kto import kto
from varstream.objectives.likelihood import dft, sft
from varstream.objectives.policy import cispo, dapo, dr_grpo, grpo, gspo
from varstream.objectives.preference import cpo, dpo, ipo, orpo, simpo

__all__ = [
    "cached_embeddings",
    "cispo",
    "contrastive",
    "cpo",
    "dapo",
    "dft",
    "distillation",
    "dpo",
    "dr_grpo",
    "grpo",
    "gspo",
    "ipo",
    "jsd",
    "kl",
    "kto",
    "orpo",
    "sft",
    "simpo",
]
