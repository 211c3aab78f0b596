"""The README's Python examples run as they stand."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"## ([^\n]+)\n(?:(?!\n## ).)*?```python\n(.*?)```", README.read_text(), re.S)


def test_there_is_one_example_per_pillar():
    assert [title for title, _ in BLOCKS] == [
        "Padding-free attention",
        "A head without logits",
        "Streaming backward",
    ]


@pytest.mark.parametrize("code", [code for _, code in BLOCKS], ids=[title for title, _ in BLOCKS])
def test_example_runs(code):
    assert len(code.strip().splitlines()) <= 20
    exec(compile(code, str(README), "exec"), {})
