"""Convert the labels of data to a model's classes: by name where both name their classes, else by number."""

from __future__ import annotations

import operator
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qsim_core import DataError, LoadedModel

UNNAMED = re.compile(r"(?:label_)?([0-9]+)", re.IGNORECASE)
"""Stands for a class without a name: its number alone, or `LABEL_0`, as transformers writes it."""
SHOWN = 8
"""Names of classes in a message at most."""


class Labels:
    """The labels of data, as classes of a model.

    `names` are those of the data: of class 0, of class 1, and so on. Without them a label is a number of the model's
    classes, or a name of one. Upper and lower case are the same, unless two names of the model differ only in them.
    With `by_name=False` class 0 of the data is class 0 of the model, whatever their names are.
    """

    def __init__(self, loaded: LoadedModel, names: Sequence[str] | None = None, by_name: bool = True) -> None:
        self.classes = _Classes(loaded)
        self.numbers: list[int] | None = None
        """The model's class for each class of the data; none: a number is the same class in both."""
        self.how = "labels taken by number"
        if names is None:
            self.how += ", as the data do not name their classes"
        elif by_name and (self.classes.named or all(map(UNNAMED.fullmatch, names))):
            self.numbers = self._matched(names)
            missing = self.classes.count - len(set(self.numbers)) if self.classes.count else 0
            self.how = "labels matched by name" + (f", {missing} classes of the model not in the data" * (missing > 0))
        elif by_name:
            self.how += ", as the model does not name its classes"

    def of(self, labels: Sequence[Any], many: int, kind: str) -> Tensor:
        """Return the first labels as the model's classes. Raises `DataError` for a label that is not one of them."""
        found = []
        for position in range(many):
            label = labels[position]
            number = self._number(label)
            if number is None or (self.classes.count is not None and number >= self.classes.count):
                raise DataError(f"label {label!r} of {kind} {position} is not one of {self.classes}")
            found.append(number)
        return torch.tensor(found)

    def described(self, labels: Sequence[Any]) -> str:
        """Return a few words about the way from labels to classes."""
        return "labels matched by name" if isinstance(labels[0], str) else self.how

    def _number(self, label: Any) -> int | None:
        """Return the model's class of a label: a name, or a whole number of Python, NumPy or torch."""
        if isinstance(label, str):
            found = self.classes.called(label)
            if len(found) > 1:
                raise DataError(f"label {label!r} is the name of several classes of the model: {sorted(found)}")
            return next(iter(found), None)
        try:
            number = operator.index(label)
        except TypeError:
            return None
        if self.numbers is not None:
            return self.numbers[number] if 0 <= number < len(self.numbers) else None
        return number if number >= 0 else None

    def _matched(self, names: Sequence[str]) -> list[int]:
        """Return the model's class for each name. Raises `DataError` if one is not a class, or two are the same."""
        found = []
        written = [UNNAMED.fullmatch(name) for name in names]
        for place, name in enumerate(names):
            classes = self.classes.called(name)
            if not classes and all(written):
                classes = {int(written[place][1])}  # type: ignore[index]
            if place not in classes and len(classes) != 1:
                why = f"has {len(classes)} of that name" if classes else "does not"
                raise DataError(
                    f"the data have a class {name!r}, and the model {why} ({_shown(self.classes.names)}); rename the "
                    f"classes, or take them by number: --set accuracy.by_name=false"
                )
            found.append(place if place in classes else next(iter(classes)))
        number, times = Counter(found).most_common(1)[0]
        if times > 1:
            raise DataError(f"the data have {times} classes for the model's {names[found.index(number)]!r}; merge them")
        return found


class _Classes:
    """The classes of a model, as its configuration has them: their number, and their names if they have any."""

    def __init__(self, loaded: LoadedModel) -> None:
        config = getattr(loaded.model, "config", None)
        self.count: int | None = getattr(config, "num_labels", None)
        """The number of classes; none: only the model's outputs tell."""
        if self.count is not None and self.count < 2:
            raise DataError("the model has one output and no classes; use the evaluator fidelity")
        exact: dict[str, set[int]] = defaultdict(set)
        for number, name in (getattr(config, "id2label", None) or {}).items():
            exact[str(name)].add(int(number))
        for name, number in (getattr(config, "label2id", None) or {}).items():
            known = exact[str(name)] or {int(number)}
            if int(number) not in known:
                there = f"class {name!r} is {min(known)} in id2label and {number} in label2id"
                raise DataError(f"the model's config contradicts itself: {there}")
            exact[str(name)].add(int(number))
        self._exact = exact
        self._folded: dict[str, set[int]] = defaultdict(set)
        for name, numbers in exact.items():
            self._folded[name.casefold()] |= numbers
        self.names = [name for name in exact if not UNNAMED.fullmatch(name)]
        self.named = bool(self.names)

    def __str__(self) -> str:
        return (
            f"the model's {self.count} classes, 0 to {(self.count or 1) - 1}" if self.count else "the model's classes"
        )

    def called(self, name: str) -> set[int]:
        """Return the numbers of the classes with this name."""
        return self._exact.get(name) or self._folded.get(name.casefold(), set())


def _shown(names: Sequence[str]) -> str:
    """List names, the first few of many."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
