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
