"""The core needs no plugin, and a plugin needs only its declared distributions. As wheels each works alone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest

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
    for name in ("qsim_core", "plugins", "pyproject.toml", "README.md"):
        source = ROOT / name
        shutil.copytree(source, target / name, ignore=ignore) if source.is_dir() else shutil.copy(source, target)
    return target


@pytest.fixture(scope="session")
def install(copied: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`install("qsim-abfp")`: `pip install --no-deps --target DIR`, once for each distribution."""
    installed: dict[str, Path] = {}

    def into_directory(name: str) -> Path:
        if name not in installed:
            installed[name] = tmp_path_factory.mktemp(name)
            source = copied / source_of(name).relative_to(ROOT)
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
            subprocess.run([*command, "--target", str(installed[name]), str(source)], check=True)
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
assert host.verify() == {}, host.verify()
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


@pytest.mark.parametrize("name", ["qsim-core", *(f"qsim-{plugin}" for plugin in PLUGINS)])
def test_a_distribution_works_with_what_it_declares_and_nothing_else(
    name: str, install: Callable[[str], Path], tmp_path: Path
) -> None:
    names = declared(name)
    ours = {n for n in names if n.startswith("qsim-")}
    path = [install(own) for own in sorted(ours)] + [third_party(names - ours, tmp_path / "third-party")]
    environment = {"PYTHONPATH": os.pathsep.join(map(str, path)), "PATH": os.environ["PATH"], "HOME": str(tmp_path)}

    program = PROGRAM if "qsim-core" in ours else LIBRARY.format(module=name.replace("-", "_"))
    run = subprocess.run(
        [sys.executable, "-S", "-B", "-c", program], capture_output=True, text=True, env=environment, cwd=tmp_path
    )

    assert run.returncode == 0, run.stderr
    if "qsim-core" in ours:
        assert run.stdout.strip().split(",") == sorted({"core"} | plugins_among(ours))


def test_the_zoos_distribution_carries_its_models(install: Callable[[str], Path]) -> None:
    models = install("qsim-zoo") / "qsim_zoo" / "models" / "opt-tiny"

    assert {path.name for path in models.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}


def test_int_fp_and_abfp_as_wheels_beside_the_core_make_abfp_work(copied: Path, tmp_path: Path) -> None:
    """A separate environment: torch, the core, three plugins, and their requirements."""
    wheels = tmp_path / "wheels"
    sources = [copied, *(copied / "plugins" / name for name in ("int", "fp", "abfp"))]
    pip = [sys.executable, "-m", "pip"]
    build = [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels)]
    subprocess.run([*build, *map(str, sources)], check=True)
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "env")], check=True)
    python = tmp_path / "env" / "bin" / "python"
    files = sorted(map(str, wheels.glob("*.whl")))
    subprocess.run([python, "-m", "pip", "install", "--quiet", "torch==2.13.0", *files], check=True)
    program = (
        "import torch, qsim_core as q; x = torch.linspace(-1, 1, 128); "
        "print(q.parse('abfp(int4, n=64)')(x).unique().numel(), sorted(q.Host().plugins))"
    )

    run = subprocess.run([python, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    command = subprocess.run([tmp_path / "env/bin/qsim", "components", "abfp"], capture_output=True, text=True)

    assert run.returncode == 0, run.stderr
    assert run.stdout.split(maxsplit=1)[1] == "['abfp', 'core', 'fp', 'int']\n"
    assert command.stdout.startswith("abfp(element=int4, n=64, scale=bf16, ")
