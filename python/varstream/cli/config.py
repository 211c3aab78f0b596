"""The CONFIG argument of ``varstream plan`` and ``verify``: a file, a folder or a cached model."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from varstream.cli.errors import UserError

WHERE = (
    "config.json of a Hugging Face model, its folder, or the name of a model in the local "
    "Hugging Face cache (nothing is downloaded)."
)
MODEL_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def read_config(name: str) -> Any:
    """A Hugging Face configuration from a file, a folder or the local cache.

    Raises:
        UserError: nothing of this name is here, or it is no configuration of a model that
            ``vs.stream`` understands.
    """
    if find_spec("transformers") is None:
        raise UserError("needs transformers; pip install transformers")
    path = _find(name)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}; give a config.json") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON ({error}); give a model's config.json") from None
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise UserError(
            f"{path} has no model_type, so it is no model's configuration; "
            "give the config.json of a Hugging Face model"
        )
    kind = values["model_type"]
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(
            f"{path} has model type {kind!r}, no causal language model of transformers; "
            "for a model of your own use vs.stream_layer"
        )
    if values.get("quantization_config"):
        raise UserError(
            f"{path} has a quantization_config, and vs.stream trains plain weights only; "
            "give the config of the unquantized model"
        )
    from transformers import CONFIG_MAPPING
    from transformers.utils import logging

    from varstream.testing.shrink import SIZES, shrink_config

    logging.set_verbosity_error()
    try:
        config = CONFIG_MAPPING[kind].from_dict(values)
        if getattr(config, "text_config", None) is not None:
            raise UserError(
                f"{path} describes a {kind} of several parts, and vs.stream takes a language model "
                f"alone; give the config.json of its {config.get_text_config().model_type}"
            )
        missing = [name for name in SIZES if getattr(config, name, None) is None]
        if missing:
            raise UserError(
                f"{path}: a {kind} has no {missing[0]}, and vs.stream takes decoders of attention "
                "layers; for a model of your own use vs.stream_layer"
            )
        shrink_config(config)
    except UserError:
        raise
    except Exception as error:  # transformers checks its fields with errors of many types
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"{path} is no valid {kind} configuration ({reason}); mend it") from error
    return config


def _find(name: str) -> Path:
    path = Path(name)
    try:
        if path.is_dir():
            path = path / "config.json"
        if path.exists():
            return path
    except OSError as error:  # a name too long, a folder that may not be entered
        reason = error.strerror
        raise UserError(f"{name[:80]} can't be read: {reason}; give a config.json") from None
    if path.name != "config.json" and path.suffix != ".json" and MODEL_ID.fullmatch(name):
        return _find_cached(name)
    raise UserError(f"{path} doesn't exist; give a model's config.json or its folder")


def _find_cached(name: str) -> Path:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # such as a..b: no model can be called so
        cached = None
    if isinstance(cached, str):
        return Path(cached)
    raise UserError(
        f"{name} is no file here and no model in the local Hugging Face cache; "
        f"give a config.json or its folder, or fetch it: hf download {name} config.json"
    )
