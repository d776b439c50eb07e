"""The choices of a search, and the recipes in which groups of sites have them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qsim_core import Override, Recipe, RecipeError

KEYS = ("weights", "activations")
"""The keys of a recipe that a search allots."""
USUAL = torch.Size([64, 64])
"""The shape by whose bits formats are ordered."""
UNQUANTIZED_BITS = 32

Choice = Mapping[str, Any]
"""The quantizers of a group by key; None leaves a tensor as it is. A key that is left out says the same."""
Offered = Mapping[str, tuple[Any, ...]]
"""By key, the quantizers that a group may get, those of few bits first."""


@dataclass(frozen=True)
class Group:
    """Sites that get the same choice."""

    name: str
    sites: tuple[str, ...]
    keys: tuple[str, ...]
    """The keys that change something at these sites."""

    def choices(self, offered: Offered) -> list[dict[str, Any]]:
        """Every choice that the group may get."""
        return combinations({key: offered[key] for key in self.keys})


Allotment = Mapping[Group, Choice]
"""The choice of each group. A group that is left out is not quantized."""


def offered(several: Mapping[str, Iterable[Any]], host: Any = None) -> dict[str, tuple[Any, ...]]:
    """The quantizers that are offered by key, from components or texts. Raises `QsimError` for fewer than two choices.

    A bare format is in the scheme of its place, as in a recipe.
    """
    found = {key: tuple(_different(getattr(Recipe.of({key: one}, host), key) for one in several[key])) for key in KEYS}
    found = {key: tuple(sorted(quantizers, key=bits)) for key, quantizers in found.items() if quantizers}
    if len(combinations(found)) < 2:
        only = " and ".join(str(quantizer) for quantizers in found.values() for quantizer in quantizers) or "none"
        raise RecipeError(
            f"a search needs two choices at least, found {only}; name more, like weights int3, int4 and int8"
        )
    return found


def combinations(offered: Offered) -> list[dict[str, Any]]:
    """Every choice that takes one quantizer for each key."""
    return [dict(zip(offered, one, strict=True)) for one in itertools.product(*offered.values())]


def bits(quantizer: Any) -> float:
    """The bits of an element, scales counted. Raises `RecipeError` for a quantizer that does not say them."""
    found = UNQUANTIZED_BITS if quantizer is None else quantizer.bits_per_element(USUAL)
    if found is None:
        raise RecipeError(f"{quantizer} does not say how many bits an element takes, so a search cannot price it")
    return float(found)


def recipe_of(base: Recipe, groups: Sequence[Group], allotted: Allotment) -> Recipe:
    """The recipe in which each group has its choice: the commonest one for all, others by site.

    Overrides of the base stay, and win. Transforms need the whole recipe, and are left out while a group has no choice.
    """
    usual: dict[str, Any] = {}
    for key in dict.fromkeys(key for group in groups for key in group.keys):
        values = [allotted.get(group, {}).get(key) for group in groups if key in group.keys]
        usual[key] = max(values, key=values.count)
    by_site: dict[str, dict[str, Any]] = {}
    for group in groups:
        values_of = {key: allotted.get(group, {}).get(key) for key in group.keys}
        differing = {key: value for key, value in values_of.items() if value != usual[key]}
        by_site |= {site: differing for site in group.sites if differing}
    for pattern, own in base.overrides.items():
        by_site[pattern] = {**by_site.pop(pattern, {}), **own.said}
    overrides = {pattern: Override(**said) for pattern, said in by_site.items()}
    whole = all(key in allotted.get(group, {}) for group in groups for key in group.keys)
    return base.model_copy(update={**usual, "overrides": overrides, "transforms": base.transforms if whole else ()})


def _different(quantizers: Iterable[Any]) -> Iterator[Any]:
    """Each quantizer once."""
    seen: list[Any] = []
    for quantizer in quantizers:
        if quantizer not in seen:
            seen.append(quantizer)
            yield quantizer
