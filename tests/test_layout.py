"""The rules of the tree: parts of a plugin, names, versions, imports."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import qsim_core

ROOT = Path(__file__).parent.parent
PLUGINS = sorted(path.name for path in (ROOT / "plugins").iterdir() if (path / "pyproject.toml").exists())
TOP = {"qsim_core", "plugins", "tests", "docs", "benchmarks", ".ci"}
HEAVY = ["lm_eval"]
"""Plugins that require many distributions. Only the tests, and users who ask for them, install them."""
LIBRARIES = {"cache", "structure", "transformers"}
"""Distributions that other plugins may import, if they declare them."""
WITHOUT_CORE = {"structure"}
"""Libraries that need no qsim-core, and have no hooks."""
WITH_CORE = {"structure": {"for_transforms.py", "command.py"}}
"""The modules of such a library that are for qsim, and import its core."""
VAGUE = {"utils", "util", "helpers", "common", "misc"}
SAY_NOTHING = {
    *("apart", "fixed", "forms", "named", "remember", "scratch", "trial", "running", "compose", "checking"),
    *("contract", "bases", "products"),
}
"""Names that modules had in early versions. Each was a word of a sentence, and not the field's term for its content."""


def project(plugin: str) -> dict[str, object]:
    with (ROOT / "plugins" / plugin / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)


def module(plugin: str) -> Path:
    single = ROOT / "plugins" / plugin / f"qsim_{plugin}.py"
    return single if single.exists() else ROOT / "plugins" / plugin / f"qsim_{plugin}" / "__init__.py"


def sources(folder: str) -> list[Path]:
    return [p for p in (ROOT / folder).rglob("*.py") if "build" not in p.parts and "tests" not in p.parts]


def test_the_first_plugins_are_there() -> None:
    assert set(PLUGINS) >= {"abfp", "evaluators", "fp", "int", "opt", "zoo"}


@pytest.mark.parametrize("plugin", PLUGINS)
def test_a_plugin_has_its_four_parts(plugin: str) -> None:
    folder = ROOT / "plugins" / plugin

    assert module(plugin).exists()
    assert (folder / "README.md").read_text().startswith(f"# qsim-{plugin}\n")
    assert list((folder / "tests").glob("test_*.py"))


@pytest.mark.parametrize("folder", [".", *(f"plugins/{plugin}" for plugin in PLUGINS)])
def test_a_distribution_can_be_published(folder: str) -> None:
    """An index shows its page alone: with the licence, the authors, and links that lead into the repository."""
    table = tomllib.loads((ROOT / folder / "pyproject.toml").read_text())["project"]
    repository = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Source"]

    assert (table["license"], table["license-files"], table["authors"]) == (
        "Apache-2.0",
        ["LICENSE"],
        [{"name": "The qsim developers"}],
    )
    assert (ROOT / folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert table["classifiers"]
    assert all(url.startswith(repository) for url in table["urls"].values())
    for target in re.findall(r"\]\(([^)]+)\)", (ROOT / folder / "README.md").read_text()):
        assert target.startswith(("https://", "#")), target
        inside = target.removeprefix(f"{repository}/blob/main/").partition("#")[0]
        assert inside.startswith("http") or not inside or (ROOT / inside).exists(), target


@pytest.mark.parametrize("plugin", PLUGINS)
def test_a_plugins_directory_distribution_and_entry_point_have_one_name(plugin: str) -> None:
    table: Any = project(plugin)["project"]
    groups = table["entry-points"]

    assert (table["name"], table["readme"]) == (f"qsim-{plugin}", "README.md")
    assert groups.get("qsim", {plugin: f"qsim_{plugin}"}) == {plugin: f"qsim_{plugin}"}
    assert groups and set(groups) <= {"qsim", "qsim.commands", "qsim.functions", "qsim.accelerators"}
    assert all(re.match(rf"qsim_{plugin}[.:]|qsim_{plugin}$", to) for group in groups.values() for to in group.values())


@pytest.mark.parametrize("plugin", PLUGINS)
def test_first_party_packages_share_one_version_and_a_range_of_the_core(plugin: str) -> None:
    table = project(plugin)["project"]
    major, minor, _ = qsim_core.__version__.split(".")
    first_party = [d for d in table["dependencies"] if d.startswith("qsim-")]  # type: ignore[index]

    assert table["version"] == qsim_core.__version__  # type: ignore[index]
    core = f"qsim-core>={major}.{minor},<{major}.{int(minor) + 1}"
    assert (core in first_party) is (plugin not in WITHOUT_CORE)
    assert all(re.fullmatch(r"qsim-\w+>=\d+\.\d+,<\d+\.\d+", dependency) for dependency in first_party)


def test_the_core_has_that_version_too() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        assert tomllib.load(file)["project"]["version"] == qsim_core.__version__


def test_every_plugin_is_in_tox_and_in_the_requirements() -> None:
    tox = (ROOT / "tox.ini").read_text()
    requirements = {name: (ROOT / name).read_text() for name in ("requirements.txt", "requirements-dev.txt")}
    installed = {name: re.findall(r"^-e \./plugins/(\w+)$", text, re.MULTILINE) for name, text in requirements.items()}

    assert re.search(r"^ +plugins = (.*)$", tox, re.MULTILINE).group(1).split(", ") == PLUGINS  # type: ignore[union-attr]
    assert installed["requirements.txt"] == [plugin for plugin in PLUGINS if plugin not in HEAVY]
    assert installed["requirements-dev.txt"] == HEAVY


@pytest.mark.parametrize("folder", [".", *(f"plugins/{plugin}" for plugin in PLUGINS)])
def test_no_distribution_is_required_twice(folder: str) -> None:
    table = tomllib.loads((ROOT / folder / "pyproject.toml").read_text())["project"]
    lists = {"dependencies": table.get("dependencies", []), **table.get("optional-dependencies", {})}

    names = [(kind, re.split(r"[^\w.-]", text)[0].lower()) for kind, texts in lists.items() for text in texts]
    assert [name for name in names if names.count(name) > 1] == []


def test_no_plugin_is_listed_twice() -> None:
    """The lists of tox.ini and the requirements are compared with the plugins by the test above."""
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())
    everything = options["project"]["optional-dependencies"]["all"]
    paths = options["tool"]["mypy"]["mypy_path"].split(":")

    assert everything == [f"qsim-{plugin}" for plugin in PLUGINS]
    assert paths == [f"plugins/{plugin}" for plugin in PLUGINS]


