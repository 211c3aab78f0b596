"""The training run: packed rows, streamed backward, nothing else out of the ordinary."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

import varstream as vs
from varstream.batching import Packing, best_fit_decreasing
from varstream.demo.corpus import Corpus
from varstream.demo.methods import Documents, packed_batch, predicted
from varstream.demo.progress import Report
from varstream.demo.settings import Settings


@dataclass
class Training:
    """What a run recorded, a value per step."""

    fill: float  # of the packed rows
    loss: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        return sum(self.tokens) / sum(self.seconds)


def train(model: Any, corpus: Corpus, settings: Settings, report: Report) -> Training:
    """Train ``model`` in place for ``settings.steps`` packed rows; it is plain again afterwards."""
    vs.stream(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.1
    )
    warmup = max(settings.steps // 10, 1)

    def rate(step: int) -> float:
        decay = 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        return min((step + 1) / warmup, 1.0) * (0.1 + 0.9 * decay)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    packing = best_fit_decreasing(corpus.lengths, settings.row_tokens)
    record = Training(packing.fill)
    with report.progress("training", settings.steps) as advance:
        for _, documents in zip(
            range(settings.steps), _rows(corpus, packing, settings.seed), strict=False
        ):
            began = time.perf_counter()
            batch = packed_batch(documents, model.device)
            loss = model(**batch, num_items_in_batch=predicted(documents)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            record.loss.append(loss.item())
            record.tokens.append(sum(len(document) for document in documents))
            record.seconds.append(time.perf_counter() - began)
            speed = record.tokens[-1] / record.seconds[-1]
            advance(f"loss {record.loss[-1]:.2f}, {speed:,.0f} tokens/s")
    vs.unstream(model)
    return record


def _rows(corpus: Corpus, packing: Packing, seed: int) -> Iterator[Documents]:
    """Packed rows without end, in another order each epoch."""
    epoch = 0
    while True:
        for row in packing.shuffled(seed=seed + epoch).bins:
            yield [corpus.documents[i] for i in row]
        epoch += 1
