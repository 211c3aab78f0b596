"""The head as modules: ``LinearCrossEntropyLoss`` owns its weight as torch's module of that name,
``LinearCrossEntropy`` and ``TokenLogProbs`` take the weight with each call."""

from varstream.nn.head import LinearCrossEntropy, LinearCrossEntropyLoss, TokenLogProbs

__all__ = ["LinearCrossEntropy", "LinearCrossEntropyLoss", "TokenLogProbs"]
