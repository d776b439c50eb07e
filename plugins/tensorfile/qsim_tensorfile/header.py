"""The header of a safetensors file: its tensors' names, dtypes, shapes and places."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from qsim_core.errors import QsimError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The dtypes of weights, as a header writes them."""


CODES = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "I8", "U8", "I32")
"""The dtypes in which checkpoints hold the codes of quantized weights."""
BESIDE_CODES = re.compile(r"scale|zero|absmax|quant")
"""Found in the names of what is kept beside codes to decode them."""


@dataclass(frozen=True)
class Entry:
    """One tensor in a file's header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def is_weight(self) -> bool:
        return self.dtype in DTYPES and len(self.shape) > 1 and math.prod(self.shape) > 0

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]


def quantized(entries: Iterable[Entry]) -> dict[str, str]:
    """Find weights that are stored as codes: the name of each tensor that decodes them -> the codes' dtype."""
    codes = {entry.module: entry.dtype for entry in entries if entry.dtype in CODES and len(entry.shape) > 1}
    return {
        entry.name: codes[entry.module]
        for entry in entries
        if entry.module in codes and entry.dtype in DTYPES and BESIDE_CODES.search(entry.name.rpartition(".")[2])
    }


def read_header(file: BinaryIO, path: Path) -> tuple[bytes, list[Entry]]:
    """The header's bytes, which begin with its length, and its tensors in the order of their data.

    Raises `QsimError` for a file that cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):  # the library's own checks: lengths, overlaps, dtypes
            pass
    except OSError as error:
        raise QsimError(f"cannot read {path}: {error.strerror or error}") from None
    except SafetensorError as error:
        raise QsimError(f"{path} is not a safetensors file, or is corrupt: {' '.join(str(error).split())}") from None
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    header = file.read(length)
    described: dict[str, Any] = json.loads(header)
    described.pop("__metadata__", None)
    entries = [Entry(n, d["dtype"], tuple(d["shape"]), *d["data_offsets"]) for n, d in described.items()]
    return prefix + header, sorted(entries, key=lambda entry: entry.begin)
