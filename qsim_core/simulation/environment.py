"""The machine and the libraries that numbers are computed with."""

from __future__ import annotations

import platform
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn


class Environment(BaseModel):
    """The machine and the libraries that the numbers of a result were computed with."""

    model_config = ConfigDict(extra="forbid")

    python: str
    platform: str
    versions: dict[str, str] = Field(description="of the libraries that take part in the arithmetic")
    device: str
    dtype: str
    threads: int

    @classmethod
    def here(cls, device: str, dtype: str, model: nn.Module, *others: object) -> Environment:
        """This process; the libraries are qsim, torch and those that define modules of the model, or `others`."""
        defining = {type(part).__module__.partition(".")[0] for part in (*model.modules(), *others)}
        libraries = ("qsim-core", "torch", *sorted(defining - {"torch", "qsim_core"}))
        return cls(
            python=platform.python_version(),
            platform=platform.platform(),
            versions={name: found for name in libraries if (found := version_of(name))},
            device=device,
            dtype=dtype,
            threads=torch.get_num_threads(),
        )


@lru_cache
def version_of(distribution: str) -> str | None:
    """The installed version of a distribution; None where it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
