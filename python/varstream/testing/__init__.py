"""What a test of exactness needs: dense references, error measures, peak memory, float64 twins of
models."""

from varstream.testing.compare import (
    assert_error_ratio,
    assert_exact,
    relative_error,
    worst_gradient,
)
from varstream.testing.float64 import float64_twin
from varstream.testing.memory import peak_memory
from varstream.testing.oracles import dense_attention

__all__ = [
    "assert_error_ratio",
    "assert_exact",
    "dense_attention",
    "float64_twin",
    "peak_memory",
    "relative_error",
    "worst_gradient",
]
