"""What must be fast imports little."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "numpy", "rich", "yaml", "qsim_int", "qsim_zoo")


def imported_by(program: str) -> set[str]:
    code = f"import sys\n{program}\nprint(' '.join(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["plugins"], ["plugins", "--json"], ["evaluate", "-h"], ["finetune", "-h"]]
)
def test_help_and_the_list_of_plugins_import_nothing_heavy(arguments: list[str]) -> None:
    modules = imported_by(f"from qsim_core.cli import main; main({arguments!r}, standalone_mode=False)")

    assert modules.isdisjoint(HEAVY)


def test_importing_the_core_imports_nothing_heavy() -> None:
    assert imported_by("import qsim_core; from qsim_core import hookimpl, Host").isdisjoint(HEAVY)


def test_looking_a_component_up_imports_no_transformers() -> None:
    assert imported_by("import qsim_core; qsim_core.parse('abfp(int4)')").isdisjoint({"transformers", "datasets"})


def test_every_public_name_is_there() -> None:
    import qsim_core

    assert all(getattr(qsim_core, name) is not None for name in qsim_core.__all__)
    assert set(qsim_core.__all__) <= set(dir(qsim_core))
    with pytest.raises(AttributeError, match="module 'qsim_core' has no attribute 'Quantiser'"):
        qsim_core.Quantiser  # noqa: B018
