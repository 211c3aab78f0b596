"""Attention of bfloat16 and float16 in emulated kernels, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from emulation import LOW, emulated

from varstream.reference import attention as reference


@contextmanager
def kernels_only() -> Iterator[Any]:
    """``emulated()`` in which composed attention of these dtypes is an error, counts cleared."""
    with pytest.MonkeyPatch.context() as patch, emulated() as operators:
        for name in ("attention_forward", "attention_backward"):
            composed = getattr(reference, name)

            def guarded(q: Any, *rest: Any, composed: Any = composed) -> Any:
                assert q.dtype not in LOW, "composed operators ran"
                return composed(q, *rest)

            patch.setattr(reference, name, guarded)
        operators.clear_instruction_counts()
        yield operators
