"""Lengths on a GPU that lie: refused by name where ``validate=True`` lets their values be read."""

from __future__ import annotations

import pytest
import torch

import varstream as vs

pytestmark = pytest.mark.gpu

DEVICE = "cuda"

LIES = {
    "start": ({"cu_seqlens_q": [1, 4, 9]}, "cu_seqlens_q must start at 0, got 1"),
    "falling": ({"cu_seqlens_q": [0, 6, 4]}, "cu_seqlens_q must never fall, got 6 then 4"),
    "past_the_rows": (
        {"cu_seqlens_k": [0, 4, 20]},
        "cu_seqlens_k must not pass k's 9 rows, got 20",
    ),
    "maximum": ({"max_seqlen_q": 4}, "max_seqlen_q must be at least the longest length 5, got 4"),
    "seqused": ({"seqused_k": [4, 6]}, "seqused_k must be between 0 and the sequence's 5 keys"),
}


@pytest.mark.parametrize(("lie", "message"), LIES.values(), ids=LIES)
def test_lengths_that_lie_are_refused_where_validation_is_asked_for(lie, message):
    q, k, v = (torch.randn(9, 2, 64, dtype=torch.bfloat16, device=DEVICE) for _ in range(3))
    lengths = {"cu_seqlens_q": [0, 4, 9], "cu_seqlens_k": [0, 4, 9]}
    call = lengths | {"max_seqlen_q": 9, "max_seqlen_k": 9} | lie
    for name, value in call.items():
        if isinstance(value, list):
            call[name] = torch.tensor(value, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match=message):
        vs.varlen_attention(q, k, v, **call, validate=True)
