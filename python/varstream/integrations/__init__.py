"""The interfaces that other libraries made customary, on varstream's operators.

Each module is imported by its own name, so that none costs an import it doesn't need:
``flash_attn`` and ``flash_attn_3`` need torch only, ``transformers`` needs transformers.
"""
