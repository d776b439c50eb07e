"""Checkpoints of GPTQ: codes are packed along K, and a zero point is stored less one in the format's first version.

`g_idx` gives the group of each input. With act-order the groups do not lie side by side.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from qsim_core.errors import ModelError
from qsim_interop.reading.formats.bit_fields import from_words, twos_complement
from qsim_interop.reading.packed_weight import Layer, PackedWeight, Part
from qsim_interop.reading.reader import USUALLY_LEFT, Reader, is_inside
from qsim_interop.reading.tensors import SCALE_FORMATS

LAYOUTS = {"gptq": 1, "gptq_v2": 0}
"""The layouts that are read, and the number by which they store zero points too low."""


class GPTQ(Reader):
    """Integers of 2, 3, 4 or 8 bits in groups along K, of GPTQ and of what writes its format."""

    method: ClassVar[str] = "gptq"

    @property
    def kind(self) -> str:
        return f"{self.method} ({self._layout}{', act-order' if self.config.get('desc_act') else ''})"

    @property
    def _layout(self) -> str:
        if self.config.get("is_marlin_format"):
            return "marlin"
        return str(self.config.get("checkpoint_format") or self.config.get("format") or "gptq")

    def targets(self, module: str) -> bool:
        if (listed := self.config.get("modules_in_block_to_quantize")) is not None:
            together = ([names] if isinstance(names, str) else names for names in listed)
            return is_inside(module, itertools.chain.from_iterable(together))
        left = [pattern[2:] for pattern in self.config.get("dynamic") or () if pattern.startswith("-:")]
        if any(re.match(pattern, module) for pattern in left):
            return False
        return not USUALLY_LEFT.search(module) or (module == "lm_head" and bool(self.config.get("lm_head")))

    def _layers(self) -> Iterator[Layer]:
        if self._layout not in LAYOUTS:
            raise ModelError(
                f"{self.path} has the layout {self._layout!r}, whose words are ordered for one kernel; of gptq, "
                f"{' and '.join(LAYOUTS)} are read: take the checkpoint that it was made from"
            )
        for name in self.tensors:
            module, _, last = name.rpartition(".")
            if last == "qweight":
                yield self._layer(module)

    def _layer(self, module: str) -> Layer:
        bits, size = int(self.config.get("bits", 4)), int(self.config.get("group_size", 128))
        words, rows = self.tensors[f"{module}.qweight"].shape
        index = self.tensors.get(f"{module}.g_idx")
        columns = index.shape[0] if index is not None else words * 32 // bits
        groups = 1 if size < 0 else math.ceil(columns / size)
        scale = self.tensors.get(f"{module}.scales")
        parts = {
            "codes": Part(f"{module}.qweight", (math.ceil(columns * bits / 32), rows)),
            "scales": Part(f"{module}.scales", (groups, rows)),
            "zero_points": Part(f"{module}.qzeros", (groups, math.ceil(rows * bits / 32))),
        }
        if index is not None:
            parts["groups"] = Part(f"{module}.g_idx", (columns,))
        text = integers(bits, size, bool(self.config.get("sym", True)), "" if scale is None else scale.dtype)
        return Layer(module, (rows, columns), self.scheme(text), parts=parts)

    def _read(self, layer: Layer) -> PackedWeight:
        parts = (self.part(layer, role) for role in ("codes", "scales", "zero_points", "groups"))
        words, scales, zeros, groups = parts
        assert words is not None and scales is not None and zeros is not None
        (rows, columns), width = layer.shape, layer.scheme.element.width
        stored = from_words(zeros, width, rows).T.to(torch.int16)
        zero = (stored + LAYOUTS[self._layout]) % 2**width - 2 ** (width - 1)
        codes = twos_complement(from_words(words.T, width, columns), width)
        order = None if groups is None or torch.equal(groups, _in_order(layer)) else groups
        return PackedWeight(layer.scheme, codes, scales.T, zero if bool(zero.any()) else None, groups=order)


def integers(bits: int, size: int, symmetric: bool, dtype: str) -> str:
    """The quantizer of integer weights in groups, as text; a size below 0 is a group of the whole row."""
    element = f"int({bits}, narrow=false, convention=gptq)" if symmetric else f"int{bits}"
    more = "" if symmetric else ", symmetric=false"
    if form := SCALE_FORMATS.get(dtype, ""):
        more += f", scale={form}"
    return f"channel({element}{more})" if size < 0 else f"block({element}, {size}{more})"


def _in_order(layer: Layer) -> Tensor:
    """The groups of inputs that lie side by side."""
    size = layer.scheme.granularity
    columns = torch.arange(layer.shape[1], dtype=torch.int32)
    return columns // size if isinstance(size, int) else torch.zeros_like(columns)
