"""Components: frozen pydantic models whose text form is a call.

`qsim_core.parse` reads `str(component)` back to an equal component. The same text represents the component in JSON and
YAML.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, Union

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, model_serializer, model_validator
from pydantic.fields import FieldInfo

from qsim_core.components.syntax import CONSTANTS, Node, read
from qsim_core.errors import QsimError, did_you_mean, with_article

BARE_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")


class Component(BaseModel):
    """Base class of everything that a plugin offers: a name, with options that are checked and frozen.

    A component holds options, never tensors. A subclass sets `name` and declares its options as fields. The default of
    an option that is itself a component may be a text: `element: Format = Field("int4")`. The host that builds the
    component parses that text.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    name: ClassVar[str]
    kind: ClassVar[str] = "component"
    """The word for such a component in messages: quantizer, format, evaluator, …"""
    hook: ClassVar[str] = ""
    """The hook by which a plugin offers it; the base class of each kind sets it."""
    removed: ClassVar[Mapping[str, str]] = {}
    """Options of earlier versions, and what took the place of each: the end of an error message."""

    @model_validator(mode="wrap")
    @classmethod
    def _from_text(cls, value: Any, handler: Any, info: ValidationInfo) -> Self:
        """Accept a text where a component is expected."""
        if isinstance(value, str):
            value = read(value)
        if isinstance(value, Node):
            host = (info.context or {}).get("host") or default_host()
            return typing.cast("Self", host.build(value, cls))
        if isinstance(value, dict) and inspect.isabstract(cls):
            raise ValueError(f"expected {with_article(cls.kind)} or its text, found a mapping")
        if isinstance(value, dict) and (gone := next((option for option in value if option in cls.removed), None)):
            raise ValueError(no_option(cls, gone))
        return typing.cast("Self", handler(value))

    @model_validator(mode="after")
    def _integers_fit(self) -> Self:
        """Refuse integers that are not signed ones of 64 bits: torch, kernels and iterators cannot take them."""
        for option, value in self:
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, int) and not -(2**63) <= number < 2**63:
                    raise ValueError(f"{option} is beyond the integers of 64 bits")
        return self

    @model_serializer(mode="plain")
    def _to_text(self) -> str:
        return str(self)

    def __str__(self) -> str:
        name, options_of_preset, _ = self.__dict__.get("_written", (self.name, None, None))
        if options_of_preset is not None:
            if options_of_preset == self._options():
                return str(name)
            name = self.name
        parts = []
        for index, (option, field) in enumerate(options_of(type(self)).items()):
            value = getattr(self, option)
            default = field.get_default(call_default_factory=True)
            always = index == 0 and (field.is_required() or isinstance(value, Component | int | float))
            if always or (value != default and _render(value) != default):
                parts.append(_render(value) if index == 0 else f"{option}={_render(value)}")
        return f"{name}({', '.join(parts)})" if parts else str(name)

    def replace(self, **changes: Any) -> Self:
        """Make a copy with some options changed, and check it."""
        return self.model_validate({**self._options(), **changes})

    def _options(self) -> dict[str, Any]:
        return {option: getattr(self, option) for option in options_of(type(self))}

    @property
    def preset_of(self) -> str | None:
        """The plugin of the preset that this component is written by; None: by its own name."""
        plugin: str | None = self.__dict__.get("_written", (self.name, None, None))[2]
        return plugin

    def _named(self, name: str, preset_of: str | None = None) -> Self:
        """Make a copy whose text has this name: a name with its plugin's, or that of a plugin's preset.

        A preset's name is used as long as the options are unchanged. Equality and hash do not depend on the name.
        """
        copy = self.model_copy()
        copy.__dict__["_written"] = (name, None if preset_of is None else self._options(), preset_of)
        return copy


@dataclass(frozen=True)
class Preset:
    """A name for a filled-in component: `Preset("int4", "int(4)", "signed, -7 to 7")`."""

    name: str
    text: str
    doc: str = ""
    stands_for_bits: int | None = None
    """The width at which `--precision` takes this format, like 4 in w4a8; none: at no width."""


def default_host() -> Any:
    """The host of the installed plugins, which builds components from text if no host is given."""
    return importlib.import_module("qsim_core.components.host").installed()  # that module imports this one


@functools.lru_cache(maxsize=1024)
def options_of(cls: type[Component]) -> dict[str, FieldInfo]:
    """The options of a component class in the order of its text form: its own, then the inherited ones."""
    declared = (name for base in cls.__mro__ for name in inspect.get_annotations(base))
    return {name: cls.model_fields[name] for name in dict.fromkeys(declared) if name in cls.model_fields}


def no_option(cls: type[Component], option: str) -> str:
    """Say that a component has no such option: what took its place, or which ones there are."""
    if option in cls.removed:
        return f"{cls.name} has no option {option!r} any more; {cls.removed[option]}"
    return f"{cls.name} has no option {option!r}{did_you_mean(option, options_of(cls))}"


