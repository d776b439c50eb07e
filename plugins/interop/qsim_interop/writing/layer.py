"""One layer of an export: the codes of its weight, the scales, and the quantizer of its inputs."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qsim_core.errors import RecipeError
from qsim_core.formats.codes import Encoded
from qsim_core.formats.format import Format
from qsim_core.quantizers.scheme import Scheme
from qsim_core.quantizers.standard_schemes import AtScale
from qsim_core.transforms.encoded_weights import EncodedWeight
from qsim_interop.stacks import Stack, VllmNvfp4
from qsim_interop.writing.bit_patterns import is_format


@dataclass(frozen=True)
class Layer:
    """A linear layer whose weight [N, K] is encoded."""

    module: str
    """The module's path in the model."""
    weight: EncodedWeight
    inputs: Any = None
    """The quantizer of the inputs, with its static scales; None: they are not quantized."""
    kind: str = "Linear"
    """The class of the module: Linear; Conv1D, which stores its weight transposed; or one that stacks experts."""
    parameter: str = ""
    """The name of the parameter that the weight is, or is a part of."""

    part: int = 0
    """The place of the layer among the projections that a stack of experts joins."""
    stacked: int = 0
    """The experts whose rows stand one below the other; 0: it is not a stack."""

    @property
    def transposed(self) -> bool:
        """True if the module stores its weight as [K, N]."""
        return self.kind == "Conv1D"

    @property
    def scheme(self) -> Scheme:
        """The scheme of the weight. Raises `RecipeError` for a quantizer without scales."""
        quantizer = self.weight.quantizer
        scheme: Any = quantizer.stored_as if isinstance(quantizer, Stack) else quantizer.plain
        if not isinstance(scheme, Scheme) and scheme.granularity != "element":
            raise RecipeError(f"{self.module}: {scheme} has more than codes under scales, and such files hold no more")
        if not isinstance(scheme, Scheme):
            raise RecipeError(f"{self.module}: {scheme} has no scales; say channel({scheme}) or block({scheme}, 32)")
        return scheme

    @property
    def element(self) -> Format:
        """The number format of the codes."""
        return self.scheme.coded

    @property
    def codes(self) -> Tensor:
        """The bit patterns, uint8 [N, K]."""
        return self.weight.encoded.codes.cpu()

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs, [N, K]."""
        rows, columns = self.codes.shape
        return rows, columns

    @property
    def numbers(self) -> Tensor:
        """The integers that the codes stand for, float32 [N, K]."""
        return self.element.from_codes(self.codes)

    @property
    def zero_points(self) -> Tensor | None:
        """The integers that stand for zero, in the shape of the scales; None for symmetric scales."""
        zeros = self.weight.encoded.zero_points
        return None if zeros is None else self._by_rows(self.element.from_codes(zeros.cpu()))

    @functools.cached_property
    def scales(self) -> Tensor:
        """The scales in float32: [1] for the tensor, [N, 1], [N, blocks], or [tiles, tiles]."""
        return self._by_rows(self._stored(self.weight.encoded.scales))

    @property
    def scale_codes(self) -> Tensor:
        """The bit patterns of the scales, of a scheme that rounds them to a format."""
        scales = self.weight.encoded.scales
        assert isinstance(scales, Encoded)
        return scales.codes.cpu()

    @property
    def global_scale(self) -> Tensor:
        """The scale of the scales, float32 [1]. Raises `RecipeError` unless there is one for the whole weight."""
        if isinstance(self.scheme.scale, AtScale):
            return torch.tensor([self.scheme.scale.scale])
        found = getattr(self.weight.encoded.scales, "scales", None)
        if not isinstance(found, Tensor) or found.numel() != 1:
            raise RecipeError(f"{self.module}: {self.scheme} has no single scale for the whole weight")
        return found.reshape(1).float().cpu()

    @property
    def has_nested_scales(self) -> bool:
        """True for scales in E4M3 under one scale for the whole weight, as NVFP4 has them."""
        scheme = self.scheme.scale
        if self.divides:
            return False
        if isinstance(scheme, Scheme) and (scheme.granularity != "tensor" or not scheme.symmetric):
            return False
        return isinstance(scheme, Scheme | AtScale) and is_format(scheme.rounds_to, "e4m3")

    @property
    def divides(self) -> bool:
        """True if the block scales are divided by the scale of the whole weight, as compressed-tensors does."""
        return isinstance(self.weight.quantizer, VllmNvfp4)

    @property
    def is_nvfp4(self) -> bool:
        """True for E2M1 in blocks of 16 under such scales."""
        return is_format(self.element, "e2m1") and self.block == 16 and self.has_nested_scales

    @property
    def is_mx(self) -> bool:
        """True for blocks of 32 under a power of two, as OCP MX has them."""
        return self.block == 32 and is_format(self.scale_format, "e8m0")

    @property
    def scale_format(self) -> Any:
        """The number format that the scales are rounded to without a scale of their own; None: there is none."""
        return None if self.scheme.scale is None else self.scheme.scale.unscaled

    @property
    def block(self) -> int | None:
        """The number of columns that share a scale, where it divides K; None: all of a row does.

        Raises `RecipeError` for blocks that do not divide K.
        """
        shared = self.scheme.granularity
        if not isinstance(shared, int) or shared > self.shape[1]:
            return None
        if self.shape[1] % shared:
            raise RecipeError(
                f"{self.module}: blocks of {shared} do not divide its {self.shape[1]} inputs; "
                f"{math.gcd(shared, self.shape[1])} would"
            )
        return shared

    def _stored(self, scales: Any) -> Tensor:
        if isinstance(self.weight.quantizer, Stack):
            return self.weight.quantizer.scales_of(self.weight.encoded).cpu()
        found: Tensor = self.scheme.scale.decode(scales) if isinstance(scales, Encoded) else scales  # type: ignore[union-attr]
        return found.float().cpu()

    def _by_rows(self, per_block: Tensor) -> Tensor:
        return per_block.reshape(1) if self.scheme.granularity == "tensor" else per_block.contiguous()
