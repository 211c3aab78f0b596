"""What objectives.distillation refuses, by name."""

import pytest
import torch

from varstream import objectives

ERRORS = {
    "input_kind": (dict(input=[1.0]), TypeError, "input must be a torch.Tensor, got list"),
    "input_ndim": (dict(input=torch.zeros(9)), ValueError, "input must have 2 dimensions"),
    "input_dtype": (dict(input=torch.zeros(16, 9).long()), ValueError, "input must have dtype"),
    "weight_width": (
        dict(linear_weight=torch.zeros(23, 8)),
        ValueError,
        "linear_weight must have size 9 in dimension 1",
    ),
    "weight_dtype": (
        dict(linear_weight=torch.zeros(23, 9).double()),
        ValueError,
        "linear_weight must have the dtype of input",
    ),
    "no_class": (dict(linear_weight=torch.zeros(0, 9)), ValueError, "at least one class"),
    "bias_shape": (dict(linear_bias=torch.zeros(2)), ValueError, "linear_bias must have size 23"),
    "teacher_rows": (
        dict(teacher_input=torch.zeros(15, 6)),
        ValueError,
        "teacher_input must have size 16 in dimension 0",
    ),
    "teacher_width": (
        dict(teacher_weight=torch.zeros(23, 5)),
        ValueError,
        "teacher_weight must have size 6 in dimension 1",
    ),
    "teacher_classes": (
        dict(teacher_weight=torch.zeros(22, 6)),
        ValueError,
        "teacher_weight must have size 23 in dimension 0",
    ),
    "teacher_dtype": (
        dict(teacher_weight=torch.zeros(23, 6).half()),
        ValueError,
        "teacher_weight must have the dtype of teacher_input",
    ),
    "teacher_acc": (
        dict(teacher_input=torch.zeros(16, 6).double(), teacher_weight=torch.zeros(23, 6).double()),
        ValueError,
        "teacher_input must be accumulated in torch.float32",
    ),
    "teacher_bias": (dict(teacher_bias=torch.zeros(9)), ValueError, "teacher_bias must have size"),
    "mask_dtype": (dict(mask=torch.ones(16)), ValueError, "mask must have dtype bool"),
    "mask_shape": (dict(mask=torch.ones(3).bool()), ValueError, "mask must have size 16"),
    "token_weight": (dict(token_weight=torch.ones(3)), ValueError, "token_weight must have size"),
    "beta_high": (dict(beta=1.5), ValueError, "beta must be <= 1.0, got 1.5"),
    "beta_low": (dict(beta=-0.1), ValueError, "beta must be >= 0.0, got -0.1"),
    "beta_kind": (dict(beta="jsd"), TypeError, "beta must be a number, got str"),
    "temperature": (dict(temperature=0), ValueError, "temperature must be above 0"),
    "logit_scale": (dict(logit_scale=float("inf")), ValueError, "logit_scale must be finite"),
    "softcap": (dict(softcap=-1.0), ValueError, "softcap must be >= 0.0, got -1.0"),
    "teacher_scale": (dict(teacher_logit_scale=None), TypeError, "teacher_logit_scale must be"),
    "teacher_softcap": (dict(teacher_softcap=-2), ValueError, "teacher_softcap must be >= 0.0"),
    "reduction": (dict(reduction="batchmean"), ValueError, "reduction must be one of mean, sum"),
    "normalizer_sum": (
        dict(reduction="sum", normalizer=3),
        ValueError,
        "normalizer needs reduction='mean', got reduction='sum'",
    ),
    "normalizer_zero": (dict(normalizer=0), ValueError, "normalizer must be above 0, got 0.0"),
    "normalizer_shape": (dict(normalizer=torch.ones(2)), ValueError, "must have one element"),
    "normalizer_kind": (dict(normalizer="all"), TypeError, "normalizer must be a number"),
    "chunk_size": (dict(chunk_size=0), ValueError, "chunk_size must be >= 1, got 0"),
    "chunk_kind": (dict(chunk_size=2.0), TypeError, "chunk_size must be an int, got float"),
}


@pytest.mark.parametrize("changes, error, message", ERRORS.values(), ids=ERRORS)
def test_errors(changes, error, message):
    given = dict(
        input=torch.zeros(16, 9),
        linear_weight=torch.zeros(23, 9),
        teacher_input=torch.zeros(16, 6),
        teacher_weight=torch.zeros(23, 6),
    )
    with pytest.raises(error, match=message):
        objectives.distillation(**(given | changes))
