"""The error of this library."""

from __future__ import annotations


class StructureError(ValueError):
    """A declaration or an order does not fit the model, or a weight is not in memory."""
