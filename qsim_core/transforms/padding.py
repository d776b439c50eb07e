"""Batches without their padding: calibration sees the positions that an attention mask keeps, and no others.

A padded batch becomes one batch for each text, cut to the positions that count. So the transforms and static scales
see each text as if it came by itself, at every site: in attention, in experts and where rows are not positions.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from qsim_core.transforms.forward import Example

MASK = "attention_mask"
HIDDEN = -1e3
"""A mask of numbers that are added to scores hides the positions below this number."""
PARTS = ("encoder_", "decoder_")
"""Beginnings of the names of arguments that a mask with the same beginning belongs to."""
PLAIN = (bool, int, float, str, type(None))


def unpadded(model: nn.Module, batches: Iterable[Example]) -> tuple[list[Example], list[str]]:
    """The batches without masked positions, and a line about each batch that could not be cut."""
    found: list[Example] = []
    notes = []
    for number, batch in enumerate(batches):
        try:
            found += _texts(model, batch)
        except _Whole as reason:
            found.append(batch)
            notes.append(f"calibration batch {number}: masked positions count, as {reason}")
    return found, notes


@contextlib.contextmanager
def masks_inside(model: nn.Module, batch: Example) -> Iterator[list[str]]:
    """Gives a list that holds, after a forward on the batch, a line about the first mask that the batch has not.

    A pipeline pads texts and makes their masks itself, so its batches cannot be cut.
    """
    notes: list[str] = []

    def look(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for name, kept in _masks({**_named(module, args), **kwargs}).items():
            if not notes and not kept.all():
                hidden = f"{1 - float(kept.float().mean()):.0%} of those in {path} on the example"
                notes.append(f"calibration: masked positions count, {hidden}: its {name} is made inside the model")

    inside = [] if _masks(_named(model, batch)) else list(model.named_modules())[1:]
    with contextlib.ExitStack() as hooks:
        for path, module in inside:
            hooks.enter_context(module.register_forward_pre_hook(functools.partial(look, path), with_kwargs=True))
        yield notes


class _Whole(Exception):
    """A batch cannot be cut; the message says why."""


def _texts(model: nn.Module, batch: Example) -> list[Example]:
    """Cut a batch into its texts; a batch without padding stays as it is. Raises `_Whole`."""
    named = _named(model, batch)
    masks = {name.removesuffix(MASK): kept for name, kept in _masks(named).items() if not kept.all()}
    if not masks:
        return [batch]
    many = len(next(iter(masks.values())))
    decodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    texts = []
    for row in range(many):
        kept = {prefix: rows[row].nonzero().flatten() for prefix, rows in masks.items()}
        if all(len(places) for places in kept.values()):
            cut = {}
            for name, value in named.items():
                full = f"decoder_{name}" if name == "labels" and decodes else name
                prefix = max((p for p in {"", *PARTS, *masks} if full.startswith(p)), key=len)
                length = masks[prefix].shape[1] if prefix in masks else None
                cut[name] = _row(name, value, row, many, length, kept.get(prefix))
            texts.append(cut if isinstance(batch, Mapping) else tuple(cut.values()))
    return texts


def _named(model: nn.Module, batch: Example) -> dict[str, Any]:
    """The arguments of a batch by the names that the model's forward has for them."""
    if isinstance(batch, Mapping):
        return dict(batch)
    names = list(inspect.signature(model.forward).parameters)
    placed = isinstance(batch, tuple | list) and len(batch) <= len(names)
    return dict(zip(names, batch, strict=False)) if placed else {}


def _masks(named: Mapping[str, Any]) -> dict[str, Tensor]:
    """The positions [texts, positions] that each mask keeps, for masks that belong to another argument."""
    found = {}
    for name, mask in named.items():
        if not (name.endswith(MASK) and isinstance(mask, Tensor) and mask.dim() > 1):
            continue
        square = mask.dim() > 2
        kept = mask > HIDDEN if square and mask.is_floating_point() else mask != 0
        kept = kept.flatten(1, -2).any(1) if square else kept  # a position that some query sees
        others = (value for other, value in named.items() if other != name and isinstance(value, Tensor))
        if any(value.shape[:2] == kept.shape for value in others):
            found[name] = kept
    return found


def _row(name: str, value: Any, row: int, many: int, length: int | None, kept: Tensor | None) -> Any:
    """One text's part of an argument, at the positions that are kept. Raises `_Whole` if it has no axis of texts."""
    if not isinstance(value, Tensor):
        if many > 1 and not isinstance(value, PLAIN):
            raise _Whole(f"{name}, a {type(value).__name__}, cannot be cut into texts")
        return value
    shape = tuple(value.shape)
    axis = next((a for a in range(len(shape) - 1) if shape[a : a + 2] == (many, length)), 0)
    if shape[axis:][:1] == (many,):
        value = value.narrow(axis, row, 1)
    elif shape == (length,) or (many > 1 and shape[:1] not in ((), (1,))):
        raise _Whole(f"{name} {shape} has no axis of {many} texts")
    if kept is None:
        return value
    for place in range(axis + 1, len(shape) if name.endswith(MASK) else min(axis + 2, len(shape))):
        if shape[place] == length:
            value = value.index_select(place, kept.to(value.device))
    return value
