"""The syntax of components: `abfp(int4, n=64)` is read with `ast` into nodes that have positions in the text.

Nothing is evaluated. The whole grammar is names, literals, lists and calls. The host finds the component of a name
(`qsim_core.components.host`). The type of an option decides the meaning of a bare word
(`qsim_core.components.component`).
"""

from __future__ import annotations

import ast
import functools
import math
import warnings
from dataclasses import dataclass, field
from typing import Any

from qsim_core.errors import SpecError

MAX_LENGTH = 16384
MAX_DEPTH = 16
CONSTANTS = {"true": True, "false": False, "none": None, "True": True, "False": False, "None": None}


@dataclass(frozen=True)
class Node:
    """One piece of a component's text: a word, a call or a literal.

    A word has a name, and `arguments` is `None`. A call has a name and arguments. A literal has neither: its value
    is a number, a string, or a list of nodes.
    """

    text: str
    position: int
    name: str | None = None
    value: Any = None
    arguments: tuple[Node, ...] | None = None
    options: dict[str, Node] = field(default_factory=dict)
    scope: frozenset[str] = frozenset()
    """The plugins that the text's author relies on: for a preset's text, its own plugin and that one's dependencies."""

    @property
    def is_word(self) -> bool:
        """True for a name without arguments."""
        return self.name is not None and self.arguments is None

    def error(self, message: str) -> SpecError:
        """Make an error at the position of this node."""
        return SpecError(message, self.text, self.position)


@functools.lru_cache(maxsize=4096)  # a search for a name reads the texts of all presets
def read(text: str, scope: frozenset[str] = frozenset()) -> Node:
    """Read a component's text into a syntax tree; `scope` is the set of plugins that the text's author relies on.

    Raises `SpecError`, with the position of the character, for anything that is not a word, a call, a number, a
    string or a list. Raises it too for a text of more than 16,384 characters, and for nesting deeper than 16.
    """
    if len(text) > MAX_LENGTH:
        raise SpecError(f"a component's text has at most {MAX_LENGTH} characters, not {len(text)}", text[:40] + "…")
    line = text.replace("\n", " ").replace("\r", " ").replace("\t", " ").strip()
    if not line:
        raise SpecError("an empty text names no component", text)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's own, of a number that touches a word
            tree = ast.parse(line, mode="eval").body
    except SyntaxError as error:
        position = min(max((error.offset or 1) - 1, 0), len(line) - 1)
        raise SpecError(f"cannot be read: {error.msg}", line, position) from None
    except (RecursionError, MemoryError, ValueError):
        raise SpecError("cannot be read: nested too deep, or not text", line) from None
    return _Reader(line, scope).node(tree, depth=0)


class _Reader:
    def __init__(self, text: str, scope: frozenset[str]) -> None:
        self.text = text
        self.scope = scope

    def node(self, tree: ast.expr, depth: int) -> Node:
        """Turn one expression into a node. Raises `SpecError` for an expression outside the grammar."""
        position = len(self.text.encode()[: tree.col_offset].decode())
        if depth > MAX_DEPTH:
            raise SpecError(f"nested deeper than {MAX_DEPTH}", self.text, position)
        match tree:
            case ast.Name() | ast.Attribute():
                return Node(self.text, position, name=self.name(tree, position), scope=self.scope)
            case ast.Constant(value=bool() | None):
                return Node(self.text, position, name=str(tree.value))
            case ast.Constant(value=str()):
                return Node(self.text, position, value=tree.value)
            case ast.Constant(value=int() | float() as number):
                return Node(self.text, position, value=self.number(number, position))
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
                return Node(self.text, position, value=-self.number(number, position))
            case ast.List(elts=items) | ast.Tuple(elts=items):
                return Node(self.text, position, value=[self.node(item, depth + 1) for item in items])
            case ast.Call():
                arguments = tuple(self.node(argument, depth + 1) for argument in tree.args)
                given = [self.option(keyword, position) for keyword in tree.keywords]
                twice = [name for name in given if given.count(name) > 1]
                if twice:
                    raise SpecError(f"given {twice[0]!r} twice", self.text, position)
                values = [self.node(keyword.value, depth + 1) for keyword in tree.keywords]
                options = dict(zip(given, values, strict=True))
                return Node(self.text, position, self.name(tree.func, position), None, arguments, options, self.scope)
        found = ast.get_source_segment(self.text, tree) or self.text
        raise SpecError(f"expected a name, a number, a string or a call, found {found!r}", self.text, position)

    def number(self, number: int | float, position: int) -> int | float:
        """Check a number: torch and kernels can take it. Raises `SpecError`."""
        if isinstance(number, int) and number.bit_length() > 64:
            raise SpecError("a whole number has more than 64 bits", self.text, position)
        if number == math.inf:
            raise SpecError("a number is infinite", self.text, position)
        return number

    def name(self, tree: ast.expr, position: int) -> str:
        """Read a component's name: `name` or `plugin.name`."""
        match tree:
            case ast.Name(id=name):
                return name
            case ast.Attribute(value=ast.Name(id=plugin), attr=name):
                return f"{plugin}.{name}"
        raise SpecError("expected a component's name, `name` or `plugin.name`", self.text, position)

    def option(self, keyword: ast.keyword, position: int) -> str:
        """Read the name of an option. Raises `SpecError` for `**`."""
        if keyword.arg is None:
            raise SpecError("`**` has no meaning here", self.text, position)
        return keyword.arg
