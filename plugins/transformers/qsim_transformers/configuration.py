"""The configuration of a checkpoint: the JSON that `save_pretrained` writes beside the weights.

transformers names the family, `model_type`, and the class, `architectures`. diffusers names the class alone: of a
model in config.json, of a pipeline in model_index.json. From the hub only these files are fetched.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qsim_core.errors import ModelError, one_line
from qsim_core.errors import one_line as line  # noqa: F401 - its name in qsim_core.configuration of 0.1
from qsim_core.evaluation.configuration import FILES, read_configuration, read_directory
from qsim_core.evaluation.configuration import stored_dtype as dtype_in
from qsim_transformers.hub import offline_unless_reachable

FIELDS = {
    "ForCausalLM": "perplexity",
    "LMHeadModel": "perplexity",
    "ForMaskedLM": "masked_lm",
    "ForQuestionAnswering": "question_answering",
    "ForImageClassification": "accuracy",
    "ForImageClassificationWithTeacher": "accuracy",
    "ForSequenceClassification": "accuracy",
}
"""Ending of the name of a class with a head -> the evaluator of its field. Other classes are compared with their own
outputs in full precision."""
DIFFUSERS = "diffusers"


def family(source: str) -> str:
    """The `model_type` of a model, or "diffusers" for a directory that diffusers wrote. Raises `ModelError`."""
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
    """The dtype of a checkpoint's weights, like "bfloat16", if its configuration names one. Raises `ModelError`."""
    return dtype_in(configuration(source))


def evaluator_of(architecture: str) -> str:
    """The evaluator of a class's field; `fidelity` (to its outputs in full precision) where no field is known."""
    return next((evaluator for end, evaluator in FIELDS.items() if architecture.endswith(end)), "fidelity")


def configuration(source: str) -> dict[str, Any]:
    """The content of model_index.json, or of config.json. Raises `ModelError`."""
    return read_directory(Path(source)) if Path(source).is_dir() else read_configuration(_on_the_hub(source))


def _config(source: str) -> str:
    return f"{source}/config.json"


def _on_the_hub(name: str) -> Path:
    from transformers.utils.hub import cached_file

    missing = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    index, config = FILES
    try:
        with offline_unless_reachable(name):
            found = cached_file(name, index, **missing) or cached_file(name, config)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"no model {name!r}: it is neither a directory nor a model that a plugin names, and the hub did not give "
            f"it ({one_line(error).partition('. ')[0]})"
        ) from None
    return Path(found)
