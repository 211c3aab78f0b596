"""The head on ``torch.distributed``: each rank of a group holds some rows of the weight."""

from varstream.parallel.cross_entropy import linear_cross_entropy
from varstream.parallel.logprobs import token_logprobs

__all__ = ["linear_cross_entropy", "token_logprobs"]
