"""What attn_implementation="varstream" refuses by name, and how its import fails."""

import copy
import subprocess
import sys

import pytest
import torch
import transformers
from attention_models import DECODERS, GEMMA, SIZES, Layer, build, heads, padded
from transformers.masking_utils import create_causal_mask

from varstream.integrations.transformers import RowMask, varstream_attention, varstream_mask


def mask_of(config, **kwargs):
    config = copy.deepcopy(config)
    config._attn_implementation = "varstream"
    kwargs = {"attention_mask": None, "past_key_values": None} | kwargs
    return create_causal_mask(config=config, inputs_embeds=torch.randn(1, 4, 8), **kwargs)


def everything(batch, head, q, k):
    return q >= 0


@pytest.mark.parametrize("argument", ["or_mask_function", "and_mask_function"])
def test_custom_mask_functions_are_refused(argument):
    with pytest.raises(
        ValueError,
        match=r"mask \w+\(causal_mask_function, .*everything\) has an or_mask_function or",
    ):
        mask_of(DECODERS["llama"], **{argument: everything})


def test_blocks_are_refused():
    with pytest.raises(ValueError, match=r"or_masks\(causal_mask_function, blockwise_overlay\)"):
        mask_of(DECODERS["llama"], block_sequence_ids=torch.tensor([[0, 0, -1, -1]]))
    positions = torch.tensor([[0, 1, 0, 1]])
    with pytest.raises(ValueError, match="blockwise_overlay"):
        mask_of(
            DECODERS["llama"],
            position_ids=positions,
            block_sequence_ids=torch.tensor([[0, 0, -1, -1]]),
        )


def test_chunked_attention_is_refused():
    config = transformers.LlamaConfig(**SIZES)
    config.attention_chunk_size, config._attn_implementation = 2, "varstream"
    with pytest.raises(ValueError, match=r"and_masks\(chunked_overlay, causal_mask_function\)"):
        transformers.masking_utils.create_chunked_causal_mask(
            config, torch.randn(1, 4, 8), None, None
        )


def test_bidirectional_gemma_is_refused():
    config = transformers.Gemma3TextConfig(**SIZES, **GEMMA, use_bidirectional_attention=True)
    with pytest.raises(ValueError, match="or_mask_function or and_mask_function"):
        build(config, "varstream")(**padded("none"))


def test_a_lambda_is_refused():
    with pytest.raises(ValueError, match="<lambda> is none that packed rows express"):
        varstream_mask(1, 4, 4, mask_function=lambda b, h, q, k: k <= q)


def test_four_dimensional_masks_are_refused():
    mask = torch.zeros(1, 1, 11, 11, dtype=torch.float64)
    inputs = padded("none", batch=1) | {"attention_mask": mask}
    with pytest.raises(ValueError, match=r"tensor \(B, Sk\) .* got Tensor of shape \(1, 1, 11, 11"):
        build(DECODERS["llama"], "varstream")(**inputs)


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_holes_under_a_window_are_refused(name):
    with pytest.raises(ValueError, match="no padding between real tokens .* row 1"):
        build(DECODERS[name], "varstream")(**padded("holes"))


def test_a_mask_that_forgets_the_cache_is_refused():
    model = build(DECODERS["llama"], "varstream")
    inputs = padded("none")
    cache = model(**inputs).past_key_values
    with pytest.raises(ValueError, match=r"must cover all 22 tokens.* got shape \(3, 11\)"):
        model(**inputs, past_key_values=cache)


def test_a_static_cache_without_causality_is_refused():
    cache = transformers.StaticCache(config=DECODERS["llama_bidirectional"], max_cache_len=8)
    with pytest.raises(ValueError, match="over 8 keys must come with an attention_mask"):
        mask_of(DECODERS["llama_bidirectional"], past_key_values=cache)


