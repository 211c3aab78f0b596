"""FlashAttention-2's Python interface: the names, arguments and returns of package ``flash_attn``
2.8.

``from varstream.integrations.flash_attn import flash_attn_varlen_func, unpad_input, pad_input``
stands where ``from flash_attn import ...`` and ``from flash_attn.bert_padding import ...`` stood.
Beyond the original: every floating dtype and device, dropout together with softcap, and an LSE
that carries its gradient.
"""

from varstream.integrations.flash_attn.attention import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from varstream.integrations.flash_attn.bert_padding import (
    index_first_axis,
    index_put_first_axis,
    pad_input,
    unpad_input,
)

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "index_first_axis",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
]
