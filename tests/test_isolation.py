"""The core needs no plugin, and a plugin needs only its declared distributions. As wheels each works alone."""

from __future__ import annotations

import compileall
import contextlib
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Callable, Collection, Iterator
from importlib.metadata import distribution, packages_distributions
from pathlib import Path
from typing import Any

import pytest
from wheels import build, unpack

ROOT = Path(__file__).parent.parent
PLUGINS = sorted(path.name for path in (ROOT / "plugins").iterdir() if (path / "pyproject.toml").exists())


def declared(name: str) -> set[str]:
    """A distribution and everything that it requires, directly and indirectly."""
    found: set[str] = set()
    queue = [name]
    while queue:
        current = re.sub(r"[-_.]+", "-", queue.pop()).lower()
        if current in found:
            continue
        try:
            requirements = distribution(current).requires or []
        except ModuleNotFoundError:  # the marker of this dependency does not hold here
            continue
        found.add(current)
        queue += [re.match(r"[\w.-]+", r).group() for r in requirements if "extra ==" not in r]  # type: ignore[union-attr]
    return found


def source_of(name: str) -> Path:
    return ROOT if name == "qsim-core" else ROOT / "plugins" / plugin_of(name)


def plugin_of(distribution: str) -> str:
    return distribution.removeprefix("qsim-").replace("-", "_")


@pytest.fixture(scope="session")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, because a build leaves files behind."""
    target = tmp_path_factory.mktemp("sources")
    ignore = shutil.ignore_patterns(".git", ".tox", ".ci-env", "build", "*.egg-info", "__pycache__", ".*_cache")
    for name in ("qsim_core", "plugins", "pyproject.toml", "README.md", "LICENSE"):
        source = ROOT / name
        shutil.copytree(source, target / name, ignore=ignore) if source.is_dir() else shutil.copy(source, target)
    return target


@pytest.fixture(scope="session")
def install(copied: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`install("qsim-abfp")`: the content of its wheel in a directory. All wheels are built at once, by their backend."""
    installed: dict[str, Path] = {}
    wheels = tmp_path_factory.mktemp("wheels")
    sources = [copied, *(copied / "plugins" / plugin for plugin in PLUGINS)]
    build(sources, wheels)

    def into_directory(name: str) -> Path:
        if name not in installed:
            wheel = wheels.glob(f"{name.replace('-', '_')}-*.whl")
            installed[name] = unpack(wheel, tmp_path_factory.mktemp(name))
            compileall.compile_dir(installed[name], quiet=2)
        return installed[name]

    return into_directory


def third_party(names: set[str], target: Path) -> Path:
    """Make a directory that holds only these distributions of this environment."""
    target.mkdir()
    site = Path(str(distribution("torch").locate_file("")))
    tops = [
        top for top, owners in packages_distributions().items() if {o.lower().replace("_", "-") for o in owners} & names
    ]
    infos = [Path(str(distribution(n)._path)).name for n in names]  # type: ignore[attr-defined]
    singles = [path.name for path in site.glob("*.so")]
    for entry in {*tops, *infos, *(f"{top}.py" for top in tops), *singles}:
        if (site / entry).exists():
            (target / entry).symlink_to(site / entry)
    return target


PROGRAM = """
import qsim_core as qsim
host = qsim.Host()
assert host.check() == {}, host.check()
for offers in host.offers().values():
    for offer in offers:
        offer.text and host.parse(f"{offer.plugin}.{offer.name}")
print(",".join(host.plugins))
"""


LIBRARY = """
import {module}
assert [name for name in {module}.__all__ if not hasattr({module}, name)] == []
"""
"""A program for a distribution that needs no qsim-core."""


def plugins_among(names: set[str]) -> set[str]:
    """The plugins among first-party distributions: those whose metadata names one."""
    tables = {n: tomllib.loads((source_of(n) / "pyproject.toml").read_text())["project"] for n in names - {"qsim-core"}}
    return {plugin for table in tables.values() for plugin in table["entry-points"].get("qsim", {})}


SERVER = """
import importlib, json, os, sys

for library in sys.argv[1:]:
    importlib.import_module(library)
sys.executable = ""  # a program imports plugins itself: in another Python it would import the libraries again
for line in sys.stdin:
    program, path = json.loads(line)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        sys.path[:0] = path
        exec(program, {})
        sys.stdout.flush()
        os._exit(0)
    os.close(writing)
    with open(reading) as printed:
        text = printed.read()
    print(json.dumps([os.waitpid(child, 0)[1], text]), flush=True)
"""
"""Runs each program in a child process, so that libraries are imported once. A traceback ends the child with status 1."""
OF_THE_CORE = ["torch", "click", "pluggy", "pydantic", "rich", "yaml"]
OF_FAMILIES = ["transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto"]


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """`run(program, path, names)`: the exit status and the text of a program that finds only torch and what is in `path`.

    Libraries among the third-party distributions `names` may have been imported before.
    """
    with contextlib.ExitStack() as servers:

        @functools.cache
        def server(library: str) -> Any:
            directory = tmp_path_factory.mktemp("server")
            names = declared("qsim-core") | (declared(library) if library else set())
            environment = {
                "PYTHONPATH": str(third_party(names - {"qsim-core"}, directory / "third-party")),
                "PATH": os.environ["PATH"],
                "HOME": str(directory),
            }
            libraries = [*OF_THE_CORE, *(OF_FAMILIES if library else ())]
            command = [sys.executable, "-S", "-B", "-c", SERVER, *libraries]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            started = subprocess.Popen(command, text=True, env=environment, cwd=directory, **pipes)  # type: ignore[call-overload]
            return servers.enter_context(started)

        def answer(program: str, path: list[Path], names: Collection[str] = ()) -> Any:
            asked = server("transformers" if "transformers" in names else "")
            asked.stdin.write(json.dumps([program, list(map(str, path))]) + "\n")
            asked.stdin.flush()
            return json.loads(asked.stdout.readline())

        yield answer


