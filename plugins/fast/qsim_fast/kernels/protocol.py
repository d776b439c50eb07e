"""The protocol of the kernels, which the CPU's and the GPU's fulfil."""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor

from qsim_core.formats.rounding import Steps
from qsim_fast.kernels.arguments import GIVEN, Scaling

Part = Literal["", "scale", "tensor_scale"]
"""The factor that results are written without: none, the scale of their block, or the tensor scale."""


class Kernels(Protocol):
    """Kernels that quantize in one pass over memory: `native.CpuKernels`, or `gpu.GpuKernels`."""

    longest_block: float
    """The longest block that is measured and rounded in one pass."""
    writes_parts: bool
    """True if results may be floats `without` a factor."""
    writes_fractions: bool
    """True if codes may be fractions of a unit."""

    def extremes(self, x: Tensor, block: int, magnitude: bool) -> tuple[Tensor | None, Tensor]:
        """Find the lowest and the highest value of each block of x [A, K]: [A, ceil(K / block)].

        With `magnitude` the highest magnitude alone, and None.
        """

    def round(
        self,
        x: Tensor,
        out: Tensor,
        steps: Steps,
        block: int,
        scale: Tensor | None = None,
        zero: Tensor | None = None,
        shift: float = 0.0,
        scaling: Scaling = GIVEN,
        tensor_scale: float | Tensor = 1.0,
        without: Part = "",
        unit: float = 1.0,
    ) -> Tensor:
        """Round x [A, K] into `out`, as values of its dtype or as int8 codes; scales and zeros are [A or 1, B or 1].

        A code is a number of units times `unit`, minus `shift`.

        The scales are given, unless `scaling` has a rule: then they are computed and written. `tensor_scale` is the
        scale of the scales. Without a scale the format alone decides, also on overflow.
        """

    def any_below(self, x: Tensor, bound: float) -> bool:
        """Tell if a bfloat16 tensor holds a non-zero value whose magnitude is below `bound`, a power of two."""

    def scale_sums(
        self,
        sums: Tensor,
        rows: tuple[Tensor, Tensor | None, Tensor | None],
        columns: tuple[Tensor, Tensor | None, Tensor | None],
        bias: Tensor | None,
    ) -> Tensor:
        """Turn integer sums [M, N] into float32 in the same memory, by the formula of `qsim_fast.int8`.

        `rows` and `columns` are scale, zero points and sums of codes.
        """
