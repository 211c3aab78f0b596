"""Figures that others have published, as lines to hold ours against. Not measured here."""

from __future__ import annotations

# StreamBP (arXiv 2506.03077), one A800 with 80 GB, bfloat16, batch 1.
# Seconds of a backward of Qwen3-4B, layer chunks of a third of the tokens.
SECONDS = {  # tokens: (checkpointing, StreamBP)
    6000: (2.5, 2.6),
    9000: (4.7, 4.7),
    12000: (7.4, 7.0),
    15000: (10.8, 10.0),
    18000: (14.7, 13.2),
    21000: (19.3, 17.2),
    24000: (24.3, 21.2),
}
# GB at the peak of a backward of Llama-3.1-8B, weights and gradients included.
GIGABYTES = {3000: (35.8, 31.8), 6000: (41.7, 32.7), 9000: (47.6, 33.6), 18000: (65.6, 37.2)}
# Longest supervised row, thousands of tokens, layer chunks of 500 rows and chunks of 100 logits.
LONGEST = {
    "Qwen3-4B full": (28.5, 200.0),
    "Qwen3-4B LoRA": (36.5, 247.0),
    "Qwen3-8B full": (15.7, 72.0),
    "Qwen3-8B LoRA": (30.6, 142.4),
    "Qwen3-14B LoRA": (23.0, 84.6),
    "Qwen3-32B LoRA": (5.9, 16.3),
}

WORDS = """\
## Published by others, not measured here

The only figures on this page that aren't ours: StreamBP's, from its paper (arXiv 2506.03077).
**Other hardware**: one A800 with 80 GB, bfloat16, batch 1, LoRA of rank 32; checkpointing is its
authors' own baseline. Times are those of chunks of a third of the row, lengths those of chunks of
500 rows, so the two don't hold together. Ours to read beside these are the ratios to
`checkpointing` of `stream/*` and `stream_gpu/*`, time and peak at the same chunk size; our peaks
are above the weights, theirs have weights and gradients in them.
"""


def section() -> list[str]:
    """The lines of the page's last section."""
    rows = []
    for tokens, (theirs, streamed) in SECONDS.items():
        rows.append(_row("Qwen3-4B, backward", f"{tokens} tokens", theirs, streamed, "s"))
    for tokens, (theirs, streamed) in GIGABYTES.items():
        rows.append(_row("Llama-3.1-8B, peak", f"{tokens} tokens", theirs, streamed, "GB"))
    for model, (theirs, streamed) in LONGEST.items():
        rows.append(_row("longest row", model, theirs, streamed, "thousand tokens"))
    head = "| published | of | checkpointing | StreamBP | ratio |"
    return [*WORDS.splitlines(), "", head, "| --- | --- | --- | --- | --- |", *rows]


def _row(what: str, of: str, theirs: float, streamed: float, unit: str) -> str:
    ratio = f"{streamed / theirs:.3f}"
    return f"| {what} | {of} | {theirs:g} {unit} | {streamed:g} {unit} | {ratio} |"
