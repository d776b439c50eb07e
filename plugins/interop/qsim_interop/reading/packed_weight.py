"""A weight as a checkpoint stores it: where its parts are, and the parts themselves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from qsim_core import parse
from qsim_core.errors import ModelError
from qsim_core.formats.codes import Encoded
from qsim_core.formats.quantizer import Quantizer
from qsim_core.matmuls.layout import LAST, Layout
from qsim_core.quantizers.scales import Scales
from qsim_core.quantizers.scheme import Scheme
from qsim_core.transforms.encoded_weights import EncodedWeight
from qsim_interop.stacks import VllmNvfp4

OF_WEIGHT = ("codes", "scales", "zero_points", "global_scale", "groups")
"""The parts that a weight's bits are counted from; others belong to its inputs."""


@dataclass(frozen=True)
class Part:
    """A stored tensor, and the shape that it has to have."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Layer:
    """A packed layer, as configuration and headers tell it; no value has been read."""

    module: str
    """The module's path in the model."""
    shape: tuple[int, int]
    """Outputs and inputs, [N, K]."""
    weights: Scheme | None
    """The quantizer that the weight stands for; None: qsim has none, and the values alone are read."""
    activations: Quantizer | None = None
    """The quantizer of the inputs, as the checkpoint asks for it; None: they are not quantized."""
    parts: Mapping[str, Part] = field(default_factory=dict)
    """Stored tensors by role: codes, scales, zero_points, global_scale, groups; input_scale, input_zero_point and
    input_global_scale of static inputs."""

    form: str = ""
    """The name of the stored format, where it is not the quantizer's."""
    experts: int = 0
    """The matrices that the parameter stacks, [E, K, rows]; the layer is their rows, [E * rows, K]. 0: no stack."""

    @property
    def scheme(self) -> Scheme:
        """The quantizer that the weight stands for. Raises `ModelError` if qsim has none."""
        if self.weights is None:
            raise ModelError(f"{self.module} is of type {self.form}: its values alone are read, by `dequantize`")
        return self.weights

    @property
    def weight(self) -> str:
        """The name of the parameter."""
        return self.module if self.experts else f"{self.module}.weight"

    def as_parameter(self, rows: Tensor) -> Tensor:
        """Values [N, K] in the shape of the parameter."""
        return rows.unflatten(0, (self.experts, -1)).transpose(1, 2).contiguous() if self.experts else rows


ACT_ORDER = "act-order"
"""The name of the layout of a weight whose columns are brought into the order of their groups."""


def _in_order_of(order: Tensor) -> Layout:
    """The layout of a weight [N, K] whose columns are taken in an order."""
    back = order.argsort()
    return Layout(ACT_ORDER, lambda weight: weight[:, order], lambda rows: rows[:, back])


def shape_of_scales(quantizer: Scheme, shape: tuple[int, int]) -> tuple[int, int]:
    """The shape of the scales of a weight [N, K]."""
    (rows, columns), shared = shape, quantizer.granularity
    if isinstance(shared, tuple):
        return math.ceil(rows / shared[0]), math.ceil(columns / shared[1])
    if isinstance(shared, int):
        return rows, math.ceil(columns / shared)
    return (1, 1) if shared == "tensor" else (rows, 1)


