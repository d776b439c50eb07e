"""The experts of a layer, which transformers stacks in one parameter, under the names that they have in checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qsim_core.errors import RecipeError
from qsim_core.formats.codes import Encoded
from qsim_core.quantizers.stacked import Stacked
from qsim_core.transforms.encoded_weights import EncodedWeight


def experts(model: Any, weight: EncodedWeight) -> Iterator[EncodedWeight]:
    """The weight of each projection of each expert. Raises `RecipeError` if the family has no names for them.

    transformers' own conversion says which rows of the stack [E, rows, K] are one projection.
    """
    from transformers.core_model_loading import revert_weight_conversion

    whole = weight.encoded
    count, height = whole.codes.shape[:2]
    rows = torch.arange(count * height).reshape(count, height, 1)
    named: dict[str, Tensor] = revert_weight_conversion(model, {weight.name: rows})
    quantizer = weight.quantizer.each if isinstance(weight.quantizer, Stacked) else weight.quantizer
    for name, places in named.items():
        if places.dim() != 2 or isinstance(quantizer.granularity, tuple):
            raise RecipeError(
                f"{weight.name} stacks experts, which no file holds as they are: {type(model).__name__} has no names "
                f"for single ones, or tiles share their scales; leave it out with --skip {weight.name}"
            )
        expert, first = divmod(int(places[0]), height)
        part = _rows(whole[expert], slice(first, first + len(places)))
        yield EncodedWeight(name, quantizer, None, part)


def stacks(weight: EncodedWeight, parts: int) -> Iterator[EncodedWeight]:
    """The weight of each projection of all experts, whose rows stand one below the other: [E * rows, K].

    Raises `RecipeError` where scales are of a whole expert, or of tiles.
    """
    whole = weight.encoded
    quantizer = weight.quantizer.each if isinstance(weight.quantizer, Stacked) else weight.quantizer
    count, height = whole.codes.shape[:2]
    scales = whole.scales.codes if isinstance(whole.scales, Encoded) else whole.scales
    if scales is None or scales.shape[:2] != whole.codes.shape[:2] or getattr(whole.scales, "scales", None) is not None:
        raise RecipeError(
            f"{weight.name} stacks experts, each with scales of its own for more than a row; such files hold scales of "
            f"blocks alone: leave it out with --skip {weight.name}"
        )
    for place in range(parts):
        rows = slice(place * height // parts, (place + 1) * height // parts)
        each = [_rows(whole[expert], rows) for expert in range(count)]
        yield EncodedWeight(weight.name, quantizer, None, _one_below_another(each))


def _one_below_another(parts: list[Encoded]) -> Encoded:
    """Matrices of as many columns as one."""

    def joined(of: list[Any]) -> Any:
        if isinstance(of[0], Encoded):
            return replace(of[0], codes=torch.cat([one.codes for one in of]))
        return None if of[0] is None else torch.cat(of)

    together = {name: joined([getattr(part, name) for part in parts]) for name in ("codes", "scales", "zero_points")}
    return replace(parts[0], **together)


def _rows(encoded: Encoded, rows: slice) -> Encoded:
    """Some rows of an encoded matrix; what is of the whole matrix stays."""
    height = len(encoded.codes)

    def cut(part: Any) -> Any:
        if isinstance(part, Encoded):
            return replace(part, codes=cut(part.codes))
        if part is None:
            return None
        return part[rows] if len(part) == height else part.clone()  # files share no memory between layers

    scales, zeros = cut(encoded.scales), cut(encoded.zero_points)
    return replace(encoded, codes=encoded.codes[rows], scales=scales, zero_points=zeros)