Q, K, V = heads()
CU = torch.tensor([0, 4, 10], dtype=torch.int32)
LENGTHS = {"cu_seq_lens_q": CU, "cu_seq_lens_k": CU}
HALF = torch.tensor([[0, 1, 1, 1, 1], [1] * 5])
PADDED = varstream_mask(2, 5, 5, attention_mask=HALF)
CALLS = [
    ((Q, K, V, None), {"position_bias": Q}, "position_bias must not be given"),
    ((Q, K, V, None), {"head_mask": Q}, "head_mask must not be given"),
    ((Q, K, V, None), {"output_attentions": True}, "output_attentions must not be given"),
    ((Q, K, V, None), {"block_table": CU}, "block_table must not be given"),
    ((Q, K, V, None), {"sliding_window": 0}, "sliding_window must be >= 1"),
    ((Q, K, V, None), {**LENGTHS, "cu_seq_lens_k": None}, "must be given together"),
    ((Q, K, V, PADDED), LENGTHS, "must not be given with an attention_mask that has padding"),
    ((Q, K, V, None), {**LENGTHS, "max_length_q": 4}, "max_seqlen_q must be at least"),
    ((Q, K[:, :, :4], V[:, :, :4], PADDED), {}, r"is for .* \(2, 5, 5\), got query"),
    ((Q, K, V, CU[None]), {}, "attention_mask must have size 2"),
    ((Q[0], K, V, None), {}, "query must have 4 dimensions"),
    ((Q, K[:1], V, None), {}, "key must have size 2 in dimension 0"),
    ((Q, K, V, HALF), {"is_causal": False, "sliding_window": 2}, "must belong to self-attention"),
]


@pytest.mark.parametrize(("args", "kwargs", "message"), CALLS)
def test_calls_that_are_refused(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        varstream_attention(Layer(), *args, **kwargs)


def test_a_module_that_says_nothing_of_causality():
    with pytest.raises(ValueError, match="is_causal must be given: Identity"):
        varstream_attention(torch.nn.Identity(), Q, K, V, None)


def test_a_mask_made_for_another_pattern():
    made = varstream_mask(1, 4, 4)
    assert isinstance(made, RowMask) and varstream_mask(1, 4, 4, attention_mask=made) is made
    bidirectional = transformers.masking_utils.bidirectional_mask_function
    with pytest.raises(ValueError, match="the model asks for bidirectional_mask_function"):
        varstream_mask(1, 4, 4, attention_mask=made, mask_function=bidirectional)
    with pytest.raises(ValueError, match=r"attention_mask must be \(B, S\)"):
        varstream_mask(1, 4, 4, attention_mask=torch.ones(4))


def test_additive_masks():
    additive = torch.tensor([[0.0, 0.0, 0.0, -torch.inf]])
    with pytest.raises(ValueError, match="attention_mask .* must hold 0 and 1, got -inf"):
        varstream_mask(1, 4, 4, attention_mask=additive)
    q = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ValueError, match="attention_mask .* must hold 0 and 1, got -inf"):
        varstream_attention(Layer(), q, q, q, additive)


# --- imports --------------------------------------------------------------------------------------


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_transformers_is_imported_by_its_own_face_only():
    code = "import sys, varstream.integrations.flash_attn, varstream.integrations.flash_attn_3\n"
    result = run(code + "assert 'transformers' not in sys.modules")
    assert result.returncode == 0, result.stderr


def test_without_transformers_the_error_says_what_to_install():
    code = (
        "import sys; sys.modules['transformers'] = None\nimport varstream.integrations.transformers"
    )
    error = run(code).stderr.strip().splitlines()[-1]
    assert error.startswith("ImportError: varstream.integrations.transformers needs transformers")
    assert 'pip install "varstream[hf]"' in error


def test_a_transformers_with_other_mask_functions_is_refused():
    code = "import transformers.masking_utils as m; m.sdpa_mask = lambda cache_position: None\n"
    error = run(code + "import varstream.integrations.transformers").stderr.strip().splitlines()[-1]
    assert error.startswith("ImportError: varstream.integrations.transformers needs a transformers")
    assert f"got {transformers.__version__}" in error
