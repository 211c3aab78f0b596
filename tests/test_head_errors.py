"""Bad input to the head: each wrong argument is refused by name, with its contract and value."""

import pytest
import torch
from head_cases import problem

import varstream as vs


def arguments(changes):
    p = problem(dtype=torch.float32)
    given = dict(input=p.input, linear_weight=p.weight, target=p.target, linear_bias=p.bias)
    return given | changes


LOSS = {
    "input_type": (dict(input=[1.0]), TypeError, "input must be a torch.Tensor, got list"),
    "input_ndim": (
        dict(input=torch.zeros(2, 3, 9)),
        ValueError,
        r"input must have 2 dimensions \(N, d\), got shape \(2, 3, 9\)",
    ),
    "input_dtype": (
        dict(input=torch.zeros(16, 9).int()),
        ValueError,
        "input must have dtype.*int32",
    ),
    "weight_type": (dict(linear_weight=None), TypeError, "linear_weight must be a torch.Tensor"),
    "weight_ndim": (
        dict(linear_weight=torch.zeros(23, 4, 9)),
        ValueError,
        r"linear_weight must have 2 dimensions \(V, d\), got shape \(23, 4, 9\)",
    ),
    "weight_width": (
        dict(linear_weight=torch.zeros(23, 8)),
        ValueError,
        r"linear_weight must have size 9 in dimension 1 \(V, d\), got shape \(23, 8\)",
    ),
    "weight_empty": (dict(linear_weight=torch.zeros(0, 9)), ValueError, "at least one class"),
    "weight_dtype": (
        dict(linear_weight=torch.zeros(23, 9, dtype=torch.bfloat16)),
        ValueError,
        "linear_weight must have the dtype of input .*float32.*bfloat16",
    ),
    "weight_device": (
        dict(linear_weight=torch.zeros(23, 9, device="meta")),
        ValueError,
        "linear_weight must be on cpu like the other tensors, got meta",
    ),
    "bias_shape": (
        dict(linear_bias=torch.zeros(9)),
        ValueError,
        r"linear_bias must have size 23 in dimension 0 \(V,\), got shape \(9,\)",
    ),
    "bias_dtype": (
        dict(linear_bias=torch.zeros(23).double()),
        ValueError,
        "linear_bias must have the dtype of input",
    ),
    "target_type": (dict(target=3), TypeError, "target must be a torch.Tensor, got int"),
    "target_shape": (
        dict(target=torch.zeros(15).long()),
        ValueError,
        r"target must have size 16 in dimension 0 \(N,\), got shape \(15,\)",
    ),
    "target_dtype": (
        dict(target=torch.zeros(16, dtype=torch.int16)),
        ValueError,
        "target must have dtype int64, int32, got int16",
    ),
    "target_extra_dims": (
        dict(target=torch.zeros(16, 2).long()),
        ValueError,
        "target must have 1 dimensions",
    ),
    "target_too_large": (
        dict(target=torch.tensor([0, 23] + [1] * 14)),
        ValueError,
        r"target must hold classes in \[0, 23\) or ignore_index=-100, got 23 at row 1",
    ),
    "target_negative": (
        dict(target=torch.tensor([-1] + [1] * 15)),
        ValueError,
        "got -1 at row 0",
    ),
    "probabilities": (
        dict(target=torch.zeros(16, 23)),
        NotImplementedError,
        "target as class probabilities is not supported",
    ),
    "ignore_index": (dict(ignore_index=None), TypeError, "ignore_index must be an int"),
    "logit_scale": (dict(logit_scale="1"), TypeError, "logit_scale must be a number, got str"),
    "logit_scale_inf": (dict(logit_scale=float("inf")), ValueError, "logit_scale must be finite"),
    "softcap": (dict(softcap=-1.0), ValueError, "softcap must be >= 0.0, got -1.0"),
    "temperature": (dict(temperature=0.0), ValueError, "temperature must be above 0, got 0.0"),
    "temperature_low": (dict(temperature=-1), ValueError, "temperature must be >= 0.0, got -1"),
    "chunk_size": (dict(chunk_size=0), ValueError, "chunk_size must be >= 1, got 0"),
    "chunk_size_type": (dict(chunk_size=2.0), TypeError, "chunk_size must be an int, got float"),
    "reduction": (dict(reduction="avg"), ValueError, "reduction must be one of mean, sum, none"),
    "normalizer_sum": (
        dict(reduction="sum", normalizer=3),
        ValueError,
        "normalizer needs reduction='mean', got reduction='sum'",
    ),
    "normalizer_shape": (
        dict(normalizer=torch.ones(2)),
        ValueError,
        r"normalizer must have one element, got shape \(2,\)",
    ),
    "normalizer_negative": (dict(normalizer=-1), ValueError, "normalizer must be >= 0.0, got -1"),
    "normalizer_type": (dict(normalizer="3"), TypeError, "normalizer must be a number, got str"),
    "weight": (dict(weight=torch.ones(23)), NotImplementedError, "weight is not supported"),
    "label_smoothing": (
        dict(label_smoothing=0.1),
        NotImplementedError,
        "label_smoothing is not supported",
    ),
    "z_loss": (dict(z_loss=1e-4), NotImplementedError, "z_loss is not supported"),
    "token_weight": (
        dict(token_weight=torch.ones(16)),
        NotImplementedError,
        "token_weight is not supported",
    ),
    "options": (
        dict(options=torch.nn.LinearCrossEntropyOptions())
        if hasattr(torch.nn, "LinearCrossEntropyOptions")
        else dict(options=object()),
        NotImplementedError,
        "options is not supported",
    ),
}


@pytest.mark.parametrize("changes, error, message", LOSS.values(), ids=LOSS)
def test_linear_cross_entropy(changes, error, message):
    with pytest.raises(error, match=message):
        vs.linear_cross_entropy(**arguments(changes))


# The checks shared with linear_cross_entropy are tested one by one there.
LOGPROBS = {
    "input_ndim": (dict(input=torch.zeros(9)), ValueError, "input must have 2 dimensions"),
    "weight_dtype": (
        dict(linear_weight=torch.zeros(23, 9, dtype=torch.float16)),
        ValueError,
        "linear_weight must have the dtype of input",
    ),
    "bias_shape": (dict(linear_bias=torch.zeros(2)), ValueError, "linear_bias must have size 23"),
    "target_large": (
        dict(target=torch.tensor([0] * 15 + [99], dtype=torch.int32)),
        ValueError,
        r"target must hold classes in \[0, 23\) or ignore_index=-100, got 99 at row 15",
    ),
    "probabilities": (
        dict(target=torch.zeros(16, 23)),
        NotImplementedError,
        "target as class probabilities is not supported",
    ),
    "temperature": (dict(temperature=0), ValueError, "temperature must be above 0"),
    "softcap": (dict(softcap=None), TypeError, "softcap must be a number, got NoneType"),
    "logit_scale": (dict(logit_scale=float("nan")), ValueError, "logit_scale must be finite"),
    "ignore_index": (dict(ignore_index=1.0), TypeError, "ignore_index must be an int, got float"),
    "chunk_size": (dict(chunk_size=-3), ValueError, "chunk_size must be >= 1, got -3"),
    "return_entropy": (dict(return_entropy=1), TypeError, "return_entropy must be a bool, got int"),
}


@pytest.mark.parametrize("changes, error, message", LOGPROBS.values(), ids=LOGPROBS)
def test_token_logprobs(changes, error, message):
    with pytest.raises(error, match=message):
        vs.token_logprobs(**arguments(changes))
