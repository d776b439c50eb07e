"""GGUF files of llama.cpp. Q4_0, Q8_0, MXFP4 and NVFP4 are read exactly; of other types the values alone, by `gguf`.

A block is scale and codes in a row of bytes. The low four bits of its bytes hold the first half of its elements, and
the high ones the second. NVFP4 has four scales in front of 64 elements, and a global scale in a tensor beside it, by
which llama.cpp multiplies last.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from qsim_core.components.host import Host
from qsim_core.errors import ModelError, one_line
from qsim_interop.reading.formats.bit_fields import twos_complement
from qsim_interop.reading.packed_weight import Layer, PackedWeight, Part
from qsim_interop.reading.reader import Reader
from qsim_interop.reading.tensors import FLOATS, Stored, Tensors

EXACT = {
    "Q4_0": "block(int(4, narrow=false), 32, scale=fp16)",
    "Q8_0": "block(int8, 32, scale=fp16)",
    "MXFP4": "mxfp4",
    "NVFP4": "nvfp4",
}
"""The types that are read exactly, and the quantizers that they stand for."""
PLAIN = (*FLOATS, "I8", "I16", "I32", "I64")
"""The types of tensors that are not packed."""


class GGUFTensors(Tensors):
    """The tensors of a GGUF file; a packed one is read as bytes [rows, bytes of a row]."""

    def __init__(self, file: Path) -> None:
        """Read the headers. Raises `ModelError`."""
        try:
            import gguf
        except ImportError:
            raise ModelError("a GGUF file is read with the library gguf; pip install gguf") from None
        try:
            read = gguf.GGUFReader(file)
            self._found = {tensor.name: tensor for tensor in read.tensors}
            self._fields = read.fields
        except OSError as error:
            raise ModelError(f"cannot read {file}: {error.strerror or error}") from None
        except Exception as error:  # the library checks little: it may fail anywhere in a damaged file
            raise ModelError(f"{file} is not a GGUF file, or is corrupt: {one_line(error)}") from None
        super().__init__(
            {
                name: Stored(
                    tensor.tensor_type.name, tuple(map(int, tensor.shape[::-1])), file, int(tensor.n_bytes) * 8
                )
                for name, tensor in self._found.items()
            }
        )

    def read(self, name: str) -> Tensor:
        """The values of a plain tensor, or the bytes of a packed one. Raises `ModelError`."""
        if name not in self:
            raise ModelError(f"there is no tensor {name}")
        return torch.from_numpy(self._found[name].data.copy())

    def said(self, key: str) -> Any:
        """The value of a key of the file's header; None: it is not there."""
        return self._fields[key].contents() if key in self._fields else None

    def dequantized(self, name: str) -> Tensor:
        """The values of any tensor in float32, as `gguf` computes them. Raises `ModelError`."""
        import gguf

        found = self._found[name]
        try:
            return torch.from_numpy(gguf.quants.dequantize(found.data, found.tensor_type).copy())
        except NotImplementedError:
            raise ModelError(f"{name} is of type {found.tensor_type.name}, which gguf does not dequantize") from None


class GGUF(Reader):
    """A GGUF file; the names of its layers are llama.cpp's."""

    method: ClassVar[str] = "gguf"
    wrong_scales: ClassVar[tuple[str, ...]] = ("not finite",)

    def __init__(self, path: Path, host: Host) -> None:
        self.file = GGUFTensors(path)
        super().__init__(path, self.file, {}, host)

    @property
    def kind(self) -> str:
        """The kind, with the types of the packed tensors."""
        types = ", ".join(sorted({layer.form for layer in self.layers}))
        return f"{self.method} ({types})" if types else self.method

    @property
    def notes(self) -> list[str]:
        return ["the names are llama.cpp's, not those of a model of transformers", *self.values_alone]

    @property
    def values_alone(self) -> list[str]:
        """A line that names the types of which only the values are read; empty: there are none."""
        other = ", ".join(sorted({layer.form for layer in self.layers if layer.weights is None}))
        return [f"{other}: qsim has no such quantizer; the values are those that gguf dequantizes"] if other else []

    def targets(self, module: str) -> bool:
        return module in self.packed

    @property
    def left(self) -> list[str]:
        """None: a file does not say which of its tensors should have been packed."""
        return []

    @property
    def unasked(self) -> list[str]:
        """None: a file does not say which of its tensors should have stayed plain."""
        return []

    def _layers(self) -> Iterator[Layer]:
        for name, stored in self.tensors.items():
            if stored.dtype in PLAIN or len(stored.shape) not in (2, 3):
                continue
            module = name.removesuffix(".weight")
            shape = (math.prod(stored.shape[:-1]), stored.shape[-1])  # the rows of all experts
            parts = {"codes": Part(name, stored.shape)}
            if f"{module}.scale" in self.tensors:
                parts["global_scale"] = Part(f"{module}.scale", self.tensors[f"{module}.scale"].shape)
            weights = self.scheme(EXACT[stored.dtype]) if stored.dtype in EXACT else None
            yield Layer(module, shape, weights, parts=parts, form=stored.dtype)

    def scales(self, layer: Layer) -> dict[str, Tensor]:
        if layer.weights is None:
            return {"values": self.dequantize(layer)}
        packed = self.read(layer)
        return {"scales": packed.scales} | ({"scale": packed.global_scale} if packed.global_scale is not None else {})

    def dequantize(self, layer: Layer) -> Tensor:
        if layer.weights is not None:
            return super().dequantize(layer)
        return self.file.dequantized(layer.parts["codes"].name).reshape(layer.shape)

    def _read(self, layer: Layer) -> PackedWeight:
        scheme, octets, shape = layer.scheme, self.tensors.read(layer.parts["codes"].name), layer.shape
        packed: Any = {"Q4_0": _q4_0, "Q8_0": _q8_0, "MXFP4": _mxfp4, "NVFP4": _nvfp4}[layer.form]
        codes, scales = packed(octets.reshape(shape[0], -1))
        wide = self.part(layer, "global_scale")
        return PackedWeight(scheme, codes.reshape(shape), scales.reshape(shape[0], -1), None, wide, "last")


def _q4_0(octets: Tensor) -> tuple[Tensor, Tensor]:
    scale, codes = _blocks(octets, 18, 2)
    return twos_complement(_halves(codes), 4), scale.view(torch.float16)


def _q8_0(octets: Tensor) -> tuple[Tensor, Tensor]:
    scale, codes = _blocks(octets, 34, 2)
    return codes, scale.view(torch.float16)


def _mxfp4(octets: Tensor) -> tuple[Tensor, Tensor]:
    scale, codes = _blocks(octets, 17, 1)
    return _halves(codes), scale.view(torch.float8_e8m0fnu)


def _nvfp4(octets: Tensor) -> tuple[Tensor, Tensor]:
    scale, codes = _blocks(octets, 36, 4)
    return _halves(codes.unflatten(-1, (4, 8))), scale.view(torch.float8_e4m3fn)


def _blocks(octets: Tensor, size: int, of_scale: int) -> tuple[Tensor, Tensor]:
    """The bytes of the scales and of the codes of each block: [rows, blocks, bytes]."""
    blocks = octets.unflatten(-1, (-1, size))
    return blocks[..., :of_scale].contiguous(), blocks[..., of_scale:].contiguous()


def _halves(codes: Tensor) -> Tensor:
    """Codes of four bits: the low ones of all bytes, then the high ones."""
    return torch.cat((codes & 0xF, codes >> 4), dim=-1)
