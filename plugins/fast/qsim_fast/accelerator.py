"""The accelerator: quantizers by native kernels, attention by tiles, C++ sources compiled for this processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from qsim_core import Format
from qsim_core.quantizers.scales import Scales
from qsim_core.sites.sites import Sites
from qsim_fast.compiled import Compiled, compiled
from qsim_fast.quantizing import cast, quantize
from qsim_fast.tiled_attention import attend


class Fast:
    """The kernels of the CPU and, where Triton runs, of GPUs, as `qsim_core.formats.accelerator.Accelerator` asks."""

    def quantize(
        self, quantizer: Any, x: Tensor, scales: Scales | None = None, out: Tensor | None = None
    ) -> Tensor | None:
        """Quantize by a format or a scheme with the reference's bits; None where the kernels do not know how."""
        if isinstance(quantizer, Format):
            return cast(quantizer, x, out)
        return quantize(quantizer, x, scales, result=out)

    def attend(self, sites: Sites, *args: Any, **kwargs: Any) -> Tensor | None:
        """Compute fused attention a few heads, or a few queries, at a time; None where its sites do not allow it."""
        return attend(sites, *args, **kwargs)

    def compiled(self, source: Path, elements: int) -> Compiled | None:
        """Compile a C++ source for this processor, once Python has done as much work as the compiler takes.

        `elements` is the work of this call, as if it were quantized. None: there is no compiler, or it is too early.
        """
        return compiled(source, elements)


ACCELERATOR = Fast()
