"""The demo's figures: the loss curve, and memory against document length."""

from __future__ import annotations

from typing import Any

from varstream.demo.methods import METHODS
from varstream.demo.search import Search
from varstream.demo.settings import MIB
from varstream.demo.training import Training

# Okabe and Ito's palette, told apart by colour-blind readers and in print by the markers.
COLORS = {
    "padded": "#d55e00",
    "padded_checkpointed": "#e69f00",
    "packed_checkpointed": "#0072b2",
    "varstream": "#009e73",
}
MEAN_STEPS = 5
MARKERS = {"padded": "s", "padded_checkpointed": "D", "packed_checkpointed": "^", "varstream": "o"}


def loss_curve(training: Training) -> Any:
    """Loss of each step against the tokens seen so far."""
    figure, axes = _figure()
    seen, total = [], 0
    for tokens in training.tokens:
        total += tokens
        seen.append(total / 1000)
    color = COLORS["varstream"]
    axes.plot(seen, training.loss, "o", color=color, markersize=3, alpha=0.45, label="each step")
    label = f"mean of the last {MEAN_STEPS} steps"
    axes.plot(seen, _running_mean(training.loss), color=color, linewidth=1.8, label=label)
    axes.legend(frameon=False)
    axes.set_xlabel("tokens seen (thousands)")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title("Training, packed and streamed")
    return figure


def _running_mean(values: list[float]) -> list[float]:
    means = []
    for end in range(1, len(values) + 1):
        last = values[max(end - MEAN_STEPS, 0) : end]
        means.append(sum(last) / len(last))
    return means


def memory_against_length(searches: dict[str, Search], budget: int) -> Any:
    """Peak memory of the backward against the length of a single document; budget in MiB."""
    figure, axes = _figure()
    for method in METHODS:
        search = searches[method.key]
        points = search.curve()
        axes.plot(
            [length / 1000 for length, _ in points],
            [peak / MIB for _, peak in points],
            color=COLORS[method.key],
            marker=MARKERS[method.key],
            markersize=4.5,
            linewidth=1.8,
            label=f"{method.name}: {search.result()}",
        )
    axes.axhline(budget, color="#444444", linestyle="--", linewidth=1.2)
    axes.annotate(
        f"budget {budget} MiB",
        xy=(0.6, budget),
        xycoords=("axes fraction", "data"),
        xytext=(0, 4),
        textcoords="offset points",
        horizontalalignment="center",
        color="#444444",
    )
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("document length (thousand tokens)")
    axes.set_ylabel("peak memory of the backward (MiB)")
    axes.set_title("Memory against document length")
    axes.legend(
        title="longest within budget",
        loc="lower right",
        frameon=True,
        framealpha=0.9,
        edgecolor="none",
    )
    return figure


def _figure() -> tuple[Any, Any]:
    # A figure of its own, not pyplot's: no window system, no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    return figure, axes
