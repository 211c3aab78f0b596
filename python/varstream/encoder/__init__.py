"""Encoders that run on real tokens only: packed once, every layer on packed rows, unpacked once."""

from varstream.encoder import pooling
from varstream.encoder.huggingface import padding_free, restore_padding

__all__ = ["padding_free", "pooling", "restore_padding"]
