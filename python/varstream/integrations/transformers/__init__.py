"""``attn_implementation="varstream"`` and the fused head for Hugging Face models.

Importing this module registers an attention function and, with it, a mask function of our own: an
implementation without one silently gets no mask at all, and FlashAttention's drops custom masks.
"""

import inspect

try:
    from transformers import AttentionInterface, AttentionMaskInterface, __version__
    from transformers.masking_utils import sdpa_mask

    from varstream.integrations.transformers.attention import varstream_attention
    from varstream.integrations.transformers.head import fuse_head, unfuse_head
    from varstream.integrations.transformers.masks import RowMask, varstream_mask
except ImportError as error:
    raise ImportError(
        "varstream.integrations.transformers needs transformers 5 or later: "
        f'pip install "varstream[hf]" ({error})'
    ) from None

if "q_offset" not in inspect.signature(sdpa_mask).parameters:
    raise ImportError(
        "varstream.integrations.transformers needs a transformers whose mask functions take "
        f"q_length and q_offset (5.23 is known to), got {__version__}: "
        'pip install -U "varstream[hf]"'
    )
AttentionInterface.register("varstream", varstream_attention)
AttentionMaskInterface.register("varstream", varstream_mask)

__all__ = ["RowMask", "fuse_head", "unfuse_head", "varstream_attention", "varstream_mask"]
