"""The operators: argument checks, fakes and autograd around ``torch.ops.varstream``.

The parts of an encoder layer are public here; the other calls are public as ``varstream.<name>``.
"""

from varstream.ops.bias_residual_layer_norm import bias_residual_layer_norm
from varstream.ops.linear_bias_gelu import linear_bias_gelu
from varstream.ops.relative_attention import relative_attention

__all__ = ["bias_residual_layer_norm", "linear_bias_gelu", "relative_attention"]
