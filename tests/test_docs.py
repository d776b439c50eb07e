"""README and docs say what is so: their Python runs, their commands run, their tables are complete."""

from __future__ import annotations

import doctest
import inspect
import re
import shlex
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

import qsim_core as qsim
from qsim_core import errors, hookspecs
from qsim_core.audit import Measured, SiteAudit
from qsim_core.bases import HOOK_BASES
from qsim_core.cli import main
from qsim_core.context import LayerReport
from qsim_core.result import CalibrationRecord, Intervals

ROOT = Path(__file__).parent.parent
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGES[page], re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_the_python_of_a_page_runs(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    namespace = {"__name__": "page"}
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), namespace)

    assert "qsim" in namespace


def test_examples_in_docstrings_are_right() -> None:
    outcome = doctest.testmod(errors)

    assert (outcome.failed, outcome.attempted) == (0, 2)


SHORT = "--limit 2 --steps 2 --batch-size 2 --calibration-samples 4"
QUICK = {"evaluate": ["--limit", "2"], "finetune": SHORT.split()}


@pytest.mark.parametrize("page", ["README.md", "docs/finetuning.md"])
def test_the_commands_of_a_page_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QSIM_CACHE", str(tmp_path / "cache"))
    commands = [shlex.split(line, comments=True) for block in blocks(page, "bash") for line in block.splitlines()]

    for program, *arguments in commands:
        assert program == "qsim"
        quick = QUICK.get(arguments[0], []) if "--from" not in arguments else []
        outcome = CliRunner().invoke(main, [*arguments, *quick])
        assert outcome.exit_code == 0, f"{arguments}: {outcome.output}"


def test_the_readme_has_the_two_commands() -> None:
    assert "    pip install -r requirements.txt && qsim evaluate --plugin abfp " in PAGES["README.md"]
    assert "    pip install tox && tox " in PAGES["README.md"]
    assert "pip install --quiet tox\ntox\n" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("block", blocks("docs/recipes.md", "yaml"))
def test_recipes_on_the_page_are_recipes(block: str) -> None:
    assert qsim.Recipe.from_yaml(block).to_yaml()
    assert set(yaml.safe_load(block)) <= set(qsim.Recipe.model_fields)


def test_every_key_of_a_recipe_is_explained() -> None:
    assert set(re.findall(r"^\| `(\w+)` \|", PAGES["docs/recipes.md"], re.MULTILINE)) >= set(qsim.Recipe.model_fields)


@pytest.mark.parametrize(
    "record", [qsim.Result, qsim.Audit, SiteAudit, Measured, LayerReport, CalibrationRecord, Intervals]
)
def test_every_key_of_a_result_is_explained(record: type) -> None:
    explained = set(re.findall(r"`(\w+)`", PAGES["docs/result.md"]))

    assert set(record.model_fields) - explained == set()  # type: ignore[attr-defined]


def test_every_hook_is_explained_with_its_base_class_and_method() -> None:
    hooks = [name for name, _ in inspect.getmembers(hookspecs, inspect.isfunction) if name.startswith("qsim_")]

    for hook in hooks:
        base = HOOK_BASES[hook]
        (method,) = base.__abstractmethods__  # type: ignore[attr-defined]
        arguments = ", ".join(list(inspect.signature(getattr(base, method)).parameters)[1:])
        assert f"| `{hook}()` | `{base.__name__}` | `{method}({arguments})` |" in PAGES["docs/plugins.md"]


def test_links_lead_somewhere() -> None:
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"
