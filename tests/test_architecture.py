"""The code has the structure of docs/architecture.md: layers, sizes of packages, ways of a tensor and a recipe."""

from __future__ import annotations

import ast
import io
import re
import tokenize
import tomllib
from pathlib import Path
from typing import Any

import prose
import pytest

BLANK = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
ROOT = Path(__file__).parent.parent
CORE = ROOT / "qsim_core"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def code(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*.py")) if not {"build", "tests", "templates"} & set(path.parts)]


def layers() -> list[str]:
    """The packages of the core from the top to the bottom, as import-linter's contract lists them."""
    contracts: Any = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    return next(contract["layers"] for contract in contracts if contract["type"] == "layers")  # type: ignore[no-any-return]


def test_the_page_lists_every_layer_from_the_bottom_to_the_top() -> None:
    table = re.search(r"\n## Layers\n(.*?)\n## ", PAGE, re.DOTALL)[1]  # type: ignore[index]

    named = [
        name for row in re.findall(r"^\| (.+?) \|", table, re.MULTILINE) for name in re.findall(r"\w+(?=`|\])", row)
    ]

    assert [name for name in named if name in layers()][4:] == [*reversed(layers())][4:]
    assert set(named) >= set(layers())


@pytest.mark.parametrize("way", ["A tensor's way", "A recipe's way"])
def test_a_way_has_at_most_eight_modules_and_no_step_back(way: str) -> None:
    section = re.search(rf"\n## {way}\n(.*?)\n## ", PAGE, re.DOTALL)[1]  # type: ignore[index]

    steps = re.findall(r"^\d+\. \[[^\]]+\]\(\.\./([^)]+)\)", section, re.MULTILINE)

    assert 1 < len(steps) <= 8
    assert len(set(steps)) == len(steps)
    assert [step for step in steps if not (ROOT / step).is_file()] == []


@pytest.mark.parametrize("package", sorted(path.name for path in CORE.iterdir() if (path / "__init__.py").exists()))
def test_a_package_of_the_core_has_a_dozen_modules_or_fewer(package: str) -> None:
    modules = [path.name for path in (CORE / package).glob("*.py") if path.name != "__init__.py"]

    assert len(modules) <= 12, modules


def lines_of_code(path: Path) -> set[int]:
    """The lines of a module with code: without blank lines, comments and texts that stand alone, as docstrings do."""
    source = path.read_text()
    texts = (
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    )
    prose = {line for node in texts for line in range(node.lineno, (node.end_lineno or 0) + 1)}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    code = {line for token in tokens if token.type not in BLANK for line in range(token.start[0], token.end[0] + 1)}
    return code - prose


def test_the_core_is_small() -> None:
    lines = {path: lines_of_code(path) for path in code(CORE) if "testing" not in path.parts}

    assert sum(map(len, lines.values())) < 9_400


@pytest.mark.parametrize(
    "folder", ["qsim_core", *sorted(f"plugins/{path.name}" for path in (ROOT / "plugins").iterdir() if path.is_dir())]
)
def test_docstrings_are_plain_english(folder: str) -> None:
    assert [line for path in code(ROOT / folder) for line in prose.check(path)] == []


@pytest.mark.parametrize(
    ("docstring", "fault"),
    [
        ("Whether a cache is held.", "begins with 'Whether'"),
        ("Round x. " + "word " * 26 + ".", "a sentence of 26 words: word word word"),
        ("Return the number; an integer is no float.", "'is no': an integer is no float."),
    ],
)
def test_the_check_of_docstrings_finds_what_breaks_a_rule(docstring: str, fault: str) -> None:
    assert [found for found in prose.faults(docstring) if found.startswith(fault)]
