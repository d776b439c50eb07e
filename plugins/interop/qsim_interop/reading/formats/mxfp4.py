"""MXFP4 checkpoints of gpt-oss: the experts of a layer in one stack of blocks of 32, and the rest plain.

`NAME_blocks` [E, rows, K / 32, 16] has two codes in a byte, the even one in the low four bits. `NAME_scales`
[E, rows, K / 32] has the powers of two. transformers' parameter NAME is the stack [E, K, rows].
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch

from qsim_core.errors import ModelError
from qsim_interop.reading.formats.bit_fields import from_nibbles
from qsim_interop.reading.packed_weight import Layer, PackedWeight, Part
from qsim_interop.reading.reader import Reader, is_inside

BLOCKS, SCALES = "_blocks", "_scales"
"""The endings of the names of stored tensors."""


class MXFP4(Reader):
    """Experts in MXFP4. A stack of them is one layer, whose rows are those of all experts."""

    method: ClassVar[str] = "mxfp4"

    def targets(self, module: str) -> bool:
        left = self.config.get("modules_to_not_convert") or ()
        return module in self.packed and not is_inside(module, left)

    def _layers(self) -> Iterator[Layer]:
        for name, stored in self.tensors.items():
            if name.endswith(BLOCKS) and stored.dtype == "U8":
                if len(stored.shape) != 4 or stored.shape[-1] != 16:
                    raise ModelError(
                        f"{self.path}: {name} has shape {list(stored.shape)}; [E, rows, blocks, 16] is read"
                    )
                experts, rows, blocks, _ = stored.shape
                parts = {
                    "codes": Part(name, stored.shape),
                    "scales": Part(name.removesuffix(BLOCKS) + SCALES, stored.shape[:-1]),
                }
                shape, module = (experts * rows, 32 * blocks), name.removesuffix(BLOCKS)
                yield Layer(module, shape, self.scheme("mxfp4"), parts=parts, experts=experts)

    def _read(self, layer: Layer) -> PackedWeight:
        codes, scales = self.part(layer, "codes"), self.part(layer, "scales")
        assert codes is not None and scales is not None
        octets = codes.reshape(layer.shape[0], -1)
        stored = scales.reshape(layer.shape[0], -1).view(torch.float8_e8m0fnu)
        return PackedWeight(layer.scheme, from_nibbles(octets), stored)
