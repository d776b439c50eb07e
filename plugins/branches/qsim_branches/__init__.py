"""Products beside the quantized one: `svdquant()` has a low-rank branch, `arcquant()` residual channels."""

from __future__ import annotations

from qsim_branches.arcquant import ARCQuant as ARCQuant
from qsim_branches.svdquant import SVDQuant as SVDQuant
from qsim_core import Transform, hookimpl


@hookimpl
def qsim_transforms() -> list[type[Transform]]:
    return [SVDQuant, ARCQuant]
