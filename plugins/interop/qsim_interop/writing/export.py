"""Write a simulated model in a format: whole, or not at all."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from qsim_core.errors import ModelError, RecipeError, did_you_mean, one_line
from qsim_core.evaluation.adapter import LoadedModel
from qsim_core.simulation.simulation import Simulation
from qsim_interop.writing.source import Source
from qsim_interop.writing.target import Target


def formats() -> dict[str, Target]:
    """The formats by name."""
    from qsim_interop.writing.compressed_tensors import CompressedTensors
    from qsim_interop.writing.gguf_file import GGUF
    from qsim_interop.writing.onnx_model import ONNX
    from qsim_interop.writing.torchao_model import TorchAO

    return {target.name: target for target in (CompressedTensors(), GGUF(), ONNX(), TorchAO())}


def format_of(name: str) -> Target:
    """The format of a name, with its library installed. Raises `RecipeError`."""
    known = formats()
    if name not in known:
        raise RecipeError(f"no format {name!r}{did_you_mean(name, known)}")
    known[name].need_library()
    return known[name]


def check_empty(directory: Path) -> None:
    """Raise `ModelError` unless the directory is empty, or can be made."""
    nearest = next(place for place in (directory, *directory.absolute().parents) if place.exists())
    if not nearest.is_dir():
        raise ModelError(f"{nearest} is not a directory")
    if directory.exists() and any(directory.iterdir()):
        raise ModelError(f"{directory} is not empty; name another --output")


def export(simulation: Simulation, loaded: LoadedModel, to: str, directory: str | Path) -> list[str]:
    """Write a simulated model into a directory, with its codes and scales as they are; give notes on its readers.

    `loaded` is the model that is simulated, with its tokenizer. Raises `RecipeError` for what the format does not hold
    exactly, and `ModelError` for a directory that is not empty.
    """
    from safetensors import SafetensorError

    target, directory = format_of(to), Path(directory).resolve()  # a link stays, and leads to the files
    check_empty(directory)
    source = Source.of(loaded, simulation, target.kinds)
    notes = target.check(source)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as inside:
            made = Path(inside) / directory.name
            made.mkdir()
            target.write(source, made)
            if directory.exists():
                directory.rmdir()
            shutil.move(made, directory)
    except OSError as error:
        raise ModelError(f"cannot write {directory}: {error.strerror or one_line(error)}") from None
    except SafetensorError as error:  # the library wraps what the system says, like "No space left on device"
        raise ModelError(f"cannot write {directory}: {one_line(error)}") from None
    return notes
