"""The tensors of a checkpoint by name. Headers tell shapes and dtypes; values are read one by one."""

from __future__ import annotations

import contextlib
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qsim_core.errors import ModelError, one_line
from qsim_core.evaluation.configuration import read_configuration

FLOATS = ("F64", "F32", "F16", "BF16")
"""The dtypes of weights that are not packed."""
SCALE_FORMATS = {"F32": "", "BF16": "bf16", "F16": "fp16", "U8": "e8m0", "F8_E8M0": "e8m0", "F8_E4M3": "e4m3"}
"""The dtypes of stored scales, and the formats that they stand for; float32 is not rounded."""


@dataclass(frozen=True)
class Stored:
    """The header of one tensor: its dtype as safetensors writes it, its shape and its file."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    bits: int
    """The bits that its values take."""


class Tensors(Mapping[str, Stored], ABC):
    """The headers of a checkpoint's tensors by name, and a way to read the values of one."""

    def __init__(self, headers: Mapping[str, Stored]) -> None:
        self._headers = headers
        self.lost: dict[str, list[str]] = {}
        """Each missing file -> the names of the tensors that should be in it."""
        self.metadata: dict[str, str] = {}
        """The texts that the headers of the files hold beside the tensors."""

    def __getitem__(self, name: str) -> Stored:
        return self._headers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._headers)

    def __len__(self) -> int:
        return len(self._headers)

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """The values of a tensor. Raises `ModelError`."""


class Safetensors(Tensors):
    """The tensors in a directory of safetensors files."""

    def __init__(self, directory: Path) -> None:
        """Read the headers. Raises `ModelError` for a file that is not safetensors, and where there is none."""
        from safetensors import safe_open

        self.directory = directory
        files, lost = self._files()
        headers: dict[str, Stored] = {}
        metadata: dict[str, str] = {}
        for file in files:
            with _reading(file), safe_open(file, framework="pt") as tensors:
                metadata.update(tensors.metadata() or {})
                for name in tensors.keys():  # noqa: SIM118 - it is not a mapping
                    part = tensors.get_slice(name)
                    dtype, shape = part.get_dtype(), tuple(part.get_shape())
                    headers[name] = Stored(dtype, shape, file, _width(dtype) * math.prod(shape))
        super().__init__(headers)
        self.lost, self.metadata = lost, metadata

    def read(self, name: str) -> Tensor:
        """The values of a tensor. Raises `ModelError`."""
        from safetensors import safe_open

        if name not in self:
            raise ModelError(f"{self.directory} lacks {name}")
        file = self[name].file
        with _reading(file), safe_open(file, framework="pt") as tensors:
            found: Tensor = tensors.get_tensor(name)
            return found

    def _files(self) -> tuple[list[Path], dict[str, list[str]]]:
        """The files that the index names, or every safetensors file; and the shards that are missing."""
        index = self.directory / "model.safetensors.index.json"
        if not index.is_file():
            files = sorted(self.directory.glob("*.safetensors"))
            pickles = [path for pattern in ("*.bin", "*.pt", "*.pth") for path in sorted(self.directory.glob(pattern))]
            if pickles and not files:
                raise ModelError(
                    f"{self.directory} holds {pickles[0].name}, a pickle, which could run code; load it where you "
                    f"trust it, and save it as safetensors"
                )
            if not files:
                raise ModelError(f"{self.directory} has no weights: expected safetensors files")
            return files, {}
        shards: dict[str, list[str]] = {}
        placed: Any = read_configuration(index).get("weight_map")
        for name, shard in placed.items() if isinstance(placed, dict) else ():
            if not isinstance(shard, str) or Path(shard).name != shard:
                raise ModelError(f"{index} names {shard!r}, which is not a file beside it")
            shards.setdefault(shard, []).append(name)
        lost = {shard: names for shard, names in shards.items() if not (self.directory / shard).is_file()}
        return [self.directory / shard for shard in shards if shard not in lost], lost


def _width(dtype: str) -> int:
    """The bits of an element, which the name of its dtype says."""
    width = re.search(r"\d+", dtype)
    return int(width[0]) if width else 8


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turn the errors of the library into `ModelError`."""
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        raise ModelError(f"cannot read {file}: {error.strerror or error}") from None
    except SafetensorError as error:
        raise ModelError(f"{file} is not a safetensors file, or is corrupt: {one_line(error)}") from None
