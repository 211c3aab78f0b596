"""What the operators of the head's row kernels refuse, by name and before anything is written."""

from __future__ import annotations

import pytest
import torch
from attention_cases import on
from row_cases import SOFTMAX_RESULTS


def softmax_arguments():
    """A call of 3 rows, 10 classes in 12 columns and 2 targets, by name."""
    vectors = ("dsmooth", "dlse", "dentropy", "lse", "entropy", "class_sum", "log_sum_sq")
    made = {name: torch.zeros(3) for name in vectors}
    made |= {name: torch.zeros(10) for name in ("bias", "class_weight")}
    made |= {name: torch.zeros(3, 2) for name in ("dnll", "logp", "shard_target_z")}
    return made | {
        "logits": torch.zeros(3, 12),
        "target": torch.zeros(3, 2, dtype=torch.int64),
        "count": torch.tensor(3),
        "lse_sq_scale": torch.tensor(0.0),
        "argmax": torch.zeros(3, dtype=torch.int64),
        "shard_sums": torch.zeros(3, 7),
        "shard_given": torch.zeros(3, 3),
    }


def float64(*shape):
    return torch.zeros(*shape, dtype=torch.float64)


SOFTMAX_ORDER = [
    *("logits", "classes", "first_row", "count", "target", "logit_scale", "softcap", "temperature"),
    *("bias", "class_weight", "dnll", "dsmooth", "dlse", "dentropy", "lse_sq_scale", "gradient"),
    *("logp", "lse", "entropy", "class_sum", "log_sum_sq", "argmax"),
    *("shard_sums", "shard_target_z", "shard_given"),
]
OFF_BY_FOUR = torch.zeros(40)[1:37].view(3, 12)
ROWS = "must have contiguous rows of a multiple of 16 bytes"
SOFTMAX_ERRORS = {
    "logits_dim": ({"logits": torch.zeros(12)}, "logits must have 2 dimensions.*got shape"),
    "logits_dtype": ({"logits": float64(3, 12)}, "logits must be float32, bfloat16 or float16"),
    "logits_columns": ({"logits": torch.zeros(3, 11)}, f"logits {ROWS}.*got shape"),
    "logits_stride": ({"logits": torch.zeros(3, 13)[:, :12]}, f"logits {ROWS}"),
    "logits_transposed": ({"logits": torch.zeros(12, 3).t()}, f"logits {ROWS}"),
    "logits_expanded": ({"logits": torch.zeros(1, 12).expand(3, 12)}, f"logits {ROWS}"),
    "logits_offset": ({"logits": OFF_BY_FOUR}, f"logits {ROWS}"),
    "classes_none": ({"classes": 0}, r"classes must be in \[1, 12\], the columns of logits"),
    "classes_many": ({"classes": 13}, r"classes must be in \[1, 12\].*got 13"),
    "target_dim": ({"target": torch.zeros(3).long()}, r"target must have shape \(rows, targets\)"),
    "target_rows": ({"target": torch.zeros(2, 2).long()}, "target must have shape"),
    "target_dtype": ({"target": torch.zeros(3, 2).int()}, "target must be contiguous int64"),
    "target_stride": ({"target": torch.zeros(2, 3).long().t()}, "target must be contiguous int64"),
    "targets": ({"target": torch.zeros(3, 1025).long()}, "at most 1024 columns, got 1025"),
    "gradient": ({"gradient": torch.float64}, "gradient must be float32, bfloat16 or float16"),
    "gradient_wider": (
        {"logits": torch.zeros(3, 16).bfloat16(), "gradient": torch.float32},
        "gradient must have the dtype of logits, or any where logits are float32",
    ),
    "gradient_other": (
        {"logits": torch.zeros(3, 16).bfloat16(), "gradient": torch.float16},
        "gradient must have the dtype of logits",
    ),
    "shards": ({"shard_sums": None}, "shard_sums and shard_target_z must be given together"),
    **{
        f"{name}_shape": ({name: torch.zeros(5)}, f"{name} has the wrong shape, got")
        for name in ("count", "lse_sq_scale", *SOFTMAX_RESULTS, "bias", "class_weight", "dnll")
    },
    **{
        f"{name}_shape": ({name: torch.zeros(5)}, f"{name} has the wrong shape, got")
        for name in ("dsmooth", "dlse", "dentropy", "shard_sums", "shard_target_z", "shard_given")
    },
    **{
        f"{name}_dtype": ({name: float64(10)}, f"{name} must be contiguous float32")
        for name in ("bias", "class_weight")
    },
    **{
        f"{name}_dtype": ({name: float64(3)}, f"{name} must be contiguous float32")
        for name in ("dsmooth", "dlse", "dentropy", "lse", "entropy", "class_sum", "log_sum_sq")
    },
    "count_dtype": ({"count": torch.tensor(1.0)}, "count must be contiguous int64"),
    "argmax_dtype": ({"argmax": torch.zeros(3)}, "argmax must be contiguous int64"),
    "lse_stride": ({"lse": torch.zeros(6)[::2]}, "lse must be contiguous float32"),
}