@dataclass(frozen=True)
class PackedWeight:
    """The codes of a weight [N, K] and everything that gives them a value.

    Scales and zero points are stored for blocks: [N or 1 or ceil(N / r), blocks]. The value of an element is
    (code's value - zero point) * scale, with the global scale in the scale.
    """

    quantizer: Scheme
    """The quantizer that it stands for."""
    codes: Tensor
    """Codes of the element format as `Encoded` has them: uint8, integers in two's complement."""
    scales: Tensor
    """The scales as they are stored, in their own dtype."""
    zero_points: Tensor | None = None
    """Zero points as whole numbers, in the shape of the scales; None for symmetric scales."""
    global_scale: Tensor | None = None
    """One number for the whole tensor; None if the format has none."""
    applied: Literal["multiply", "divide", "last"] = "multiply"
    """The block scales are multiplied or divided by the global scale; or the weight is multiplied by it, last."""
    groups: Tensor | None = None
    """The group of each column, [K], where columns were quantized in another order; None: groups lie side by side."""

    @property
    def effective_scales(self) -> Tensor:
        """The scales in float32, with the global scale applied."""
        scales = self.scales.float()
        if self.global_scale is None:
            return scales
        by = self.global_scale.float().reshape(())
        return scales / by if self.applied == "divide" else scales * by

    @property
    def known_scales(self) -> Scales | None:
        """The scales and zero points by row and block, as a simulation knows them; None for tiles and other orders."""
        last = self.applied == "last" and self.global_scale is not None
        if self.groups is not None or isinstance(self.quantizer.granularity, tuple) or last:
            return None
        return Scales(self.effective_scales, None if self.zero_points is None else self.zero_points.float())

    def stored(self, name: str) -> EncodedWeight | None:
        """The codes and scales as an encoded weight of a parameter [N, K]; None: no quantizer of qsim decodes them.

        Columns of act-order are brought into the order of their groups.
        """
        scheme, whole, last = self.quantizer, self.global_scale, self.applied == "last"
        if last and whole is not None and math.frexp(float(whole))[0] != 0.5:
            return None  # a product of three numbers is another one in another order
        codes, layout = self.codes, LAST
        if self.groups is not None:
            order = self.groups.long().argsort(stable=True)
            counts = self.groups.long().bincount(minlength=self.scales.shape[1])
            if not isinstance(scheme.granularity, int) or bool((counts[:-1] != scheme.granularity).any()):
                return None
            codes, layout = codes[:, order], _in_order_of(order)
        scales: Any = self.effective_scales
        if whole is not None:
            if self.scales.dtype != torch.float8_e4m3fn:
                return None
            octets = self.scales.contiguous().view(torch.uint8)
            scales = Encoded(octets, 8, torch.float32, whole.float().reshape(1))
        elif scheme.scale is not None:
            scales = scheme.scale.encode(scales)
        elif scheme.granularity == "tensor":
            scales = scales.reshape(1)
        zeros = None if self.zero_points is None else scheme.coded.to_codes(self.zero_points.float())
        if zeros is None and not scheme.symmetric:
            zeros = scheme.coded.to_codes(torch.zeros_like(self.effective_scales))
        divides = whole is not None and self.applied == "divide"
        if divides and scheme != parse("nvfp4"):
            return None
        encoded = Encoded(codes, scheme.coded.width, torch.float32, scales, zeros)
        return EncodedWeight(name, VllmNvfp4() if divides else scheme, layout, encoded, scales=self.known_scales)

    def units(self) -> Tensor:
        """The values of the codes in float32, without scales."""
        return self.quantizer.element.full().from_codes(self.codes, torch.float32)

    def dequantize(self) -> Tensor:
        """The weight's values in float32, computed in the order in which the format's own library computes them."""
        units = self.units()
        if self.zero_points is not None:
            units = units - self._spread(self.zero_points.float())
        if self.global_scale is not None and self.applied == "last":
            return units * self._spread(self.scales.float()) * self.global_scale.float().reshape(())
        return units * self._spread(self.effective_scales)

    def _spread(self, per_block: Tensor) -> Tensor:
        """Give each element the value of its block."""
        rows, columns = self.codes.shape
        if self.groups is not None:
            return per_block[:, self.groups.long()]
        tile = self.quantizer.granularity
        high, wide = tile if isinstance(tile, tuple) else (1, tile if isinstance(tile, int) else columns)
        if per_block.shape[0] > 1:
            per_block = per_block.repeat_interleave(high, 0)[:rows]
        if per_block.shape[1] > 1:
            per_block = per_block.repeat_interleave(wide, 1)[:, :columns]
        return per_block
