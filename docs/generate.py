"""`python docs/generate.py`: write the pages that say what the code says: cli.md, components.md, hooks.md, api.md.

`tests/test_generated.py` holds them to it. They depend on the tree alone, not on the terminal or on what else is
installed: the plugins are those in plugins/, imported from there, and none of them imports an optional library
(lm_eval, diffusers, …) before it is used.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import click
import qsim_structure
from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from qsim_listing.components import catalogue, described

import qsim_core as qsim
from qsim_core import testing
from qsim_core.cli.main import main
from qsim_core.cli.options import LAST, by_heading
from qsim_core.components.component import Preset
from qsim_core.components.discovery import COMMANDS, GROUP
from qsim_core.components.hook_validation import HOOKS, base_of

ROOT = Path(__file__).parent.parent
MADE_BY_QSIM = (qsim.Simulation, qsim.Context)
"""Classes that only qsim makes: their constructors are not public."""
WRITTEN = "This page is written by `python docs/generate.py`.\n"
FOR_AUTHORS = {
    "qsim_core.errors": ["one_line"],
    "qsim_core.evaluation.adapter": ["check_finite"],
    "qsim_core.evaluation.metrics": ["rank"],
    "qsim_core.formats.accelerator": ["accelerated_by"],
    "qsim_core.formats.random_bits": ["uniform"],
    "qsim_core.formats.rounding": ["working"],
    "qsim_core.matmuls.call": ["Call"],
    "qsim_core.quantizers.calibrators": ["ErrorOf"],
    "qsim_core.simulation.work": ["Product", "TensorWork"],
    "qsim_core.sites.site": ["Site"],
    "qsim_core.testing": [name for name in testing.__all__ if name.endswith("Suite")],
    "qsim_core.transforms.blocks": ["Block"],
    "qsim_core.transforms.context": ["MatmulWeight"],
    "qsim_core.transforms.offload": ["editing"],
    "qsim_transformers.pretrained": ["Pretrained"],
    "qsim_structure": [name for name in qsim_structure.__all__ if name != "Editing"],
    "qsim_structure.for_transforms": [
        "permute_group",
        "permute_rows",
        "permute_scores",
        "scale_group",
        "scale_pair",
        "structure_of",
        "trace_example",
    ],
}
"""Public names beside those of `qsim_core` itself: all that new plugins, the examples and the pages import."""


def first_party() -> qsim.Host:
    """A host of the plugins in plugins/."""
    host = qsim.Host(discover=False)
    for folder, groups in projects():
        for name, module in groups.get(GROUP, {}).items():
            host.register(imported(folder, module), name=name)
    return host


def projects() -> Iterator[tuple[Path, dict[str, Any]]]:
    """The folder of each plugin in plugins/, and its entry points by group."""
    for path in sorted((ROOT / "plugins").glob("*/pyproject.toml")):
        yield path.parent, tomllib.loads(path.read_text())["project"].get("entry-points", {})


def imported(folder: Path, module: str) -> Any:
    """A module of a plugin in plugins/."""
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(module)
    finally:
        sys.path.remove(str(folder))


def commands_of_plugins() -> dict[str, click.Command]:
    """Every command of a plugin in plugins/, by its name."""
    found = {}
    for folder, groups in projects():
        for name, target in groups.get(COMMANDS, {}).items():
            module, _, attribute = target.partition(":")
            found[name] = getattr(imported(folder, module), attribute)
    return found


def table(*rows: tuple[str, ...]) -> str:
    """A table in Markdown, its head first."""
    lines = [f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in row)}|" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"


def cell(text: str) -> str:
    """Text for a table, its stars and bars no markup; what stands in backticks keeps its stars."""
    parts = " ".join(text.split()).replace("|", "\\|").split("`")
    return "`".join(part if index % 2 else part.replace("*", "\\*") for index, part in enumerate(parts))


def code(text: str) -> str:
    return cell(f"`{text}`")


def paragraphs(thing: Any) -> str:
    return inspect.cleandoc(thing.__doc__ or "")


def sentence(thing: Any) -> str:
    """The first paragraph of a docstring in one line."""
    return " ".join(paragraphs(thing).partition("\n\n")[0].split())


CLI = """# The command line

