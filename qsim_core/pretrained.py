"""Models on disk or on the hub, through transformers' own `from_pretrained`: safetensors only, no remote code.

What every adapter of a transformers family shares. transformers is imported when a model is loaded, and is the
adapter's dependency, not the core's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from qsim_core.bases import LoadedModel
from qsim_core.errors import ModelError

TOKENIZERS = ("tokenizer.json", "*vocab*", "*.model", "merges.txt", "tekken.json")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def model_type(source: str) -> str:
    """The `model_type` that a model's configuration names. Raises `ModelError`."""
    directory = Path(source)
    if not directory.is_dir():
        return str(_hub_config(source).model_type)
    config = directory / "config.json"
    try:
        family = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except FileNotFoundError:
        raise ModelError(f"{source} has no config.json; a model is a directory that save_pretrained wrote") from None
    except (ValueError, AttributeError):
        raise ModelError(f"{config} is not the JSON of a model's configuration") from None
    if not isinstance(family, str):
        raise ModelError(f"{config} names no model_type")
    return family


def load_pretrained(model_class: Any, source: str, dtype: torch.dtype) -> LoadedModel:
    """A model and its tokenizer, in eval mode on the CPU. Raises `ModelError` for weights that are missing,
    pickled, corrupt, of other shapes than the configuration's, or not finite."""
    from safetensors import SafetensorError
    from transformers import AutoTokenizer

    _check_weights_exist(source)
    _check_tokenizer_exists(source)
    how = {"use_safetensors": True, "trust_remote_code": False, "ignore_mismatched_sizes": True}
    try:
        model, report = model_class.from_pretrained(source, dtype=dtype, output_loading_info=True, **how)
        tokenizer = AutoTokenizer.from_pretrained(source, use_fast=True, trust_remote_code=False)
    except SafetensorError as error:
        raise ModelError(f"the weights of {source} are corrupt: {_line(error)}; fetch or save them again") from None
    except Exception as error:  # a configuration can be wrong in as many ways as transformers has layers
        raise ModelError(f"{source} cannot be loaded: {_line(error)}") from None
    if report["mismatched_keys"]:
        name, stored, expected = sorted(report["mismatched_keys"])[0]
        raise ModelError(
            f"weight {name} of {source} has shape {tuple(stored)}, its configuration says {tuple(expected)}"
        )
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelError(f"the weights of {source} lack {missing[0]}{_more(missing)}")
    check_finite(model)
    return LoadedModel(model.eval(), tokenizer)


def check_finite(model: torch.nn.Module) -> None:
    """Raise `ModelError`, naming the parameter, if a weight is NaN or Inf."""
    bad = [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]
    if bad:
        raise ModelError(
            f"weight {bad[0]}{_more(bad)} holds NaN or Inf; nothing measured on this model would mean much"
        )


def _check_weights_exist(source: str) -> None:
    directory = Path(source)
    if not directory.is_dir() or any((directory / name).exists() for name in WEIGHTS):
        return
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
    if pickles:
        raise ModelError(
            f"{source} holds {pickles[0]}, a pickle, which could run code; load it where you trust it and "
            f"save_pretrained() it as safetensors"
        )
    raise ModelError(f"{source} has no weights: expected model.safetensors")


def _check_tokenizer_exists(source: str) -> None:
    """Without its files transformers makes a tokenizer that knows no word."""
    directory = Path(source)
    if directory.is_dir() and not any(next(directory.glob(pattern), None) for pattern in TOKENIZERS):
        raise ModelError(f"{source} has no tokenizer: expected tokenizer.json; save the tokenizer beside the model")


def _hub_config(name: str) -> Any:
    try:
        from transformers import AutoConfig
    except ImportError:
        raise ModelError(f"{name!r} is no directory, and without transformers no hub can be asked") from None
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"no model {name!r}: it is neither a directory nor a model of the zoo, and the hub did not give it "
            f"({_line(error).partition('. ')[0]})"
        ) from None


def _line(error: Exception) -> str:
    """The first sentence or two of a library's many-lined message."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:199] + "…"


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
