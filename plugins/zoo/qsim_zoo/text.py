"""Text that every Python carries: the reference topics, the standard library's docstrings, and its source.

The text is read at run time from the running interpreter, so it varies a little between Python releases;
whoever reports a number reports the text's SHA-256 with it. A document is one reference topic or all
docstrings of one module, or the source of one. It belongs to a split by a hash of its *name*, so it stays there when a
release rewords it.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SPLITS = ("train", "valid", "test")
KINDS = ("module", "class", "function", "procedure")
"""What a docstring documents: of functions and methods those that give something back, and those that do not."""
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "__pycache__", "pydoc_data", "ensurepip"})


def split_of(document: str) -> str:
    """The split a document belongs to: about 90% train, 5% valid, 5% test, by SHA-256 of its name."""
    share = hashlib.sha256(document.encode()).digest()[0]
    return "test" if share < 13 else "valid" if share < 26 else "train"


@functools.cache
def text(split: str) -> str:
    """All documents of one split, in the order of their names, a blank line between paragraphs."""
    _check(split)
    return "\n\n".join(part for _, part in sorted(_documents(split)))


@functools.cache
def source(split: str) -> str:
    """The source of the standard library's top-level modules of one split, in the order of their names."""
    _check(split)
    modules = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    parts = [path.read_text(encoding="utf-8") for path in modules if split_of(f"source {path.name}") == split]
    return "\n\n".join(part.strip() for part in parts)


@functools.cache
def pairs(split: str, most: int = 200) -> tuple[tuple[str, str], ...]:
    """First lines of docstrings, and what follows them there, of the first `most` docstrings of a split that have both.

    A first line has 20 to 100 letters and stands once, what follows has 100 at least.
    """
    _check(split)
    found: dict[str, str] = {}
    for _, documented in _modules(split):
        for docstring, _ in documented:
            head, _, rest = docstring.partition("\n")
            if 20 <= len(head) <= 100 <= len(rest.strip()):
                found.setdefault(head, rest.strip())
    return tuple(found.items())[:most]


@functools.cache
def labelled(split: str) -> tuple[list[str], list[str]]:
    """The docstrings of a split, and what each documents, one of `KINDS`, as the code below it shows."""
    _check(split)
    documented = [pair for _, module in _modules(split) for pair in module]
    return [docstring for docstring, _ in documented], [kind for _, kind in documented]


def _check(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}; there are {', '.join(SPLITS)}")


def _documents(split: str) -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    for topic, body in topics.items():
        if split_of(f"topic {topic}") == split:
            yield f"topic {topic}", body.strip()
    for module, documented in _modules(split):
        yield module, "\n\n".join(docstring for docstring, _ in documented)


@functools.cache
def _modules(split: str) -> tuple[tuple[str, list[tuple[str, str]]], ...]:
    """The documented modules of a split by name, each with its docstrings and what they document."""
    library = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in library.rglob("*.py"):
        relative = path.relative_to(library)
        document = f"module {relative.as_posix()}"
        wanted = not LEFT_OUT.intersection(relative.parts) and split_of(document) == split
        if wanted and (documented := _documented(path)):
            found.append((document, documented))
    return tuple(sorted(found, key=lambda module: module[0]))


def _documented(path: Path) -> list[tuple[str, str]]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # a few library files are templates, not modules
        return []
    documented = (ast.Module, ast.ClassDef, *FUNCTIONS)
    nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
    return [(docstring, kind(node)) for node in nodes if (docstring := ast.get_docstring(node))]


def kind(node: ast.AST) -> str:
    """What the docstring of a node of the syntax tree documents, one of `KINDS`."""
    if isinstance(node, FUNCTIONS):
        return "function" if any(map(_gives, _own(node))) else "procedure"
    return "class" if isinstance(node, ast.ClassDef) else "module"


def _gives(node: ast.AST) -> bool:
    """Whether a statement or expression hands a value to the caller: `return x`, unless it is `None`, or a yield."""
    if isinstance(node, ast.Return):
        return node.value is not None and not (isinstance(node.value, ast.Constant) and node.value.value is None)
    return isinstance(node, ast.Yield | ast.YieldFrom)


def _own(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes of a function's body, but for those of functions and classes in it."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, (*FUNCTIONS, ast.Lambda, ast.ClassDef)):
            yield from _own(child)