def construct(cls: type[Component], node: Node, host: Any, scope: frozenset[str]) -> Component:
    """Build a component of class `cls` from a word or a call. Raises `SpecError` at the position of a wrong argument.

    `scope` is the set of plugins on which the class relies: names in the texts of its defaults mean their components.
    """
    options = list(options_of(cls))
    positional = node.arguments or ()
    if len(positional) > len(options):
        raise positional[len(options)].error(
            f"{cls.name} takes at most {len(options)} option{'s' * (len(options) != 1)}"
        )
    given = dict(zip(options, positional, strict=False))
    for option, value in node.options.items():
        if option not in options:
            raise value.error(no_option(cls, option))
        if option in given:
            raise value.error(f"{cls.name} is given {option!r} twice")
        given[option] = value
    values = {option: _value(part, cls.model_fields[option].annotation) for option, part in given.items()}
    for option, field in cls.model_fields.items():
        if option not in given and isinstance(field.default, str) and _allows(field.annotation, Component):
            values[option] = read(field.default, scope)
    try:
        return cls.model_validate(values, context={"host": host})
    except ValidationError as error:
        place = error.errors()[0]["loc"]
        part = given.get(str(place[0]), node) if place else node
        raise part.error(f"{cls.name}: {explain(error)}") from None


def explain(error: ValidationError) -> str:
    """Put the first complaint of a pydantic error into one plain sentence."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if first["type"] == "missing":
        return f"{where or 'an option'} is missing"
    if first["type"] == "extra_forbidden":
        above = ".".join(str(part) for part in first["loc"][:-1])
        return f"{above or 'this'} has no key {str(first['loc'][-1])!r}"
    if not first["msg"].startswith("Input should be "):
        return f"{where}: {message}" if where else message
    if first["type"] == "model_type":
        message = f"a {first['ctx']['class_name'].lower()} or its text"
    value = first["input"].name if isinstance(first["input"], Node) else first["input"]
    return f"{where or 'this'} should be {message}, not {value!r}"


def read_value(text: str, annotation: Any) -> Any:
    """Read a text as the value of an option of this type. The text of a component is returned as it is."""
    node = read(text)
    value = _value(node, annotation)
    return text if isinstance(value, Node) else value


def _value(node: Node, annotation: Any) -> Any:
    """Read a piece of text as the value of an option of this type; a component stays a node."""
    if isinstance(node.value, list):
        inner = [argument for argument in typing.get_args(annotation) if argument is not ...]
        return [_value(item, inner[0] if inner else Any) for item in node.value]
    if node.name is None:
        return node.value
    if node.is_word and node.name in CONSTANTS:
        constant = CONSTANTS[node.name]
        if _allows(annotation, type(constant)):
            return constant
    if _allows(annotation, Component):
        return node
    if node.is_word:
        return node.name
    raise node.error(f"a component such as {node.name!r} does not fit here")


def _allows(annotation: Any, wanted: type) -> bool:
    """Tell if a type, or a part of a union, is `wanted` or a subclass of it."""
    if typing.get_origin(annotation) in (Union, types.UnionType, typing.Annotated):
        return any(_allows(part, wanted) for part in typing.get_args(annotation))
    return isinstance(annotation, type) and issubclass(annotation, wanted)


def _render(value: Any) -> str:
    """Write the value of an option as text."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(_render(item) for item in value)}]"
    if isinstance(value, bool | None):
        return str(value).lower()
    if isinstance(value, int | float | Component):
        return str(value)
    text = str(value)
    return text if BARE_WORD.match(text) and text not in CONSTANTS else json.dumps(text, ensure_ascii=False)


def components_in(value: Any) -> Iterator[Component]:
    """Every component inside a recipe, a component or a collection, and the component itself."""
    if isinstance(value, Component):
        yield value
    if isinstance(value, BaseModel):
        value = [getattr(value, option) for option in type(value).model_fields]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from components_in(item)


def check_name(name: Any) -> None:
    """Raise `QsimError` unless `name` can stand in a component's text."""
    if not isinstance(name, str) or not BARE_WORD.match(name) or name in CONSTANTS:
        raise QsimError(f"{name!r} is not a name for a component: use letters, digits and _, but not a constant")


def check_preset(preset: Preset) -> None:
    """Raise `QsimError` unless the text and the description of a preset are texts, and its width is a whole number."""
    if not isinstance(preset.text, str) or not isinstance(preset.doc, str):
        raise QsimError("the text and the description of a preset are texts")
    if not isinstance(preset.stands_for_bits, int | None):
        raise QsimError(f"stands_for_bits is a whole number, not {preset.stands_for_bits!r}")
