"""Codebooks: `codebook([-1, 0, 1])`, `codebook(file="levels.txt")`, and `nf4`."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from qsim_core import Format, Preset, hookimpl
from qsim_core.errors import QsimError
from qsim_core.files import place, read_text

MOST_VALUES = 2**16
LARGEST = 2**24
"""Bytes of the largest file."""
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The values of QLoRA's 4-bit NormalFloat, from arXiv 2305.14314, appendix E."""


class Codebook(Format):
    """Any list of values. Rounding is to the nearest value, and a tie goes to the even code.

    The code of a value is its place in ascending order. Values are stored in float32. NaN stays NaN, although it has no
    code; ±Inf saturates. A scale maps the largest magnitude of its block to `full_scale`, by default the largest value.
    A file is read once, when the format is built. It holds a JSON list, or numbers separated by blanks, commas or line
    ends; `#` begins a comment. The text form contains the values themselves, so a record of a run does not depend on
    the file.
    """

    name = "codebook"
    values: tuple[float, ...] = Field((), description="the representable values, in any order")
    file: str | None = Field(None, description="a file to read the values from instead")
    full_scale: float | None = Field(
        None, gt=0, description="the value to which a scale maps the largest magnitude; none: the largest value"
    )

    @model_validator(mode="before")
    @classmethod
    def _from_file(cls, options: Any) -> Any:
        if not isinstance(options, dict) or not isinstance(options.get("file"), str | Path):
            return options
        if options.get("values"):
            raise ValueError("give values or a file, not both")
        return {**options, "values": _read(place(options["file"])), "file": None}

    @field_validator("values")
    @classmethod
    def _in_order(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if len(values) < 2:
            raise ValueError("give at least two values, as in codebook([-1, 0, 1]), or a file that holds them")
        if len(values) > MOST_VALUES:
            raise ValueError(f"at most {MOST_VALUES} values, not {len(values)}")
        for value in values:
            if not math.isfinite(value):
                raise ValueError(f"{value} is not a finite number; a codebook holds finite numbers only")
        ordered = sorted(values)
        single = torch.tensor(ordered, dtype=torch.float32)
        if not single.isfinite().all():
            raise ValueError("a value is beyond float32's range")
        if (twice := (single[1:] == single[:-1]).nonzero()).numel():
            first = int(twice[0])
            raise ValueError(f"{ordered[first]} and {ordered[first + 1]} are the same value in float32; remove one")
        return tuple(ordered)

    @property
    def reach(self) -> float:
        return self.max if self.full_scale is None else self.full_scale

    def table(self) -> Tensor:
        return torch.tensor(self.values, dtype=torch.float32).double()


def _read(path: Path) -> list[float]:
    if path.exists() and (not path.is_file() or path.stat().st_size > LARGEST):
        raise ValueError(f"cannot read {path}: a codebook is a file of at most {LARGEST >> 20} MiB")
    try:
        text = read_text(path)
    except QsimError as error:
        raise ValueError(str(error)) from None
    if text.lstrip().startswith("["):
        try:
            return [float(value) for value in json.loads(text)]
        except (ValueError, TypeError):
            raise ValueError(f"{path} is not a JSON list of numbers") from None
    values = []
    for number, line in enumerate(text.splitlines(), start=1):
        for word in re.split(r"[,\s]+", line.partition("#")[0].strip()):
            try:
                values += [float(word)] if word else []
            except ValueError:
                raise ValueError(f"{path}, line {number}: {word!r} is not a number") from None
    return values


@hookimpl
def qsim_quantizers() -> list[type[Format] | Preset]:
    return [Codebook, Preset("nf4", f"codebook({list(NF4)})", "4-bit NormalFloat: quantiles of a normal distribution")]
