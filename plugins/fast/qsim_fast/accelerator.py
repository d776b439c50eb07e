"""The accelerator: quantizers by native kernels, attention by tiles, C++ sources compiled for this processor."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor

from qsim_core import Format
from qsim_core.quantizers.scales import Scales
from qsim_core.sites.sites import Sites
from qsim_fast.causal_attention import QUERIES, SCORES
from qsim_fast.compiled import Compiled, compiled
from qsim_fast.kernels import native
from qsim_fast.quantizing import cast, errors, quantize, scales
from qsim_fast.tiled_attention import attend


class Fast:
    """The kernels of the CPU and, with Triton, of GPUs. It is a `qsim_core.formats.accelerator.Accelerator`."""

    def __init__(self, queries: int = QUERIES, scores: int = SCORES) -> None:
        self.queries = queries
        """The number of queries that causal attention computes at a time."""
        self.scores = scores
        """The number of scores that attention computes at a time."""

    def quantize(
        self, quantizer: Any, x: Tensor, scales: Scales | None = None, out: Tensor | None = None
    ) -> Tensor | None:
        """Quantize by a format or a scheme, with the reference's bits; None if the kernels cannot."""
        if isinstance(quantizer, Format):
            return cast(quantizer, x, out)
        return quantize(quantizer, x, scales, result=out)

    def scales(self, scheme: Any, x: Tensor) -> Scales | None:
        """Give the scales and zero points of `x`, with the reference's bits; None if the kernels cannot."""
        return scales(scheme, x)

    def errors(self, quantizer: Any, x: Tensor, y: Tensor) -> tuple[float, float, int, int] | None:
        """Add up what quantizing `x` to `y` did; None if the kernels cannot."""
        return errors(quantizer, x, y)

    def attend(self, sites: Sites, *args: Any, **kwargs: Any) -> Tensor | None:
        """Compute attention a few heads, or a few queries, at a time; None if its sites do not allow it."""
        return attend(sites, *args, **kwargs, queries=self.queries, scores=self.scores)

    def at_once(self) -> AbstractContextManager[None]:
        """Compile the kernels at the first call inside, unless they are switched off."""
        return nullcontext() if native.switched_off() else native.only(native.forced() or True)

    def compiled(self, source: Path, elements: int) -> Compiled | None:
        """Compile a C++ source for this processor, once Python has done as much work as the compiler takes.

        `elements` is the work of this call, in elements that are quantized. None: it is too early, or there is no
        compiler.
        """
        return compiled(source, elements)


ACCELERATOR = Fast()
