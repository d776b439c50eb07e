"""Round the weights in a safetensors file, one tensor at a time.

The safetensors library writes a file from memory that holds all of it. Here the output has the input's header, so the
place of each tensor is known beforehand. One tensor at a time is read, rounded and written. A tensor whose rows do not
depend on each other is rounded a few rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from qsim_core.errors import QsimError, RecipeError, did_you_mean, file_did_you_mean
from qsim_core.files import place, writing
from qsim_core.formats.quantizer import Quantizer
from qsim_core.formats.random_bits import at
from qsim_core.matmuls.layout import LAST, taps
from qsim_core.simulation.recipe import matches
from qsim_core.snapshots import octets
from qsim_core.transforms.run import no_progress
from qsim_tensorfile.header import DTYPES, Entry, quantized, read_header

PART = 2**20
"""Elements that are rounded at a time."""


@dataclass(frozen=True)
class Rounded:
    """One tensor of the output; without a quantizer it was copied."""

    name: str
    shape: tuple[int, ...]
    quantizer: str | None
    sqnr_db: float | None = None
    bits: float | None = None
    decodes: str | None = None
    """The dtype of the codes that it is the scale or the zero point of; None: of none."""


def quantize_file(
    source: Path,
    target: Path,
    quantizer: Quantizer,
    skip: tuple[str, ...] = (),
    conv1d: tuple[str, ...] = (),
    track: Callable[[Iterable[Any], int, str], Iterable[Any]] = no_progress,
) -> list[Rounded]:
    """Round the weights of `source` into `target`, which appears whole or not at all.

    Float tensors of two axes and more are weights, unless a pattern of `skip` matches. Other tensors are copied byte by
    byte, and so are the scales of weights that are stored quantized. Raises `QsimError` for a file that cannot be read
    or has no weights to round. NaN or Inf in a weight, before or after it is rounded, is a `QsimError` too. Raises
    `RecipeError` for a pattern that matches no tensor.
    """
    if target.suffix != ".safetensors" and not target.is_dir():
        raise QsimError(f"the output is a safetensors file; give {target} a name that ends in .safetensors")
    if not place(source).is_file() and source.exists():
        raise QsimError(f"cannot read {source}: it is not a regular file")
    if place(source).resolve() == place(target).resolve():
        raise QsimError(f"{target} is the input; give the output another name")
    try:
        file = source.open("rb")
    except OSError as error:
        raise QsimError(f"cannot read {source}: {error.strerror}{file_did_you_mean(source)}") from None
    with file:
        header, entries = read_header(file, source)
        names = [entry.name for entry in entries]
        for pattern in (*skip, *conv1d):
            if not any(matches(pattern, [name]) for name in names):
                raise RecipeError(f"pattern {pattern!r} matches no tensor{did_you_mean(pattern, names)}")
        decoding = quantized(entries)
        weights = (entry.name for entry in entries if entry.is_weight and entry.name not in decoding)
        chosen = {name for name in weights if not any(matches(p, [name]) for p in skip)}
        if not chosen and decoding:
            raise QsimError(
                f"the weights in {source} are quantized already, as {next(iter(decoding.values()))} with scales; "
                f"round the checkpoint that they were made from"
            )
        if not chosen:
            raise QsimError(f"{source} holds no weight to round: no float tensor of two axes that is not skipped")
        with writing(target) as out:
            out.write(header)
            done = _rounded(file, out, len(header), track(entries, len(entries), "rounding"), quantizer, chosen, conv1d)
            return [replace(tensor, decodes=decoding.get(tensor.name)) for tensor in done]


def _rounded(
    file: BinaryIO,
    out: BinaryIO,
    start: int,
    entries: Iterable[Entry],
    quantizer: Quantizer,
    chosen: set[str],
    conv1d: tuple[str, ...],
) -> Iterator[Rounded]:
    for entry in entries:
        file.seek(start + entry.begin)
        data = bytearray(entry.end - entry.begin)
        file.readinto(data)  # type: ignore[attr-defined]
        if entry.name not in chosen:
            out.write(data)
            yield Rounded(entry.name, entry.shape, None)
            continue
        tensor = torch.frombuffer(data, dtype=DTYPES[entry.dtype]).view(entry.shape)
        if not _finite(tensor):
            raise QsimError(f"{entry.name} holds NaN or Inf; it cannot be rounded")
        kernel = len(entry.shape) > 3 or (len(entry.shape) == 3 and any(matches(p, [entry.name]) for p in conv1d))
        layout = taps(tensor) if kernel else LAST
        rows = layout.rows(tensor)
        rounded = layout.back(_in_parts(quantizer, rows)).contiguous()
        if not _finite(rounded):
            raise QsimError(f"{entry.name} overflows in {quantizer}; a scale keeps it in range, as in channel(F)")
        out.write(octets(rounded))
        bits = quantizer.bits_per_element(rows.shape)
        yield Rounded(entry.name, entry.shape, str(quantizer), _sqnr(tensor, rounded), bits)


def _in_parts(quantizer: Quantizer, rows: Tensor) -> Tensor:
    """`quantizer.quantize(rows)`, bit for bit, a few rows at a time if it rounds them one by one."""
    if not quantizer.by_rows:
        return quantizer.quantize(rows)
    flat = rows.flatten(0, -2)
    rounded = torch.empty_like(flat)
    count = max(1, PART // flat.shape[-1])
    for start in range(0, len(flat), count):
        part = flat[start : start + count]
        with at(start=start, rows=len(part)):
            rounded[start : start + count] = quantizer.quantize(part)
    return rounded.view(rows.shape)


def _finite(x: Tensor) -> bool:
    return all(bool(end.isfinite()) for end in x.aminmax())  # NaN is either end, if there is one


def _sqnr(before: Tensor, after: Tensor) -> float | None:
    """10 log10 of signal over error power; None where there is no error. Summed row by row, to hold no wide copy."""
    signal = error = 0.0
    for x, y in zip(before, after, strict=True):
        signal += float(x.double().square().sum())
        error += float((x.double() - y.double()).square().sum())
    return 10 * math.log10(signal / error) if error and signal else None
