"""The demo from start to end, a stage at a time; each stage's files are written when it is done."""

from __future__ import annotations

import platform
import time
from dataclasses import asdict
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

import varstream
from varstream._load import composed_on_cuda
from varstream.demo import figures, measure
from varstream.demo.corpus import Corpus, load_corpus
from varstream.demo.methods import METHODS
from varstream.demo.model import describe, make_model
from varstream.demo.progress import Report
from varstream.demo.settings import MIB, Settings
from varstream.demo.store import Store
from varstream.demo.table import Comparison
from varstream.demo.training import train


def run(settings: Settings, store: Store, report: Report) -> Comparison:
    """Corpus, training, comparison; prints as it goes, leaves its results in ``store``.

    Raises:
        DemoError: nothing to read, or too little.
    """
    began = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about: dict[str, Any] = {"settings": settings.as_json(), "environment": _environment(device)}
    with report.console.status("Reading and tokenizing"):
        corpus = load_corpus(settings)  # may refuse --data, so nothing is printed before
    report.note(_device_note(device))

    report.heading("Corpus")
    about["corpus"] = {"source": corpus.source, **corpus.statistics()}
    report.console.print(_corpus_table(corpus))

    report.heading("Training")
    model = make_model(settings, corpus.vocab_size, device)
    about["model"] = describe(model)
    report.note(about["model"])
    training = train(model, corpus, settings, report)
    store.json("training.json", {**about, **asdict(training)})
    store.figure("loss.png", figures.loss_curve(training))
    report.note(
        f"loss {training.loss[0]:.2f} -> {training.loss[-1]:.2f} in {len(training.loss)} steps, "
        f"{sum(training.tokens):,} tokens at {training.tokens_per_second:,.0f} tokens/s; "
        f"packed rows {training.fill:.1%} full"
    )

    report.heading("Comparison: four methods, the same documents and weights")
    documents = corpus.sample(settings.compared, settings.compared_tokens)
    documents = [document.to(device) for document in documents]
    runners = [method.prepare(model) for method in METHODS]
    first = measure.first_runs(model, runners, documents, report)
    store.json("first_run.json", {**about, "methods": _plain(first)})
    speed = measure.measure_speed(runners, documents, settings, report)
    store.json("speed.json", {**about, "methods": _plain(speed)})

    report.heading(f"Largest document under {settings.budget} MiB")
    lengths = measure.measure_lengths(model, corpus, settings, report)
    store.json("memory.json", {**about, "methods": _plain(lengths)})
    store.figure("memory.png", figures.memory_against_length(lengths, settings.budget))

    result = Comparison(speed, first, lengths, settings.budget, [len(d) for d in documents])
    store.json("comparison.json", {**about, **result.as_json()})
    store.text("comparison.md", result.markdown())
    _print_result(result, store, report, time.perf_counter() - began)
    if settings.tiny:
        report.note("These sizes are too small to show the memory gain: leave out --quick for it.")
    return result


def _print_result(result: Comparison, store: Store, report: Report, seconds: float) -> None:
    report.console.print()
    report.console.print(result.rich())
    for note in result.notes()[: -len(METHODS)]:
        report.note(f"- {note}")
    report.note(f"\n{seconds:.0f} s. In {store.folder}: {', '.join(store.written)}")


def _plain(results: dict[str, Any]) -> dict[str, Any]:
    """Dataclasses by method as plain data."""
    return {key: asdict(result) for key, result in results.items()}


def _corpus_table(corpus: Corpus) -> Table:
    table = Table(title=Text(corpus.source), title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in corpus.statistics().items():
        table.add_row(name, f"{value:.0%}" if isinstance(value, float) else f"{value:,}")
    return table


def _device_note(device: torch.device) -> str:
    if device.type == "cpu":
        return f"Running on the CPU, {torch.get_num_threads()} threads."
    note = f"Running on {torch.cuda.get_device_name(device)}."
    if "varlen_attention_bwd" in composed_on_cuda:
        note += (
            " This build has no CUDA kernel for attention's backward: it is composed of torch's "
            "operators there."
        )
    return note


def _environment(device: torch.device) -> dict[str, Any]:
    import transformers

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "varstream": varstream.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": f"{device.type} {name}",
        "threads": torch.get_num_threads(),
        "mib": MIB,
    }
