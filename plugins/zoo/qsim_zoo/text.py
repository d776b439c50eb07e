"""Text that every Python contains: the reference topics, the standard library's docstrings, and its source.

The text is read from the running interpreter, so it varies a little between Python releases. Results therefore record
its SHA-256. A document is one reference topic, all docstrings of one module, or the source of one module. Its split
follows from a hash of its *name*, so a document stays in its split when a release changes its text. The docstrings are
kept in the user's cache until a module changes.
"""

from __future__ import annotations

import ast
import functools
import gc
import hashlib
import os
import sys
import sysconfig
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from qsim_cache.made_once import made_once

LIBRARY = Path(sysconfig.get_paths()["stdlib"])
SPLITS = ("train", "valid", "test")
KINDS = ("module", "class", "function", "procedure")
"""The kinds of documented objects. A function or method is a procedure if it returns no value."""
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
BLOCKS = frozenset({"body", "handlers", "orelse", "finalbody", "cases"})
"""The fields of a statement that hold further statements."""
LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "__pycache__", "pydoc_data", "ensurepip"})


def split_of(document: str) -> str:
    """Return the split of a document by SHA-256 of its name: about 90% train, 5% valid, 5% test."""
    share = hashlib.sha256(document.encode()).digest()[0]
    return "test" if share < 13 else "valid" if share < 26 else "train"


@functools.cache
def text(split: str) -> str:
    """Return all documents of one split in the order of their names, with a blank line between paragraphs."""
    _check(split)
    return "\n\n".join(part for _, part in sorted(_documents(split)))


@functools.cache
def source(split: str) -> str:
    """Return the source of the standard library's top-level modules of one split, in the order of their names."""
    _check(split)
    modules = sorted(LIBRARY.glob("*.py"))
    parts = [path.read_text(encoding="utf-8") for path in modules if split_of(f"source {path.name}") == split]
    return "\n\n".join(part.strip() for part in parts)


@functools.cache
def pairs(split: str, most: int = 200) -> tuple[tuple[str, str], ...]:
    """Split docstrings into their first line and the rest, for the first `most` suitable docstrings of a split.

    A first line has 20 to 100 characters, the rest at least 100. Each first line occurs once.
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
    """Return the docstrings of a split, and the kind of object that each documents (one of `KINDS`)."""
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
def _modules(split: str) -> list[tuple[str, list[tuple[str, str]]]]:
    """List the documented modules of a split by name, each with its docstrings and the kinds of their objects."""
    named = ((f"module {path.relative_to(LIBRARY).as_posix()}", path) for path in _files(LIBRARY))
    files = sorted((document, path) for document, path in named if split_of(document) == split)
    state = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for _, path in files]
    made_from = repr((sys.version, state)).encode() + Path(__file__).read_bytes()

    def read() -> list[tuple[str, list[tuple[str, str]]]]:
        modules = [(document, _documented(path)) for document, path in files]
        return [module for module in modules if module[1]]

    found: list[tuple[str, list[tuple[str, str]]]] = made_once("docstrings", "docstrings of a library", made_from, read)
    return found


def _files(folder: Path) -> Iterator[Path]:
    """Yield the library's modules in a folder, without a look into the folders that are left out."""
    for name in sorted(set(os.listdir(folder)) - LEFT_OUT):
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            yield from _files(path)
        elif path.suffix == ".py":
            yield path


def _documented(path: Path) -> list[tuple[str, str]]:
    """List the docstrings of a module, each with the kind of its object."""
    try:
        tree = _parsed(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # a few library files are templates, not modules
        return []
    documented = (ast.Module, ast.ClassDef, *FUNCTIONS)
    nodes = [node for node in _statements(tree) if isinstance(node, documented)]
    return [(docstring, kind(node)) for node in nodes if (docstring := ast.get_docstring(node))]


def _parsed(text: str) -> ast.Module:
    """Parse a module without garbage collections, which take half of the time and find nothing: a tree has no cycle."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        return ast.parse(text)
    finally:
        if collecting:
            gc.enable()


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield a module and all its statements in the order of `ast.walk`, without a look into expressions."""
    waiting: deque[ast.AST] = deque([tree])
    while waiting:
        node = waiting.popleft()
        yield node
        for name in node._fields:
            if name in BLOCKS:
                waiting.extend(getattr(node, name))


def kind(node: ast.AST) -> str:
    """Return the kind of a documented node of the syntax tree (one of `KINDS`)."""
    if isinstance(node, FUNCTIONS):
        return "function" if any(map(_returns_value, _own_nodes(node))) else "procedure"
    return "class" if isinstance(node, ast.ClassDef) else "module"


def _returns_value(node: ast.AST) -> bool:
    """Tell if a node returns a value to the caller: a yield, or `return x` where x is not `None`."""
    if isinstance(node, ast.Return):
        return node.value is not None and not (isinstance(node.value, ast.Constant) and node.value.value is None)
    return isinstance(node, ast.Yield | ast.YieldFrom)


def _own_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield all nodes of a function's body, except those inside nested functions and classes."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, (*FUNCTIONS, ast.Lambda, ast.ClassDef)):
            yield from _own_nodes(child)
