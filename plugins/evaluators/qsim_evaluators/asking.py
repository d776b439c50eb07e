"""Ask a model for its logits: one of a library, or one that has neither a configuration nor a class for its outputs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from qsim_core import DataError, LoadedModel

NOT_NEEDED = ("use_cache", "token_type_ids")
"""Arguments that a model can do without."""


def arguments(loaded: LoadedModel, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `given` that the model's forward takes.

    The first one gets the name of the model's first argument if the model has no argument of its name. Raises
    `DataError` for a mask of padding that the model does not take.
    """
    taken = inspect.signature(loaded.model.forward).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
        return dict(given)
    found = {}
    for place, (name, value) in enumerate(given.items()):
        if name in taken:
            found[name] = value
        elif place == 0 and taken:
            found[next(iter(taken))] = value
        elif name == "attention_mask" and not bool(value.all()):
            raise DataError(f"{_named(loaded.model)} takes no attention_mask for padded texts; give --batch-size 1")
        elif name not in (*NOT_NEEDED, "attention_mask"):
            raise DataError(f"{_named(loaded.model)} takes {', '.join(taken) or 'no arguments'}, not {name}")
    return found


def logits(loaded: LoadedModel, inputs: Mapping[str, Any]) -> Tensor:
    """Return the model's logits: the tensor that it returns, or the one that has this name in its output."""
    output = loaded.model(**inputs)
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    found = found[0] if isinstance(found, tuple | list) and found else found
    if not isinstance(found, Tensor):
        raise DataError(
            f"{_named(loaded.model)} returns {type(output).__name__} without logits; return a tensor of them"
        )
    return found


def _named(model: nn.Module) -> str:
    return f"the model, {type(model).__name__},"