QUICK = {
    "qsim-core",
    "qsim-abfp",
    "qsim-fast",
    "qsim-interop",
    "qsim-structure",
    "qsim-study",
    "qsim-transformers",
    "qsim-zoo",
}
"""Distributions of each kind. test_layout.py compares the imports of the others with what they declare."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in ("qsim-core", *(f"qsim-{plugin}" for plugin in PLUGINS))
    ],
)
def test_a_distribution_works_with_what_it_declares_and_nothing_else(
    name: str, install: Callable[[str], Path], run: Callable[..., Any], tmp_path: Path
) -> None:
    names = declared(name)
    ours = {n for n in names if n.startswith("qsim-")}
    path = [install(own) for own in sorted(ours)] + [third_party(names - ours, tmp_path / "third-party")]

    program = PROGRAM if "qsim-core" in ours else LIBRARY.format(module=name.replace("-", "_"))
    status, printed = run(program, path, names)

    assert status == 0, printed
    if "qsim-core" in ours:
        assert printed.strip().split(",") == sorted({"core"} | plugins_among(ours))


def test_what_is_not_declared_is_not_found(install: Callable[[str], Path], run: Callable[..., Any]) -> None:
    status, printed = run("import qsim_core, transformers", [install("qsim-core")])

    assert (status != 0, printed.splitlines()[-1]) == (True, "ModuleNotFoundError: No module named 'transformers'")


@pytest.mark.parametrize(
    ("asked", "purpose"),
    [
        ("Run(work_dir='work').store", "keeps the work directory work"),
        (
            "simulate(torch.nn.Linear(2, 2), {'operations': {'relu': {'output': 'none'}}})",
            "computes operations between products",
        ),
    ],
)
def test_the_core_alone_says_what_a_plugin_does(
    asked: str, purpose: str, install: Callable[[str], Path], run: Callable[..., Any]
) -> None:
    status, printed = run(f"import qsim_core, torch; qsim_core.{asked}", [install("qsim-core")])

    assert (status != 0, printed.splitlines()[-1].partition(": ")[2]) == (
        True,
        f"no plugin {purpose}; pip install 'qsim-core[all]'",
    )


@pytest.mark.parametrize("name", ["qsim-core", *(f"qsim-{plugin}" for plugin in PLUGINS)])
def test_a_wheel_carries_the_licence(name: str, install: Callable[[str], Path]) -> None:
    (carried,) = install(name).glob("*.dist-info/licenses/LICENSE")

    assert carried.read_bytes() == (ROOT / "LICENSE").read_bytes()


@pytest.mark.parametrize("folder", [".", "plugins/abfp"])
def test_a_source_distribution_carries_the_licence(folder: str, copied: Path, tmp_path: Path) -> None:
    build([copied / folder], tmp_path, kind="sdist")
    (archive,) = tmp_path.glob("*.tar.gz")

    with tarfile.open(archive) as source:
        carried = [
            member for member in source.getmembers() if member.name.count("/") == 1 and member.name.endswith("LICENSE")
        ]
        assert [source.extractfile(one).read() for one in carried] == [(ROOT / "LICENSE").read_bytes()]  # type: ignore[union-attr]


def test_the_zoos_distribution_carries_its_models(install: Callable[[str], Path]) -> None:
    models = install("qsim-zoo") / "qsim_zoo" / "models" / "opt-tiny"

    assert {path.name for path in models.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}


def test_the_command_runs_from_wheels_alone(install: Callable[[str], Path], tmp_path: Path) -> None:
    names = declared("qsim-abfp") | declared("qsim-listing")
    ours = {name for name in names if name.startswith("qsim-")}
    path = [*map(install, sorted(ours)), third_party(names - ours, tmp_path / "third-party")]
    environment = {"PYTHONPATH": os.pathsep.join(map(str, path)), "PATH": os.environ["PATH"], "HOME": str(tmp_path)}

    command = [sys.executable, "-S", "-B", "-m", "qsim_core", "components", "abfp"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)

    assert run.stdout.startswith("abfp(element=int4, n=64, scale=bf16, "), run.stderr
