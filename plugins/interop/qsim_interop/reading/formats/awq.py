"""Checkpoints of AWQ: a word holds the codes of eight outputs in an order of its own, or of eight inputs.

The first is the layout `gemm`, [K, N]. The second is `gemv`, [N, K], whose scales are filled up to whole words.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from qsim_core.errors import ModelError
from qsim_interop.reading.formats.bit_fields import from_words, twos_complement
from qsim_interop.reading.formats.gptq import integers
from qsim_interop.reading.packed_weight import Layer, PackedWeight, Part, shape_of_scales
from qsim_interop.reading.reader import USUALLY_LEFT, Reader, is_inside

ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""The place in a word, from the low bits on, of each of its eight outputs."""
LAYOUTS = ("gemm", "gemv")
"""The layouts that are read."""


class AWQ(Reader):
    """Integers of 4 bits in groups along K, with zero points."""

    method: ClassVar[str] = "awq"

    @property
    def kind(self) -> str:
        return f"{self.method} ({self._layout})"

    @property
    def _layout(self) -> str:
        return str(self.config.get("version") or self.config.get("format") or "gemm").lower()

    def targets(self, module: str) -> bool:
        named = self.config.get("modules_to_not_convert") or ()
        return not (is_inside(module, named) or USUALLY_LEFT.search(module))

    @property
    def _group_size(self) -> Any:
        return self.config.get("group_size", self.config.get("q_group_size", 128))

    def _layers(self) -> Iterator[Layer]:
        bits = self.config.get("bits", self.config.get("w_bit", 4))
        if self._layout not in LAYOUTS or bits != 4:
            has = f"{bits} bits in the layout {self._layout!r}"
            raise ModelError(f"{self.path} has {has}; of awq, {' and '.join(LAYOUTS)} of 4 bits are read")
        for name in self.tensors:
            module, _, last = name.rpartition(".")
            if last == "qweight":
                yield self._layer(module)

    def _layer(self, module: str) -> Layer:
        stored, size = self.tensors[f"{module}.qweight"].shape, int(self._group_size)
        rows, columns = (stored[0], stored[1] * 8) if self._layout == "gemv" else (stored[1] * 8, stored[0])
        groups = 1 if size < 0 else math.ceil(columns / size)
        shape = (groups, rows)
        if self._layout == "gemv":
            shape = (rows, 8 * _words(groups, size))
        parts = {
            "codes": Part(f"{module}.qweight", (stored[0], stored[1])),
            "scales": Part(f"{module}.scales", shape),
        }
        asymmetric = bool(self.config.get("zero_point", True))
        if asymmetric:
            parts["zero_points"] = Part(f"{module}.qzeros", (shape[0], shape[1] // 8))
        scale = self.tensors.get(f"{module}.scales")
        text = integers(4, size, not asymmetric, "" if scale is None else scale.dtype)
        return Layer(module, (rows, columns), self.scheme(text), parts=parts)

    def scales(self, layer: Layer) -> dict[str, Tensor]:
        """The scales of a layer by their names, without what fills them up."""
        count = shape_of_scales(layer.scheme, layer.shape)[1]
        filled = self._layout == "gemv"
        return {name: scales[:, :count] if filled else scales for name, scales in super().scales(layer).items()}

    def _read(self, layer: Layer) -> PackedWeight:
        words, scales, zeros = (self.part(layer, role) for role in ("codes", "scales", "zero_points"))
        assert words is not None and scales is not None
        if self._layout == "gemv":
            groups = shape_of_scales(layer.scheme, layer.shape)[1]
            codes, scales = from_words(words, 4, layer.shape[1]), scales[:, :groups]
            zero = None if zeros is None else from_words(zeros, 4, groups)
        else:
            codes, scales = _unpacked(words).T, scales.T
            zero = None if zeros is None else _unpacked(zeros).T
        centred = None if zero is None else zero.to(torch.int16) - 8
        return PackedWeight(layer.scheme, twos_complement(codes, 4), scales, centred)


def _words(groups: int, size: int) -> int:
    """The words of the zero points of a row: of a group below 128 a multiple, as AutoAWQ's `gemv` fills them up."""
    multiple = 1 if size < 0 else max(1, 128 // size)
    return math.ceil(math.ceil(groups / 8) / multiple) * multiple


def _unpacked(words: Tensor) -> Tensor:
    """The codes of all outputs in their order, uint8 [rows, 8 * columns]."""
    codes = from_words(words, 4, 8 * words.shape[1]).unflatten(-1, (-1, 8))
    ordered: Tensor = codes[..., list(ORDER)].flatten(-2)
    return ordered
