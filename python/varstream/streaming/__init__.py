"""Streaming backward: layers that keep their input and recompute one chunk at a time (StreamBP over
packed rows)."""

from varstream.streaming.huggingface import stream, unstream
from varstream.streaming.layer import stream_layer
from varstream.streaming.structure import UnsupportedModelError

__all__ = ["UnsupportedModelError", "stream", "stream_layer", "unstream"]
