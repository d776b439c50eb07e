"""Checkpoints of AWQ in the layout `gemm`: a word holds the codes of eight outputs, in an order of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from qsim_core.errors import ModelError
from qsim_interop.reading.formats.bit_fields import from_words, twos_complement
from qsim_interop.reading.formats.gptq import integers
from qsim_interop.reading.packed_weight import Layer, PackedWeight, Part
from qsim_interop.reading.reader import USUALLY_LEFT, Reader, is_inside

ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""The place in a word, from the low bits on, of each of its eight outputs."""


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

    def _layers(self) -> Iterator[Layer]:
        bits = self.config.get("bits", self.config.get("w_bit", 4))
        if self._layout != "gemm" or bits != 4:
            has = f"{bits} bits in the layout {self._layout!r}"
            raise ModelError(f"{self.path} has {has}; of awq, gemm of 4 bits is read")
        for name in self.tensors:
            module, _, last = name.rpartition(".")
            if last == "qweight":
                yield self._layer(module)

    def _layer(self, module: str) -> Layer:
        columns, words = self.tensors[f"{module}.qweight"].shape
        rows, size = words * 8, int(self.config.get("group_size", self.config.get("q_group_size", 128)))
        groups = 1 if size < 0 else math.ceil(columns / size)
        parts = {
            "codes": Part(f"{module}.qweight", (columns, words)),
            "scales": Part(f"{module}.scales", (groups, rows)),
        }
        asymmetric = bool(self.config.get("zero_point", True))
        if asymmetric:
            parts["zero_points"] = Part(f"{module}.qzeros", (groups, words))
        scale = self.tensors.get(f"{module}.scales")
        text = integers(4, size, not asymmetric, "" if scale is None else scale.dtype)
        return Layer(module, (rows, columns), self.scheme(text), parts=parts)

    def _read(self, layer: Layer) -> PackedWeight:
        words, scales, zeros = (self.part(layer, role) for role in ("codes", "scales", "zero_points"))
        assert words is not None and scales is not None
        zero = None if zeros is None else _unpacked(zeros).T.to(torch.int16) - 8
        return PackedWeight(layer.scheme, twos_complement(_unpacked(words).T, 4), scales.T, zero)


def _unpacked(words: Tensor) -> Tensor:
    """The codes of all outputs in their order, uint8 [rows, 8 * columns]."""
    codes = from_words(words, 4, 8 * words.shape[1]).unflatten(-1, (-1, 8))
    ordered: Tensor = codes[..., list(ORDER)].flatten(-2)
    return ordered