def test_torch_is_pinned_where_it_is_installed() -> None:
    assert "\ntorch==2.13.0\n" in (ROOT / "requirements.txt").read_text()
    assert "    torch==2.13.0\n" in (ROOT / "tox.ini").read_text()


def test_the_lowest_torch_is_tested() -> None:
    (lowest,) = [
        d for d in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"] if "torch" in d
    ]

    assert f"\n{lowest}\n" in (ROOT / "requirements-lowest.txt").read_text()


@pytest.mark.parametrize("plugin", PLUGINS)
def test_a_plugin_imports_the_core_and_libraries_that_it_declares_and_no_other_plugin(plugin: str) -> None:
    imported = {
        name
        for path in sources(f"plugins/{plugin}")
        for name in re.findall(r"^\s*(?:from|import) (qsim_\w+)", path.read_text(), re.MULTILINE)
    }

    declared = {re.split(r"[^\w-]", d)[0] for d in project(plugin)["project"]["dependencies"]}  # type: ignore[index]
    assert imported <= {"qsim_core", f"qsim_{plugin}", *(f"qsim_{n}" for n in LIBRARIES if f"qsim-{n}" in declared)}


@pytest.mark.parametrize("library", WITHOUT_CORE)
def test_a_library_imports_the_core_only_in_its_modules_for_qsim(library: str) -> None:
    importing = {path.name for path in sources(f"plugins/{library}") if "qsim_core" in path.read_text()}

    assert importing == WITH_CORE[library]


def test_the_core_imports_no_plugin() -> None:
    text = "\n".join(path.read_text() for path in sources("qsim_core"))

    assert set(re.findall(r"^\s*(?:from|import) (qsim_\w+)", text, re.MULTILINE)) == {"qsim_core"}


ENGLISH = {
    "cache",
    "calibrators",
    "diffusion",
    "evaluators",
    "fast",
    "finetune",
    "hardware",
    "int",
    "rounding",
    "structure",
    "study",
    "transformers",
}
"""Plugins whose names are words that the core needs too. They are looked for with what makes a name of them."""


def literals(path: Path) -> Iterator[str]:
    """The texts in a module; docstrings only of the command line, which prints them."""
    tree = ast.parse(path.read_text())
    statements = [
        node for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    ]
    docstrings = set() if "cli" in path.parts else {id(statement.value) for statement in statements}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def test_the_core_names_no_plugin() -> None:
    words = [rf"\b{name}\b" for name in PLUGINS if name not in ENGLISH]
    names = [rf"\b{name}\.\w|--plugin {name}\b|\bqsim-{name}\b" for name in PLUGINS if name in ENGLISH]
    named = re.compile("|".join([*words, *names]))
    modules = [path for path in sources("qsim_core") if path.name != "moved.py"]  # it says where modules of 0.1 are now

    assert [(path.name, text) for path in modules for text in literals(path) if named.search(text)] == []


def test_modules_hold_one_idea_and_say_which() -> None:
    modules = [*sources("qsim_core"), *sources("plugins")]

    assert [path.name for path in modules if not path.read_text().startswith('"""')] == []
    assert not (VAGUE | SAY_NOTHING) & {path.stem for path in modules}


def test_test_files_have_names_of_their_own() -> None:
    paths = [path for folder in ("tests", "plugins", "docs") for path in (ROOT / folder).rglob("test_*.py")]
    names = [path.name for path in paths if "plugins_0_1" not in path.parts]

    assert len(names) == len(set(names))


def test_what_is_committed_of_the_zoo_is_small() -> None:
    models = ROOT / "plugins" / "zoo" / "qsim_zoo" / "models"

    assert sum(path.stat().st_size for path in models.rglob("*") if path.is_file()) <= 40 * 2**20