@on("emulated")
@pytest.mark.parametrize("change, message", SOFTMAX_ERRORS.values(), ids=SOFTMAX_ERRORS)
def test_softmax_errors(backend, change, message):
    call = dict.fromkeys(SOFTMAX_ORDER) | softmax_arguments() | {"classes": 10, "first_row": 0}
    call |= {"logit_scale": 1.0, "softcap": 0.0, "temperature": 1.0, "gradient": torch.float32}
    call |= change
    before = call["logits"].clone()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.varstream_emulated.softmax_rows_(*(call[name] for name in SOFTMAX_ORDER))
    assert torch.equal(call["logits"], before)


@on("emulated")
def test_a_right_softmax_and_one_without_rows(backend):
    call = dict.fromkeys(SOFTMAX_ORDER) | softmax_arguments() | {"classes": 10, "first_row": 0}
    call |= {"logit_scale": 1.0, "softcap": 0.0, "temperature": 1.0, "gradient": torch.float32}
    call["shard_given"] = None
    run = torch.ops.varstream_emulated.softmax_rows_
    run(*(call[name] for name in SOFTMAX_ORDER))
    assert torch.allclose(call["logp"].exp(), torch.tensor(0.1))
    for name in SOFTMAX_ORDER:
        given = call[name]
        if isinstance(given, torch.Tensor) and given.dim() and given.shape[0] == 3:
            call[name] = given[:0]
    run(*(call[name] for name in SOFTMAX_ORDER))


# --- distillation_rows_ ---------------------------------------------------------------------------

PAIR_ORDER = [
    *("student", "teacher", "classes", "first_row", "count", "beta", "temperature", "logit_scale"),
    *("softcap", "teacher_logit_scale", "teacher_softcap", "bias", "teacher_bias", "dloss"),
    *("gradient", "losses"),
]
SAME = "student and teacher must be float32 with the same shape and strides"
PAIR_ERRORS = {
    "student_dim": ({"student": torch.zeros(12)}, "student must have 2 dimensions"),
    "teacher_dim": ({"teacher": torch.zeros(12)}, "teacher must have 2 dimensions"),
    "student_columns": ({"student": torch.zeros(3, 11)}, f"student {ROWS}"),
    "teacher_columns": ({"teacher": torch.zeros(3, 11)}, f"teacher {ROWS}"),
    "student_classes": ({"classes": 13}, r"classes must be in \[1, 12\], the columns of student"),
    "teacher_classes": (
        {"teacher": torch.zeros(3, 8)},
        r"classes must be in \[1, 8\], the columns of teacher",
    ),
    "student_dtype": ({"student": torch.zeros(3, 16).half()}, SAME),
    "teacher_dtype": ({"teacher": torch.zeros(3, 16).half()}, SAME),
    "rows": ({"teacher": torch.zeros(4, 12)}, SAME),
    "columns": ({"teacher": torch.zeros(3, 16)}, SAME),
    "strides": ({"teacher": torch.zeros(3, 16)[:, :12]}, SAME),
    "beta_low": ({"beta": -0.1}, r"beta must be in \[0, 1\], got -0.1"),
    "beta_high": ({"beta": 1.5}, r"beta must be in \[0, 1\], got 1.5"),
    "beta_nan": ({"beta": float("nan")}, r"beta must be in \[0, 1\]"),
    "gradient": ({"gradient": torch.float64}, "gradient must be float32, bfloat16 or float16"),
    **{
        f"{name}_shape": ({name: torch.zeros(5)}, f"{name} has the wrong shape, got")
        for name in ("count", "bias", "teacher_bias", "dloss", "losses")
    },
    "count_dtype": ({"count": torch.tensor(1.0)}, "count must be contiguous int64"),
    "bias_dtype": ({"bias": float64(10)}, "bias must be contiguous float32"),
    "teacher_bias_dtype": ({"teacher_bias": float64(10)}, "teacher_bias must be contiguous"),
    "dloss_dtype": ({"dloss": float64(3)}, "dloss must be contiguous float32"),
    "losses_dtype": ({"losses": float64(3)}, "losses must be contiguous float32"),
    "losses_stride": ({"losses": torch.zeros(6)[::2]}, "losses must be contiguous float32"),
}


def pair_arguments():
    made = {name: torch.zeros(3, 12) for name in ("student", "teacher")}
    made |= {name: torch.zeros(10) for name in ("bias", "teacher_bias")}
    made |= {"dloss": torch.ones(3), "losses": torch.ones(3), "count": torch.tensor(3)}
    scalars = {"logit_scale": 1.0, "softcap": 0.0, "temperature": 1.0, "beta": 0.5}
    scalars |= {"teacher_logit_scale": 1.0, "teacher_softcap": 0.0, "classes": 10, "first_row": 0}
    return made | scalars | {"gradient": torch.float32}


@on("emulated")
@pytest.mark.parametrize("change, message", PAIR_ERRORS.values(), ids=PAIR_ERRORS)
def test_distillation_errors(backend, change, message):
    call = pair_arguments() | change
    before = call["student"].clone()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.varstream_emulated.distillation_rows_(*(call[name] for name in PAIR_ORDER))
    assert torch.equal(call["student"], before)


@on("emulated")
def test_a_right_distillation_and_one_without_rows(backend):
    call = pair_arguments()
    run = torch.ops.varstream_emulated.distillation_rows_
    run(*(call[name] for name in PAIR_ORDER))
    assert not call["losses"].any()
    for name in ("student", "teacher", "dloss", "losses"):
        call[name] = call[name][:0]
    run(*(call[name] for name in PAIR_ORDER))
