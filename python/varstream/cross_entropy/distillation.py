"""``linear_distillation`` on a GPU, as ``reference.distillation``.

Two products and one row kernel a chunk, then the student's gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from varstream.cross_entropy.chunk_rule import BUDGET, chunk_rows
from varstream.cross_entropy.gradients import Gradients
from varstream.cross_entropy.products import ChunkBuffer
from varstream.cross_entropy.rows import DeviceRows, select_rows
from varstream.reference.head import Chunking, Head


def linear_distillation(
    x: Tensor,
    student: Head,
    y: Tensor,
    teacher: Head,
    mask: Tensor | None,
    token_weight: Tensor | None,
    beta: float,
    chunking: Chunking,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Arguments and results as the reference's; the chunk's two buffers share the memory budget."""
    max_rows = chunking.max_rows
    if mask is None:
        mask = torch.ones(x.shape[:1], dtype=torch.bool, device=x.device)
        max_rows = x.shape[0] if max_rows is None else max_rows
    rows = select_rows(mask, max_rows)
    classes, width = student.weight.shape
    size = chunking.chunk_size or chunk_rows(rows.bound, width, classes, budget=BUDGET // 2)
    largest = rows.largest_chunk(size)
    grads = Gradients(x, student.weight, rows, needs)
    ours = ChunkBuffer(largest, classes, x, torch.float32)
    theirs = ChunkBuffer(largest, classes, y, torch.float32)
    losses = x.new_zeros((rows.bound,), dtype=torch.float32)
    weight = None
    if token_weight is not None:
        weight = rows.gather(torch.where(mask, token_weight.float(), 0))
    pair = _Pair(student, teacher, beta, x.dtype if any(needs) else None, rows)
    x, y = x.contiguous(), y.contiguous()
    for part in rows.chunks(size):
        x_c = torch.ops.varstream.pack(x, rows.index[part])
        y_c = torch.ops.varstream.pack(y, rows.index[part])
        s, t = ours.fill(x_c, student.weight), theirs.fill(y_c, teacher.weight)
        pair.run(part, s, t, None if weight is None else weight[part], losses[part])
        if any(needs):
            grads.add(part, x_c, ours.gradient(x_c.shape[0]))
    loss_sum = losses.sum() if weight is None else (losses * weight).sum()
    return rows.scatter(losses), rows.poison(loss_sum), rows.count, *grads.result()


class _Pair:
    """The row kernel's arguments that don't change from chunk to chunk."""

    def __init__(
        self,
        student: Head,
        teacher: Head,
        beta: float,
        gradient: torch.dtype | None,
        rows: DeviceRows,
    ) -> None:
        self.student, self.teacher, self.beta = student, teacher, beta
        self.gradient, self.count = gradient, rows.count
        self.biases = [None if h.bias is None else h.bias.float() for h in (student, teacher)]

    def run(self, part: slice, s: Tensor, t: Tensor, weight: Tensor | None, out: Tensor) -> None:
        """Logits ``s`` and ``t`` (C, V and more) of rows ``part``: ``s`` becomes its gradient, the
        losses (C,) go to ``out``."""
        student, teacher = self.student, self.teacher
        torch.ops.varstream.distillation_rows_(
            s,
            t,
            student.weight.shape[0],
            part.start,
            self.count,
            self.beta,
            student.temperature,
            student.logit_scale,
            student.softcap,
            teacher.logit_scale,
            teacher.softcap,
            *self.biases,
            weight,
            self.gradient,
            out,
        )
