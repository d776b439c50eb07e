"""Say in words, or as JSON, which structure was found."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

from qsim_structure.heads import Attention, Projection
from qsim_structure.structure import Refused, Structure


class Section(NamedTuple):
    """One part of a structure in words."""

    title: str
    lines: list[str]
    refused: bool = False
    """True for channels and names that may not be changed."""


def sections(structure: Structure, declared: Collection[str] = ()) -> list[Section]:
    """Describe a structure line by line. Norms in `declared` are marked."""
    groups = []
    for group in structure.groups:
        mark = " (declared)" if group.norm in declared else ""
        groups.append(f"{group.norm} -> {_relative(group.norm, group.weights)}{mark}")
    pairs = []
    for pair in structure.pairs:
        mark = " (scaled too)" if pair.scales else ""
        pairs.append(f"{pair.producer.removesuffix('.weight')} -> {_relative(pair.producer, pair.weights)}{mark}")
    ordered = [_reasons(refused) for refused in structure.ordered]
    return [
        Section("norms, and the weights that read them: ranges can be moved from one to the others", groups),
        Section("weights in pairs: channels can be permuted (of v within heads), and scaled where it says so", pairs),
        Section("attention", [_attention(attention) for attention in structure.attention]),
        *([Section("channels that have to stay in their order", ordered, refused=True)] if ordered else []),
        Section("refused", [_reasons(refused) for refused in structure.refused], refused=True),
    ]


def record(structure: Structure, declared: Collection[str] = ()) -> dict[str, Any]:
    """Describe a structure as numbers, texts, lists and dictionaries, for JSON."""
    return {
        "groups": [{"norm": g.norm, "weights": g.weights, "declared": g.norm in declared} for g in structure.groups],
        "pairs": [{"producer": p.producer, "weights": p.weights, "scales": p.scales} for p in structure.pairs],
        "attention": [
            {
                "path": attention.path,
                "heads": attention.heads,
                "key_heads": attention.key_heads,
                "head_size": attention.head_size,
                **{role: rows and rows.producer for role, rows in _projections(attention).items()},
                "outputs": [use.weight for use in attention.value.uses],
            }
            for attention in structure.attention
        ],
        "ordered": [{"name": refused.name, "reasons": list(refused.reasons)} for refused in structure.ordered],
        "refused": [{"name": refused.name, "reasons": list(refused.reasons)} for refused in structure.refused],
    }


def _attention(attention: Attention) -> str:
    own = f"{attention.path}."
    found = {role: rows.text.removeprefix(own) for role, rows in _projections(attention).items() if rows is not None}
    parts = ", ".join(f"{role} {text}" for role, text in found.items())
    shared = f" ({attention.key_heads} of k and v)" if attention.key_heads < attention.heads else ""
    readers = _relative(attention.value.producer, [use.weight for use in attention.value.uses])
    shape = f"{attention.heads} heads of {attention.head_size}{shared}"
    return f"{attention.path}: {shape}; {parts} -> {readers or 'no weight'}"


def _reasons(refused: Refused) -> str:
    return f"{refused.name}: {'; '.join(refused.reasons)}"


def _projections(attention: Attention) -> dict[str, Projection | None]:
    return {"q": attention.query, "k": attention.key, "v": attention.value}


def _relative(name: str, others: list[str]) -> str:
    """Name modules without the parts of their paths that they share with `name`."""
    parts, shown = name.removesuffix(".weight").split("."), []
    for other in others:
        rest = other.removesuffix(".weight").split(".")
        shared = next((i for i, (a, b) in enumerate(zip(parts, rest, strict=False)) if a != b), len(rest) - 1)
        shown.append(".".join(rest[shared:]))
    return ", ".join(shown)
