"""From a path to the reader of the checkpoint that is there."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qsim_core.components.host import Host, installed
from qsim_core.errors import ModelError, did_you_mean, file_did_you_mean
from qsim_core.evaluation.configuration import read_configuration
from qsim_interop.reading.reader import Reader
from qsim_interop.reading.tensors import Safetensors, Tensors

READERS = {
    "awq": ("awq", "AWQ"),
    "compressed-tensors": ("compressed_tensors", "CompressedTensors"),
    "fp8": ("fp8", "FP8"),
    "gptq": ("gptq", "GPTQ"),
    "modelopt": ("modelopt", "ModelOpt"),
    "mxfp4": ("mxfp4", "MXFP4"),
    "torchao": ("torchao_tensors", "TorchAO"),
}
"""`quant_method` in a configuration -> the module and the class that read such checkpoints."""

BESIDE = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq"}
"""Files in which methods describe the quantization where config.json does not, and the methods."""


def open_checkpoint(path: Path | str, host: Host | None = None) -> Reader:
    """The reader of a quantized checkpoint, with the headers read. Raises `ModelError`."""
    path, host = Path(path), host or installed()
    if path.suffix == ".gguf" and path.is_file():
        from qsim_interop.reading.formats.gguf_file import GGUF

        return GGUF(path, host)
    if not path.is_dir():
        what = "is neither a directory of a quantized checkpoint nor a GGUF file" if path.exists() else "does not exist"
        raise ModelError(f"{path} {what}{file_did_you_mean(path)}")
    config = quantization_config(path)
    method = str(config.get("quant_method") or "a method without a name")
    if method not in READERS:
        raise ModelError(f"{path} is quantized by {method!r}, which is not read{did_you_mean(method, READERS)}")
    module, name = READERS[method]
    of: type[Reader] = getattr(importlib.import_module(f"qsim_interop.reading.formats.{module}"), name)
    reader = of(path, _tensors(path, method), config, host)
    reader.check_configuration()
    return reader


def _tensors(path: Path, method: str) -> Tensors:
    """The tensors of a directory. Raises `ModelError` for pickles, but for those of torchao."""
    if method == "torchao":
        from qsim_interop.reading.formats.torchao_pickles import Pickles, pickles

        if pickles(path):
            return Pickles(path)
    return Safetensors(path)


def quantization_config(directory: Path) -> Mapping[str, Any]:
    """The part of a checkpoint's configuration on its quantization. Raises `ModelError` if there is none."""
    path = directory / "config.json"
    if not path.is_file():
        raise ModelError(f"{directory} has no config.json; a checkpoint is a directory that save_pretrained wrote")
    whole = read_configuration(path)
    for part in (whole, *(part for part in whole.values() if isinstance(part, dict))):
        found = part.get("quantization_config") or part.get("compression_config")
        if isinstance(found, dict):
            return found
    for name, method in BESIDE.items():
        if (directory / name).is_file():
            said = read_configuration(directory / name)
            inner = said.get("quantization")
            return {"quant_method": method, **(inner if isinstance(inner, dict) else said)}
    raise ModelError(f"{directory} is not quantized: its config.json has no quantization_config")
