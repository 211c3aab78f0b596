"""Python blocks of README and documentation run as tests, each page in one namespace."""

try:
    from sybil import Sybil
    from sybil.parsers.myst import PythonCodeBlockParser
except ImportError:  # such as a GPU machine's own Python

    def pytest_report_header() -> str:
        return "code blocks of the documents are left out: sybil is not installed"
else:
    pytest_collect_file = Sybil(
        parsers=[PythonCodeBlockParser()], patterns=["README.md", "docs/**/*.md", "docs/*.md"]
    ).pytest()
