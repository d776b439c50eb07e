"""Pickles of torchao, which transformers wrote before safetensors files could hold its tensors.

torch reads them with `weights_only`: nothing in them is run but the classes of tensors that torch and torchao allow.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qsim_core.errors import ModelError
from qsim_interop.reading.tensors import Stored, Tensors

DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
}
"""The names of dtypes in the headers of safetensors files."""


def pickles(directory: Path) -> list[Path]:
    """The pickles of a directory without safetensors files."""
    return [] if any(directory.glob("*.safetensors")) else sorted(directory.glob("*.bin"))


class Pickles(Tensors):
    """The tensors in a directory of pickles, taken apart as torchao does it for safetensors files."""

    def __init__(self, directory: Path) -> None:
        """Read all tensors. Raises `ModelError` for a pickle that holds anything else."""
        try:
            from torchao.prototype import mx_formats  # noqa: F401 - it tells torch its classes
            from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
        except ImportError:
            raise ModelError(f"{directory} holds pickles of torchao; pip install torchao") from None
        headers: dict[str, Stored] = {}
        metadata: dict[str, str] = {}
        self._values: dict[str, Tensor] = {}
        for file in pickles(directory):
            try:
                state: Any = torch.load(file, map_location="cpu", weights_only=True)
                flat, said = flatten_tensor_state_dict(state)
            except (pickle.UnpicklingError, AttributeError, OSError, RuntimeError, TypeError, ValueError):
                raise ModelError(  # torch's own message asks the reader to run what is in it
                    f"{file} is corrupt, or a pickle with more than tensors of torch and torchao, which could run "
                    f"code; load it where you trust it, and save it as safetensors"
                ) from None
            metadata |= said
            self._values |= flat
            for name, tensor in flat.items():
                bits = tensor.numel() * tensor.element_size() * 8
                headers[name] = Stored(DTYPES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape), file, bits)
        super().__init__(headers)
        self.metadata = metadata

    def read(self, name: str) -> Tensor:
        """The values of a tensor. Raises `ModelError`."""
        if name not in self:
            raise ModelError(f"the checkpoint lacks {name}")
        return self._values[name]
