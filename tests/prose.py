"""Check docstrings for plain English: how they begin, and how long their sentences are.

    python tests/prose.py PATH …

prints a line for each sentence that breaks a rule.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

LONGEST = 25
"""Words of a sentence, at most."""
QUESTIONS = frozenset({"What", "Whether", "Which", "Why", "How", "Who", "Whose", "Where", "When"})
"""Words that begin a riddle and not a description. A docstring begins with a verb or the name of the thing."""
RIDDLES = re.compile(
    r"(?<!there )\b(is|are|was|were) (no|none|nobody|nothing)\b|\b(nobody|whoever|whatever else)\b|\bhas a say\b", re.I
)
"""Turns of phrase that a reader has to take apart: `is no number` for `is not a number`."""


def docstrings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every docstring of a module, with its line: of modules, classes, functions and attributes."""
    for node in ast.walk(tree):
        for statement in getattr(node, "body", []) if not isinstance(node, ast.Lambda | ast.IfExp) else []:
            value = getattr(statement, "value", None)
            if isinstance(statement, ast.Expr) and isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield statement.lineno, value.value


def sentences(text: str) -> Iterator[str]:
    """The sentences of a text. Indented blocks (formulas, tables, code) and lines of lists of names are left out."""
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        lines = [line for line in paragraph.split("\n") if not re.match(r" {4,}|.*\S {2,}\S", line)]
        plain = " ".join(re.sub(r"`[^`]*`", "`code`", " ".join(lines)).split())
        yield from (part for part in re.split(r"(?<=[.:;?!])\s+", plain) if part)


def words(sentence: str) -> int:
    """Count the words of a sentence, without numbers and signs."""
    return len(re.findall(r"[A-Za-z][\w'’/-]*", sentence))


def faults(text: str) -> Iterator[str]:
    """The rules that a docstring breaks, in words."""
    first = re.match(r"\W*([A-Za-z]+)", text)
    if first and first[1] in QUESTIONS:
        yield f"begins with {first[1]!r}"
    for sentence in sentences(text):
        if (length := words(sentence)) > LONGEST:
            yield f"a sentence of {length} words: {sentence[:60]}…"
        if riddle := RIDDLES.search(sentence):
            yield f"{riddle[0]!r}: {sentence[:60]}"


def check(path: Path) -> Iterator[str]:
    """A line for each fault of one file."""
    for line, text in docstrings(ast.parse(path.read_text(encoding="utf-8"))):
        for fault in faults(text):
            yield f"{path}:{line}: {fault}"


if __name__ == "__main__":
    found = [
        line
        for name in sys.argv[1:]
        for path in ([Path(name)] if Path(name).is_file() else sorted(Path(name).rglob("*.py")))
        for line in check(path)
    ]
    print("\n".join(found))
    sys.exit(bool(found))