{written}
| environment | |
|---|---|
| `NO_COLOR` | set to anything: no colours, no bold, no dim |
| `QSIM_CACHE` | the folder of `qsim cache`: kernels, tokens, the zoo's models; by default `qsim` in the user's cache |
| `QSIM_NATIVE=0` | Python quantizes everything: no kernel is compiled, for the CPU or for a GPU |
| `HF_HUB_OFFLINE=1` | no hub is asked for models or data |

Answers go to standard output; progress, warnings and errors to standard error. Progress is shown on a terminal only,
and nothing that is not a terminal is sent an escape code.

| exit code | meaning |
|---|---|
| 0 | the answer was given |
| 1 | something you can put right, said in one line; of `qsim plugins --check`: a plugin fails |
| 2 | the command was misused; of `qsim` alone: nothing was asked |
| 130 | interrupted; nothing was written |

Shells complete commands, options, plugins and files. Components and models are not completed: only importing every
plugin, which takes seconds, would tell their names.

```text
eval "$(_QSIM_COMPLETE=bash_source qsim)"          # in ~/.bashrc
eval "$(_QSIM_COMPLETE=zsh_source qsim)"           # in ~/.zshrc
_QSIM_COMPLETE=fish_source qsim | source           # in ~/.config/fish/config.fish
```
"""


def cli() -> str:
    """Every command, argument and option, from the records of which `--help` is made."""
    parts = [CLI.format(written=WRITTEN), *(part for part in _command("qsim", main, None))]
    for name, command in sorted({**main.commands, **commands_of_plugins()}.items()):
        parts += _command(f"qsim {name}", command, click.Context(main, info_name="qsim", **main.context_settings))
    return "\n".join(parts)


def _command(name: str, command: click.Command, parent: click.Context | None) -> Iterator[str]:
    context = click.Context(command, info_name=name.split()[-1], parent=parent, **command.context_settings)
    yield f"## `{name}`\n"
    yield f"`{context.command_path} {' '.join(command.collect_usage_pieces(context))}`\n"
    yield f"{inspect.cleandoc(command.help or '').partition(chr(8))[0].strip()}\n"
    for heading, records in by_heading(command, context).items():
        yield table(
            ("option" if heading == LAST else heading, "meaning"),
            *((code(option), cell(meaning)) for option, meaning in records),
        )


KINDS = {
    "format": "Number formats",
    "quantizer": "Schemes",
    "calibrator": "Calibrators",
    "transform": "Transforms",
    "adapter": "Adapters",
    "evaluator": "Evaluators",
    "arithmetic": "Arithmetics",
    "operation": "Operations between products",
    "hardware": "Hardware",
}


def components() -> str:
    """Every component of the first-party plugins, with its options."""
    host = first_party()
    rows = [(described(host, plugin, offered), offered) for plugin, _, offered in catalogue(host)]
    parts = [
        f"# Components\n\n{WRITTEN}\n`qsim components` lists what is installed, `qsim components NAME` shows one. "
        "[recipes.md](recipes.md) says how they are written.\n"
    ]
    for kind, title in KINDS.items():
        parts.append(f"## {title}\n")
        of_kind = [(row, offered) for row, offered in rows if row["kind"] == kind]
        for plugin in dict.fromkeys(row["plugin"] for row, _ in of_kind):
            parts.append(f"### Of {_home(plugin)}\n")
            mine = [(row, offered) for row, offered in of_kind if row["plugin"] == plugin]
            for row, _ in (pair for pair in mine if not isinstance(pair[1], Preset)):
                parts += _component(row)
            presets = [row for row, offered in mine if isinstance(offered, Preset)]
            if presets:
                told = [(code(r["name"]), code(r["stands_for"]), cell(r["doc"])) for r in presets]
                parts.append(table(("preset", "short for", ""), *told))
    return "\n".join(parts)


def _home(plugin: str) -> str:
    return "the core" if plugin == "core" else f"[{plugin}](../plugins/{plugin}/README.md)"


def _component(row: dict[str, Any]) -> Iterator[str]:
    written = [o["name"] if o["required"] else f"{o['name']}={o['default']}" for o in row["options"]]
    yield f"#### `{row['name']}{'(' + ', '.join(written) + ')' if written else ''}`\n"
    yield f"{row['doc']}\n"
    if row["options"]:
        told = [
            (code(o["name"]), cell(o["type"]), "" if o["required"] else code(o["default"]), cell(o["doc"]))
            for o in row["options"]
        ]
        yield table(("option", "type", "default", "meaning"), *told)


def hooks() -> str:
    """Every hook with its exact signature, and the methods of its base class."""
    from qsim_core import hookspecs

    parts = [
        f"# The hooks\n\n{WRITTEN}\n{paragraphs(hookspecs)}\n\n[plugins.md](plugins.md) says how a plugin is written. "
        "The signatures of all that is handed over are in [api.md](api.md).\n"
    ]
    for hook in HOOKS:
        function, base = getattr(hookspecs, hook), base_of(hook)
        parts.append(f"## `{hook}{signature(function)}`\n\n{paragraphs(function)}\n\n{paragraphs(base)}\n")
        kinds = {False: "The method to write:\n", True: "With defaults:\n"}
        for has_default, title in kinds.items():
            mine = [m for m in _members(base) if (m not in base.__abstractmethods__) == has_default]
            rows = [(code(member(base, m)), cell(sentence(inspect.getattr_static(base, m)))) for m in mine]
            parts += [f"{title}\n{table(('method', ''), *rows)}"] if rows else []
    return "\n".join(parts)


MARK = "The mark of a hook: `@qsim.hookimpl` above the function."
API = """# Public names

