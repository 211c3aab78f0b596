"""The documents: links lead somewhere, every page's code is collected as tests, the site builds."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import varstream

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [*sorted(ROOT.glob("*.md")), ROOT / "csrc/README.md", ROOT / "bench/README.md", *DOCS]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_python_block_is_a_test(pytestconfig):
    """The blocks run because pytest collects them: none may be spelt so that it is missed."""
    pages = [ROOT / "README.md", *DOCS]
    blocks = sum(len(re.findall(r"^```python\n", p.read_text(), re.M)) for p in pages)
    spelt_otherwise = [
        p.name for p in pages if re.search(r"```(py|Python|pycon)\b(?!thon)", p.read_text())
    ]
    assert not spelt_otherwise
    collected = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--collect-only", "README.md", "docs"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout
    assert len(re.findall(r"\.md::line", collected)) == blocks


def test_the_reference_names_everything_public():
    named = set(
        re.findall(r"auto\w+:: (?:varstream\.)?([\w.]+)", "".join(map(Path.read_text, DOCS)))
    )
    missing = set(varstream.__all__) - named - {"__version__"}
    assert not missing, f"docs/api leaves out {sorted(missing)}"


@pytest.mark.slow
def test_site_builds_without_warnings(tmp_path):
    run = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "docs"]
    result = subprocess.run([*run, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "api" / "ops.html").exists()
