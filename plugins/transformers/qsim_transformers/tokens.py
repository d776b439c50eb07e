"""Tell if a tokenizer and a model belong together."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from qsim_core import DataError


def check_ids(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the token ids. Raises `DataError` if one of them is beyond the model's table of embeddings."""
    found: Any = model
    table = found.get_input_embeddings() if hasattr(found, "get_input_embeddings") else None
    known, largest = getattr(table, "num_embeddings", None), int(ids.max()) if ids.numel() else 0
    if known is not None and largest >= known:
        raise DataError(
            f"the tokenizer gives token {largest}, and the model has tokens 0 to {known - 1}: one is not of the other"
        )
    return ids
