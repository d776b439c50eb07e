"""The errors a user can meet. Each message is one line that says what to do next."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

LISTED = 24
"""So many names are listed in a message; of more, those that are most like what was written."""


class QsimError(Exception):
    """Something that whoever runs qsim can put right; every error of qsim's own is one."""


class SpecError(QsimError):
    """A component's text cannot be read or built. `position` is the index of the character in `text`."""

    def __init__(self, message: str, text: str, position: int = 0) -> None:
        super().__init__(f"{message} (character {position + 1} of {text!r})")
        self.text = text
        self.position = position


class PluginError(QsimError):
    """A plugin that is needed does not load, or what it offers cannot be used."""


class RecipeError(QsimError):
    """A recipe says something that cannot be done: an unknown key, a pattern that matches no site."""


class ModelError(QsimError):
    """A model cannot be found, loaded or trusted."""


class DataError(QsimError):
    """The data cannot be read, or is too little to measure anything on."""


class TrainingError(QsimError):
    """A training has come to NaN or Inf, or cannot go on where it was."""


class CalibrationWarning(UserWarning):
    """A static scale, or what a transform did, can hardly be right."""


def with_article(noun: str) -> str:
    """The noun with its article.

    >>> with_article("format"), with_article("evaluator")
    ('a format', 'an evaluator')
    """
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


def did_you_mean(name: str, known: Iterable[str], words: Mapping[str, str] | None = None) -> str:
    """`; did you mean 'x'?` where a known name is close, and the list of what exists, or the likeliest of very many.

    Those are meant of which `words` about them say the name.

    >>> did_you_mean("abpf", ["abfp", "int"])
    "; did you mean 'abfp'? There are: abfp, int"
    >>> did_you_mean("fp8", ["e4m3", "e5m2"], {"e4m3": "OCP FP8", "e5m2": "OCP FP8, wider"})
    "; did you mean 'e4m3' or 'e5m2'? There are: e4m3, e5m2"
    """
    names = sorted(
        known, key=lambda n: [(not p.isdigit(), int(p) if p.isdigit() else 0, p) for p in re.split(r"(\d+)", n)]
    )
    whole = re.compile(rf"\b{re.escape(name)}\b", re.IGNORECASE)
    said = [other for other, about in sorted((words or {}).items()) if whole.search(about)]
    hint = (f"; did you mean {' or '.join(map(repr, said[:3]))}?" if said else _closest(name, names)) or "."
    if not names:
        return f"{hint} There are none."
    if len(names) <= LISTED:
        return f"{hint} There are: {', '.join(names)}"
    likely = difflib.get_close_matches(name, names, n=LISTED // 2, cutoff=0.0)
    return f"{hint} There are {len(names)}, like: {', '.join(n for n in names if n in likely)}"


def file_did_you_mean(path: Path) -> str:
    """`; did you mean 'x'?` where a file or directory of a name that is close stands beside one that is missing."""
    try:
        beside = sorted(entry.name for entry in path.expanduser().parent.iterdir())
    except OSError:
        return ""
    return "" if path.name in beside else _closest(path.name, beside)


def _closest(name: str, known: list[str]) -> str:
    close = [other for other in known if other.casefold() == name.casefold()]
    close = close or difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def one_line(error: BaseException) -> str:
    """The beginning of a library's message in one line, cut off after 200 characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:199] + "…"
