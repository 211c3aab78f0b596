"""The examples run as they stand, and are as short as they claim."""

import re
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
SOURCE = (EXAMPLES / "gpt_stream.py").read_text()


@pytest.fixture(scope="module")
def gpt_stream():
    """The example as a module, without leaving it importable."""
    spec = spec_from_file_location("gpt_stream", EXAMPLES / "gpt_stream.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    assert "gpt_stream" not in sys.modules
    return module


def test_the_model_is_about_sixty_lines():
    model = SOURCE.split("# --- the model ---")[1].split("# --- the data ---")[0]
    lines = [line for line in model.splitlines()[1:] if re.match(r"\s*[^#\s]", line)]
    assert 40 <= len(lines) <= 60


@pytest.mark.parametrize("head", [[], ["--untied"]], ids=["tied", "untied"])
def test_gpt_trains_and_its_gradients_are_exact(gpt_stream, head, capfd):
    assert gpt_stream.main(["--quick", *head]) <= 1e-10
    out, err = capfd.readouterr()
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", out)]
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.05
    plain, streamed = (float(peak) for peak in re.findall(r"([\d.]+) MiB", out))
    assert streamed < plain / 2
    assert err == ""


@pytest.mark.parametrize("chunk_size", [1, 37, "auto"])
def test_gpt_over_awkward_documents(gpt_stream, chunk_size):
    lengths = [1, 2, 13, 0, 31]
    model = gpt_stream.GPT(16, 2, 4, 2, context=31, vocab=11, chunk_size=chunk_size)
    ids = torch.randint(11, (sum(lengths),))
    positions = torch.cat([torch.arange(n) for n in lengths])
    cu_seqlens = torch.tensor([0, 1, 3, 16, 16, 47], dtype=torch.int32)
    targets = torch.randint(11, (sum(lengths),)).masked_fill(positions % 5 == 3, -100)
    assert gpt_stream.check(model, (ids, positions, cu_seqlens, targets)) <= 1e-10


def test_check_sees_a_parameter_left_out(gpt_stream, monkeypatch):
    """What isn't named in ``params`` gets no gradient, and the example's own check says so."""
    (row,) = gpt_stream.packed_rows(1, 512, 200)
    model = gpt_stream.GPT(16, 1, 4, 2, context=200)
    block = type(model.blocks[0])
    every = block.parameters
    monkeypatch.setattr(block, "parameters", lambda self: list(every(self))[1:])
    assert gpt_stream.check(model, row) == 1.0
