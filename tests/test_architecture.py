"""The code has the structure of docs/architecture.md: layers, sizes of packages, ways of a tensor and a recipe."""

from __future__ import annotations

import ast
import inspect
import io
import re
import sys
import tokenize
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import prose
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import qsim_core as qsim
from qsim_core.cli.main import main
from qsim_core.formats.accelerator import accelerated_by
from qsim_core.matmuls.call import Call
from qsim_core.sites.operand import Operand

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


def steps(way: str) -> list[str]:
    """The modules of a way, as the page lists them."""
    section = re.search(rf"\n## {way}\n(.*?)\n## ", PAGE, re.DOTALL)[1]  # type: ignore[index]
    return re.findall(r"^\d+\. \[[^\]]+\]\(\.\./([^)]+)\)", section, re.MULTILINE)


def entered(act: Callable[[], object], counts: Callable[[FrameType], bool] = lambda frame: True) -> list[str]:
    """The modules of the core in the order in which an act first calls a function of each that counts."""
    found: dict[str, None] = {}

    def note(frame: FrameType, event: str, _: Any) -> None:
        name = frame.f_code.co_filename
        function = event == "call" and frame.f_code.co_flags & inspect.CO_OPTIMIZED  # modules and classes run too
        if function and name not in found and name.startswith(str(CORE)) and counts(frame):
            found[name] = None

    sys.setprofile(note)
    try:
        act()
    finally:
        sys.setprofile(None)
    return [Path(name).relative_to(ROOT).as_posix() for name in found]


def holds_tensor(value: Any) -> bool:
    """Tell if an argument of a function is a tensor, or an operand or a call that has tensors."""
    held = isinstance(value, Tensor | Call | Operand)
    return held or (isinstance(value, tuple | list) and any(map(holds_tensor, value)))


@pytest.mark.parametrize("way", ["A tensor's way", "A recipe's way"])
def test_a_way_has_at_most_eight_modules_and_no_step_back(way: str) -> None:
    assert 1 < len(steps(way)) <= 8
    assert len(set(steps(way))) == len(steps(way))


def test_a_tensor_goes_the_way_of_the_page() -> None:
    model, x = nn.Sequential(nn.Linear(32, 16)), torch.ones(4, 32)
    qsim.simulate(model, weights="int4", activations="int8", outputs="bf16")

    with accelerated_by():
        order = entered(lambda: model(x), lambda frame: any(map(holds_tensor, frame.f_locals.values())))

    way = steps("A tensor's way")
    assert [module for module in order if module in way] == way


def test_a_recipe_goes_the_way_of_the_page(tmp_path: Path) -> None:
    text, result = tmp_path / "text.txt", tmp_path / "result.json"
    text.write_text("Each format of numbers loses something else. " * 40)
    run = ["evaluate", "--weights", "int4", "--limit", "1", "--data", str(text), "--json", str(result)]

    order = entered(lambda: CliRunner().invoke(main, run, catch_exceptions=False))

    way = steps("A recipe's way")
    assert [module for module in order if module in way] == way


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
