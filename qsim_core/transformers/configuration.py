"""What a checkpoint says about itself, in the JSON that `save_pretrained` wrote beside its weights.

transformers names the family, `model_type`, and the class, `architectures`; diffusers names the class alone, of a
model in config.json and of a whole pipeline in model_index.json. From a hub only these files are fetched.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qsim_core.errors import ModelError

FIELDS = {
    "ForCausalLM": "perplexity",
    "LMHeadModel": "perplexity",
    "ForMaskedLM": "masked_lm",
    "ForQuestionAnswering": "question_answering",
    "ForImageClassification": "accuracy",
    "ForImageClassificationWithTeacher": "accuracy",
    "ForSequenceClassification": "accuracy",
}
"""How the name of a class with a head ends -> the evaluator of its field. Any other is held to its own outputs."""
DIFFUSERS = "diffusers"


def family(source: str) -> str:
    """The `model_type` of a model, or "diffusers" for what diffusers wrote. Raises `ModelError`."""
    found = configuration(source)
    if "_class_name" in found:
        return DIFFUSERS
    if not isinstance(found.get("model_type"), str):
        raise ModelError(f"{_config(source)} names no model_type")
    return str(found["model_type"])


def architecture(source: str) -> str:
    """The class that a checkpoint was saved from. Raises `ModelError`."""
    found = configuration(source)
    classes = [found["_class_name"]] if "_class_name" in found else found.get("architectures") or []
    if len(classes) != 1 or not isinstance(classes[0], str):
        raise ModelError(f'{_config(source)} names no architecture, like `"architectures": ["OPTForCausalLM"]`')
    return str(classes[0])


def stored_dtype(source: str) -> str | None:
    """The dtype that a checkpoint's weights were saved in, like "bfloat16", if it says. Raises `ModelError`."""
    found = configuration(source)
    parts = (found, *(part for part in found.values() if isinstance(part, dict)))
    said = (part.get("dtype") or part.get("torch_dtype") for part in parts)
    return next((name for name in said if isinstance(name, str)), None)


def evaluator_of(architecture: str) -> str:
    """The evaluator of a class's field, `fidelity` (to its outputs in full precision) where no field is known."""
    return next((evaluator for end, evaluator in FIELDS.items() if architecture.endswith(end)), "fidelity")


def configuration(source: str) -> dict[str, Any]:
    """What model_index.json says, or config.json. Raises `ModelError`."""
    path = _in_directory(source) if Path(source).is_dir() else _on_the_hub(source)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ModelError(f"{path} is not the JSON of a model's configuration")
    return found


def _config(source: str) -> str:
    return f"{source}/config.json"


def _in_directory(source: str) -> Path:
    for name in ("model_index.json", "config.json"):
        if (Path(source) / name).is_file():
            return Path(source) / name
    raise ModelError(f"{source} has no config.json; a model is a directory that save_pretrained wrote")


def _on_the_hub(name: str) -> Path:
    try:
        from transformers.utils.hub import cached_file
    except ImportError:
        raise ModelError(f"{name!r} is no directory, and without transformers no hub can be asked") from None
    missing = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    try:
        found = cached_file(name, "model_index.json", **missing) or cached_file(name, "config.json")
    except (OSError, ValueError) as error:
        raise ModelError(
            f"no model {name!r}: it is neither a directory nor a model of the zoo, and the hub did not give it "
            f"({line(error).partition('. ')[0]})"
        ) from None
    return Path(found)


def line(error: Exception) -> str:
    """The first sentence or two of a library's many-lined message."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:199] + "…"