{written}
What stands here is public: it changes with a line in the [changelog](../CHANGELOG.md) and not otherwise (a test says
so); any other name may change in any release. `import qsim_core as qsim` imports none of it: each name is imported when
it is used. [embedding.md](embedding.md) shows them at work, [plugins.md](plugins.md) what plugins make of them.
"""


def api() -> str:
    """Every public name with its signature, and a digest of them all."""
    parts = [API.format(written=WRITTEN)]
    for home, names in {"qsim_core": qsim.__all__, **FOR_AUTHORS}.items():
        module = importlib.import_module(home)
        parts.append(f"## `{home}`\n")
        for name in sorted(names):
            thing = getattr(module, name)
            parts.append(f"### `{name}`\n\n{MARK if name == 'hookimpl' else sentence(thing)}\n")
            parts.append("```pyi\n" + "\n".join(stub(name, thing)) + "\n```\n")
    return "\n".join(parts)


def digest() -> str:
    """Eight hexadecimal digits that stand for all public names and signatures, and not for what is said of them."""
    lines = []
    for home, names in {"qsim_core": qsim.__all__, **FOR_AUTHORS}.items():
        for name in sorted(names):
            lines += stub(f"{home}.{name}", getattr(importlib.import_module(home), name))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:8]


def stub(name: str, thing: Any) -> Iterator[str]:
    """A public name as a stub file would have it."""
    if name.endswith("hookimpl"):
        yield f"{name}: pluggy.HookimplMarker"
    elif not inspect.isclass(thing):
        if inspect.isgeneratorfunction(inspect.unwrap(thing)):
            yield "@contextlib.contextmanager"
        yield f"def {name}{signature(thing)}"
    else:
        bases = [base.__name__ for base in thing.__bases__ if base is not object and not base.__name__.startswith("_")]
        yield f"class {name}{'(' + ', '.join(bases) + ')' if bases else ''}:"
        body = [*_attributes(thing), *(member(thing, name) for name in _members(thing, own=True))]
        yield from (f"    {line}" for line in body or ["..."])


def signature(function: Any) -> str:
    """With annotations as they are written, which every module keeps as text."""
    told, star = [], False
    found = inspect.signature(function)
    for parameter in found.parameters.values():
        kind = parameter.kind
        if kind is kind.KEYWORD_ONLY and not star:
            told.append("*")
        star = star or kind in (kind.KEYWORD_ONLY, kind.VAR_POSITIONAL)
        annotation = "" if parameter.annotation is parameter.empty else f": {parameter.annotation}"
        default = "" if parameter.default is parameter.empty else f" = {_text(parameter.default)}"
        stars = {kind.VAR_POSITIONAL: "*", kind.VAR_KEYWORD: "**"}.get(kind, "")
        told.append(f"{stars}{parameter.name}{annotation}{default}")
    return f"({', '.join(told)}) -> {found.return_annotation}"


def _attributes(cls: type) -> Iterator[str]:
    """The annotations of the class itself (options, fields, class variables), and the attributes `__init__` sets."""
    for name, annotation in inspect.get_annotations(cls).items():
        if not name.startswith("_") and name != "model_config":
            yield f"{name}: {annotation}{_default(cls, name)}"
    if inspect.isfunction(vars(cls).get("__init__")) and not is_dataclass(cls):
        known = inspect.get_annotations(cls.__init__)  # type: ignore[misc]
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(cls.__init__)))):  # type: ignore[misc]
            if isinstance(node, ast.Assign | ast.AnnAssign):
                target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
                written = ast.unparse(node.annotation) if isinstance(node, ast.AnnAssign) else ""
                if isinstance(target, ast.Attribute) and not target.attr.startswith("_"):
                    yield f"{target.attr}: {written or known.get(target.attr, 'Any')}"


def _default(cls: type, name: str) -> str:
    if issubclass(cls, BaseModel) and name in cls.model_fields:
        default = cls.model_fields[name].get_default(call_default_factory=True)
        return "" if default is PydanticUndefined else f" = {_text(default)}"
    if is_dataclass(cls):
        (field,) = [f for f in fields(cls) if f.name == name]
        made = field.default if field.default_factory is MISSING else field.default_factory()
        return "" if made is MISSING else f" = {_text(made)}"
    return f" = {_text(vars(cls)[name])}" if name in vars(cls) else ""


def _text(value: Any) -> str:
    if callable(value) and hasattr(value, "__name__"):
        return str(value.__name__)
    written = str(value) if isinstance(value, qsim.Component) else repr(value)
    return "..." if " at 0x" in written else written


def _members(cls: type, own: bool = False) -> list[str]:
    """Public methods and properties, the class's own or all that are qsim's."""
    classes = (
        [cls] if own else [c for c in cls.__mro__ if c.__module__.startswith("qsim_core") and c is not qsim.Component]
    )
    names = [name for c in classes for name, value in vars(c).items() if _is_member(value) and not _hidden(c, name)]
    return list(dict.fromkeys(names))


def _hidden(cls: type, name: str) -> bool:
    made = name == "__init__" and (is_dataclass(cls) or getattr(cls, "_is_protocol", False) or cls in MADE_BY_QSIM)
    field = name in inspect.get_annotations(cls)
    private = name.startswith("_") and name not in {"__init__", "__call__", "__enter__", "__exit__"}
    return made or field or private or name.startswith("test_")


def _is_member(value: Any) -> bool:
    return inspect.isfunction(value) or isinstance(value, property | cached_property | classmethod | staticmethod)


def member(cls: type, name: str) -> str:
    """A method with its signature, or a property with its type."""
    found = inspect.getattr_static(cls, name)
    if isinstance(found, property | cached_property):
        getter = found.fget if isinstance(found, property) else found.func
        return f"{name}: {inspect.signature(getter).return_annotation}"  # type: ignore[arg-type]
    if isinstance(found, classmethod | staticmethod):
        return f"def {name}{signature(found.__func__)}"
    return f"def {name}{signature(found)}"


def pages() -> dict[str, str]:
    """Every page by its name, as it should be."""
    return {"cli.md": cli(), "components.md": components(), "hooks.md": hooks(), "api.md": api()}


if __name__ == "__main__":
    for page, text in pages().items():
        (ROOT / "docs" / page).write_text(text)
    print(f"the public names are {digest()}")
