"""The record of one evaluation: what was run, on what, and what came out."""

from __future__ import annotations

import os
import platform
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qsim_core.audit import Audit
from qsim_core.component import explain
from qsim_core.errors import QsimError

SCHEMA_VERSION = 1


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")


class PluginRecord(_Record):
    distribution: str
    version: str


class DataRecord(_Record):
    name: str
    sha256: str
    source: str | None = Field(None, description="the --data it was read from; none: the data that go with the model")


class Environment(_Record):
    """What the numbers were computed on."""

    python: str
    platform: str
    versions: dict[str, str] = Field(description="of the libraries that take part in the arithmetic")
    device: str
    dtype: str
    threads: int

    @classmethod
    def here(cls, device: str, dtype: str) -> Environment:
        """This process."""
        return cls(
            python=platform.python_version(),
            platform=platform.platform(),
            versions={name: v for name in ("qsim-core", "torch", "transformers") if (v := _version(name))},
            device=device,
            dtype=dtype,
            threads=torch.get_num_threads(),
        )


class Result(_Record):
    """One evaluation. `qsim evaluate --from FILE` runs it again from this record."""

    schema_version: int = SCHEMA_VERSION
    model: str
    adapter: str
    recipe: dict[str, Any] = Field(description="weights, activations, outputs, transforms, skip, overrides as text")
    evaluator: str
    protocol: str = Field(description="what exactly was measured, in words")
    metric: str = Field(description="the metric to look at first")
    baseline: dict[str, float] = Field(description="the model as it is, metric by metric")
    simulated: dict[str, float] = Field(description="the model under the recipe")
    audit: Audit
    plugins: dict[str, PluginRecord] = Field(description="every plugin that had a part in it")
    environment: Environment
    data: DataRecord
    batch_size: int
    limit: int | None
    seed: int
    seconds: dict[str, float] = Field(description="baseline, simulated, total")

    @property
    def ratio(self) -> float:
        """Simulated over baseline, of the first metric."""
        return self.simulated[self.metric] / self.baseline[self.metric]

    def write(self, path: Path) -> None:
        """Write JSON to a file, whole or not at all. Raises `QsimError`."""
        write_whole(path, self.model_dump_json(indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> Result:
        """Read a record back. Raises `QsimError` if the file is none."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise QsimError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'it is not text'}") from None
        try:
            result = cls.model_validate_json(text)
        except ValidationError as error:
            raise QsimError(f"{path} is no qsim result: {explain(error)}") from None
        if result.schema_version != SCHEMA_VERSION:
            raise QsimError(f"{path} has schema {result.schema_version}; this qsim reads schema {SCHEMA_VERSION}")
        return result


def write_whole(path: Path, text: str) -> None:
    """Write a text file atomically: beside it first, then renamed into its place."""
    part = None
    try:
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
            part = Path(file.name)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.chmod(0o666 & ~_umask())
        part.replace(path)
    except OSError as error:
        if part is not None:
            part.unlink(missing_ok=True)
        raise QsimError(f"cannot write {path}: {error.strerror or error}") from None


def check_writable(path: Path) -> None:
    """Raise `QsimError` before hours of work if their result could not be written to `path`."""
    if path.is_dir():
        raise QsimError(f"cannot write {path}: it is a directory; give a file's name")
    if path.exists() and not path.is_file():
        raise QsimError(f"cannot write {path}: it is no regular file; `--json -` writes to standard output")
    if not path.parent.is_dir():
        raise QsimError(f"cannot write {path}: there is no directory {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise QsimError(f"cannot write {path}: {path.parent} is not writable")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
