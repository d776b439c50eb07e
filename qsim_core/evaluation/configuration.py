"""The configuration in a model's directory, config.json or model_index.json: its family, and the weights' dtype."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qsim_core.errors import ModelError
from qsim_core.files import read_text

FILES = ("model_index.json", "config.json")
"""The names of the file. The first is that of a pipeline of several models."""
SIMULATED = "qsim"
"""The method of quantization that stands for a recipe: the weights are stored as they are."""


def read_directory(directory: Path) -> dict[str, Any]:
    """The configuration in a directory. Raises `ModelError` if there is none."""
    for name in FILES:
        if (directory / name).is_file():
            return read_configuration(directory / name) | _of_modelopt(directory)
    raise ModelError(f"{directory} has no config.json; a model is a directory that save_pretrained wrote")


def read_configuration(path: Path) -> dict[str, Any]:
    """A configuration from its file. Raises `ModelError` if that is not a mapping in JSON."""
    try:
        found = json.loads(read_text(path, ModelError))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ModelError(f"{path} is not the JSON of a model's configuration")
    return found


def _of_modelopt(directory: Path) -> dict[str, Any]:
    """The file in which ModelOpt describes quantized weights, in the place of transformers' own description."""
    path = directory / "hf_quant_config.json"
    if not path.is_file():
        return {}
    found = read_configuration(path).get("quantization", {})
    return {"quantization_config": {"quant_method": "modelopt", "format": found.get("quant_algo")}}


def quantization(configuration: Mapping[str, Any]) -> str | None:
    """The format in which weights are stored quantized, like "compressed-tensors (pack-quantized)"; None: in none."""
    found, method = _quantization(configuration), quantization_method(configuration)
    details = (found.get(key) for key in ("format", "fmt", "quant_algo", "bits"))
    detail = next((str(value) for value in details if isinstance(value, str | int)), "")
    return f"{method} ({detail})" if detail else method


def quantization_method(configuration: Mapping[str, Any]) -> str | None:
    """The method by which weights were quantized, like "gptq"; None: they are not quantized."""
    found = _quantization(configuration)
    method = found.get("quant_method") or found.get("quant_type_name") or "a format without a name"
    return str(method) if found and method != SIMULATED else None


def _quantization(configuration: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a configuration, or of that of a part of the model, on quantized weights; empty: there is none."""
    for part in (configuration, *(part for part in configuration.values() if isinstance(part, dict))):
        found = part.get("quantization_config") or part.get("compression_config")
        if isinstance(found, dict):
            return found
    return {}


def family(configuration: Mapping[str, Any]) -> str | None:
    """The `model_type` that a configuration names; None if it names none."""
    found = configuration.get("model_type")
    return found if isinstance(found, str) else None


def stored_dtype(configuration: Mapping[str, Any]) -> str | None:
    """The dtype of the weights, like "bfloat16", of the model or of one of its parts; None if none is named."""
    parts = (configuration, *(part for part in configuration.values() if isinstance(part, dict)))
    named = (part.get("dtype") or part.get("torch_dtype") for part in parts)
    return next((name for name in named if isinstance(name, str)), None)
