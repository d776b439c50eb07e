"""The errors that qsim raises, and the hints in their messages. Each message is one line and says what to do next."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

LISTED = 24
"""The largest number of names that a message lists in full. Of more names it lists those closest to the given one."""
CLOSE = 0.65
"""The least likeness of a name that is suggested: `mse` has 0.67 with `mes`, and `int30` 0.6 with `mi300`."""
UNCOUNTED = frozenset({"hardware"})
"""Nouns without an article."""


class QsimError(Exception):
    """Base class of qsim's own errors: each is about something that the user can correct."""


class SpecError(QsimError):
    """A component's text cannot be read or built. `position` is the index of the character in `text`."""

    def __init__(self, message: str, text: str, position: int = 0) -> None:
        super().__init__(f"{message} (character {position + 1} of {text!r})")
        self.text = text
        self.position = position


class PluginError(QsimError):
    """A plugin that is needed does not load, or offers something that cannot be used."""


class RecipeError(QsimError):
    """A recipe asks for something impossible: for example an unknown key, or a pattern that matches no site."""


class ModelError(QsimError):
    """A model cannot be found, loaded or trusted."""


class DataError(QsimError):
    """The data cannot be read, or are too few to measure anything."""


class TrainingError(QsimError):
    """A training has reached NaN or Inf, or cannot be resumed."""


class CalibrationWarning(UserWarning):
    """A static scale, or the work of a transform, is probably wrong: for example, found from too few data."""


def with_article(noun: str) -> str:
    """Put `a` or `an` before a noun, if it is one that can be counted.

    >>> with_article("format"), with_article("evaluator")
    ('a format', 'an evaluator')
    """
    if noun in UNCOUNTED:
        return noun
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


def did_you_mean(name: str, known: Iterable[str], words: Mapping[str, str] | None = None) -> str:
    """Make a hint for an unknown name: `; did you mean 'x'?` if a known name is close, and a list of the known names.

    Of more than `LISTED` known names, only the closest are listed. `words` gives a description of some known names:
    names whose description contains `name` as a word are suggested first.

    >>> did_you_mean("abpf", ["abfp", "int"])
    "; did you mean 'abfp'? There are: abfp, int"
    >>> did_you_mean("fp8", ["e4m3", "e5m2"], {"e4m3": "OCP FP8", "e5m2": "OCP FP8, wider"})
    "; did you mean 'e4m3' or 'e5m2'? There are: e4m3, e5m2"
    """
    names = sorted(known, key=natural_order)
    described = described_as(name, words or {})
    hint = _closest(name, names) or "."
    if described:
        hint = f"; did you mean {' or '.join(map(repr, described[:3]))}?"
    if not names:
        return f"{hint} There are none."
    if len(names) <= LISTED:
        return f"{hint} There are: {', '.join(names)}"
    likely = difflib.get_close_matches(name, names, n=LISTED // 2, cutoff=0.0)
    return f"{hint} There are {len(names)}, like: {', '.join(n for n in names if n in likely)}"


def described_as(name: str, words: Mapping[str, str]) -> list[str]:
    """The names whose description in `words` contains `name` as a word, sorted."""
    whole_word = re.compile(rf"\b{re.escape(name)}\b", re.IGNORECASE)
    return [other for other, about in sorted(words.items()) if whole_word.search(about)]


def file_did_you_mean(path: Path) -> str:
    """Make the hint `; did you mean 'x'?` for a missing file, if its directory has a file of a similar name."""
    try:
        beside = sorted(entry.name for entry in path.expanduser().parent.iterdir())
    except OSError:
        return ""
    return "" if path.name in beside else _closest(path.name, beside)


def natural_order(name: str) -> tuple[list[tuple[int, str]], str]:
    """A key for sorting that puts `int4` before `int16`.

    >>> sorted(["int16", "layers.10", "int4", "layers.9"], key=natural_order)
    ['int4', 'int16', 'layers.9', 'layers.10']
    """
    parts = enumerate(re.split(r"([0-9]+)", name))  # every second one is a number
    return [(len(digits := part.lstrip("0")), digits) if place % 2 else (0, part) for place, part in parts], name


def _closest(name: str, known: list[str]) -> str:
    """The same name in other letters, else the longest that the name begins or ends with, else the closest."""
    close = [other for other in known if other.casefold() == name.casefold()]
    parts = [other for other in known if len(other) > 2 and (name.startswith(other) or name.endswith(other))]
    close = close or sorted(parts, key=len)[-1:] or difflib.get_close_matches(name, known, n=1, cutoff=CLOSE)
    return f"; did you mean {close[0]!r}?" if close else ""


def one_line(error: BaseException) -> str:
    """Put a library's message into one line, and cut it off after 200 characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:199] + "…"
