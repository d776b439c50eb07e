"""The structure of a PyTorch model, found by running it once: norms, pairs of weights, attention.

    >>> from qsim_structure import scale_group, trace
    >>> structure = trace(model, lambda: model(x))                        # doctest: +SKIP
    >>> scale_group(model, structure.groups[0], factors)                  # doctest: +SKIP

`trace` finds which weights read which norm, which weight makes the channels that another one reads, and which rows
belong to which head. The functions of `qsim_structure.folding` scale, reorder or rotate channels on both sides, so
that the function of the model stays the same. This library needs torch alone.

Each name below is imported when it is first used, so that `import qsim_structure` is fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "trace": "structure",
    "Structure": "structure",
    "NormGroup": "structure",
    "WeightPair": "structure",
    "Refused": "structure",
    "Attention": "heads",
    "Projection": "heads",
    "Rows": "channels",
    "Use": "channels",
    "Editing": "folding",
    "in_memory": "folding",
    "scale_group": "folding",
    "scale_pair": "folding",
    "permute_group": "folding",
    "permute_rows": "folding",
    "permute_scores": "folding",
    "rotate_values": "folding",
    "StructureError": "errors",
}

__all__ = list(_HOME)

if TYPE_CHECKING:
    from qsim_structure.channels import Rows as Rows
    from qsim_structure.channels import Use as Use
    from qsim_structure.errors import StructureError as StructureError
    from qsim_structure.folding import Editing as Editing
    from qsim_structure.folding import in_memory as in_memory
    from qsim_structure.folding import permute_group as permute_group
    from qsim_structure.folding import permute_rows as permute_rows
    from qsim_structure.folding import permute_scores as permute_scores
    from qsim_structure.folding import rotate_values as rotate_values
    from qsim_structure.folding import scale_group as scale_group
    from qsim_structure.folding import scale_pair as scale_pair
    from qsim_structure.heads import Attention as Attention
    from qsim_structure.heads import Projection as Projection
    from qsim_structure.structure import NormGroup as NormGroup
    from qsim_structure.structure import Refused as Refused
    from qsim_structure.structure import Structure as Structure
    from qsim_structure.structure import WeightPair as WeightPair
    from qsim_structure.structure import trace as trace


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"qsim_structure.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
