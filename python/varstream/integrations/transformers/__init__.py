"""``attn_implementation="varstream"`` for Hugging Face models.

Importing this module registers an attention function and, with it, a mask function of our own: an
implementation without one silently gets no mask at all, and FlashAttention's drops custom masks.
"""

try:
    from transformers import AttentionInterface, AttentionMaskInterface

    from varstream.integrations.transformers.attention import varstream_attention
    from varstream.integrations.transformers.masks import RowMask, varstream_mask
except ImportError as error:
    raise ImportError(
        "varstream.integrations.transformers needs transformers 5 or later: "
        f'pip install "varstream[hf]" ({error})'
    ) from None

AttentionInterface.register("varstream", varstream_attention)
AttentionMaskInterface.register("varstream", varstream_mask)

__all__ = ["RowMask", "varstream_attention", "varstream_mask"]
