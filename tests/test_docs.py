"""README and docs agree with the code: their Python runs, their commands run, their tables are complete."""

from __future__ import annotations

import contextlib
import doctest
import inspect
import re
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import click
import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import save_file

import qsim_core as qsim
from qsim_core import errors, files, hookspecs
from qsim_core.cli.main import main
from qsim_core.components.hook_validation import base_of
from qsim_core.evaluation.result import CalibrationRecord, Intervals
from qsim_core.simulation.audit import Measured, OperationAudit, SiteAudit, SumsAudit
from qsim_core.simulation.work import Product
from qsim_core.transforms.report import LayerReport

ROOT = Path(__file__).parent.parent
FILES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in FILES}
EMBEDDING = "docs/embedding.md"
"""Each block of this page is a program of its own. On other pages a block continues the block before it."""


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGES[page], re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python") and page != EMBEDDING])
def test_the_python_of_a_page_runs(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    namespace = {"__name__": "page"}
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec", dont_inherit=True), namespace)

    assert "qsim" in namespace


@pytest.mark.parametrize("title", re.findall(r"^## (.*)$", PAGES[EMBEDDING], re.MULTILINE))
def test_the_programs_of_an_embedder_run(title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (section,) = re.findall(
        rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", PAGES[EMBEDDING], flags=re.MULTILINE | re.DOTALL
    )
    (program,) = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)

    monkeypatch.chdir(tmp_path)
    if "sys.modules" in program:  # it looks at what it imports itself
        subprocess.run([sys.executable, "-c", program], check=True)
    else:
        exec(compile(program, title, "exec"), {"__name__": "program"})


def test_examples_in_docstrings_are_right() -> None:
    outcome = doctest.testmod(errors)

    assert (outcome.failed, outcome.attempted) == (0, 4)


WRITING = ("--json", "--work-dir", "--save-samples")
"""Options of evaluations that are carried out: later commands of a page may read what they write."""


def shortened(arguments: list[str]) -> list[str]:
    """Give a command of a page the options that make it short: few samples, or a dry run where nothing is written."""
    if arguments[0] not in ("evaluate", "finetune") or "--from" in arguments or "--dry-run" in arguments:
        return arguments
    if arguments[0] == "evaluate" and not set(WRITING) & set(arguments):
        return [*arguments, "--dry-run"]
    few = {"--limit": "2", "--calibration-samples": "4"}
    if arguments[0] == "finetune":
        few |= {"--steps": "2", "--batch-size": "2"}
    return [*arguments, *(part for option, value in few.items() if option not in arguments for part in (option, value))]


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A cache for the commands of all pages. It has what earlier tests have made: kernels and models take seconds."""
    folder = tmp_path_factory.mktemp("cache")
    qsim.parse("int8")
    for kind in ("plugins", "kernels", "docstrings", "tokens", "zoo"):
        with contextlib.suppress(FileNotFoundError):
            shutil.copytree(files.cache() / kind, folder / kind)
    return str(folder)


CHECKED_ELSEWHERE = ["plugins", "--check"]
"""A command that takes long, and that test_check.py runs."""


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "bash")])
def test_the_commands_of_a_page_run(page: str, cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QSIM_CACHE", cache)
    for name, text in re.findall(r"^`(\S+)`:\n\n```yaml\n(.*?)^```$", PAGES[page], re.MULTILINE | re.DOTALL):
        (tmp_path / name).write_text(text)
    commands = [shlex.split(line, comments=True) for block in blocks(page, "bash") for line in block.splitlines()]

    trained = False
    for program, *arguments in commands:
        assert program == "qsim"
        if (arguments[0] == "finetune" and trained) or arguments == CHECKED_ELSEWHERE:
            check_options(*arguments)
            continue
        outcome = CliRunner().invoke(main, shortened(arguments))
        assert outcome.exit_code == 0, f"{arguments}: {outcome.output}"
        trained = trained or arguments[0] == "finetune"


def check_options(name: str, *options: str) -> None:
    """Read the options of a command without running it: a page's first training runs, the others take as long."""
    with click.Context(main) as context:
        command = main.get_command(context, name)
        assert command is not None
        command.make_context(name, list(options))


LOCAL = {"facebook/opt-125m": "opt-tiny", "google-bert/bert-base-uncased": "bert-tiny", "google/vit-base-patch16-224": "vit-tiny",
         "Salesforce/codegen-350M-mono": "codegen-tiny", "Qwen/Qwen3-0.6B": "opt-tiny", "./my-pipeline": "ddpm-tiny",
         "./stable-diffusion": "opt-tiny", "openai-community/gpt2": "opt-tiny"}  # fmt: skip
"""Models of the hub, named by commands in READMEs of plugins -> a model of the zoo that takes the same options."""
INDENTED = {
    path.parent.name: re.findall(r"^    (qsim (?:.*\\\n)*.*)$", path.read_text(), re.MULTILINE)
    for path in sorted((ROOT / "plugins").glob("*/README.md"))
}


@pytest.mark.parametrize("plugin", [plugin for plugin, commands in INDENTED.items() if commands])
def test_the_commands_of_a_plugins_readme_run(
    plugin: str, cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run them in order on a model of the zoo and its data. A command that needs other data, or many images, is a dry run.

    A training, and the evaluation of what it writes, is not run: docs/finetuning.md has the same commands.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QSIM_CACHE", cache)
    save_file({"proj.weight": torch.randn(8, 64), "embed.weight": torch.randn(8, 64)}, "model.safetensors")

    for command in INDENTED[plugin]:
        arguments = [LOCAL.get(word, word) for word in shlex.split(command.replace("\\\n", " "), comments=True)[1:]]
        if arguments[0] == "finetune" or "DIR" in arguments:
            check_options(*arguments)
            continue
        foreign = {"--data", "lm_eval", "frechet"} & {word.partition("(")[0] for word in arguments}
        for option, word in pairwise(arguments):
            if foreign and option in ("--data", "--calibration-data") and Path(word).suffix:
                Path(word).touch()  # a dry run looks if the file is there
        outcome = CliRunner().invoke(main, [*arguments, "--dry-run"] if foreign else shortened(arguments))
        assert outcome.exit_code == 0, f"{command}: {outcome.output}"


def test_the_readme_has_the_two_commands() -> None:
    assert "    pip install -r requirements.txt && qsim evaluate --plugin abfp " in PAGES["README.md"]
    assert "    pip install tox && tox " in PAGES["README.md"]
    assert "pip install --quiet tox\ntox\n" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("block", blocks("docs/recipes.md", "yaml"))
def test_recipes_on_the_page_are_recipes(block: str) -> None:
    assert qsim.Recipe.from_yaml(block).to_yaml()
    assert set(yaml.safe_load(block)) <= {*qsim.Recipe.model_fields, "kv_cache"}


def test_every_key_of_a_recipe_is_explained() -> None:
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", PAGES["docs/recipes.md"], re.MULTILINE)

    assert {key for row in rows for key in re.findall(r"\w+", row)} >= set(qsim.Recipe.model_fields)


@pytest.mark.parametrize(
    "record",
    [
        qsim.Result,
        qsim.Audit,
        SiteAudit,
        SumsAudit,
        OperationAudit,
        Product,
        Measured,
        LayerReport,
        CalibrationRecord,
        Intervals,
        qsim.Cost,
    ],
)
def test_every_key_of_a_result_is_explained(record: type) -> None:
    explained = set(re.findall(r"`(\w+)`", PAGES["docs/result.md"]))

    assert set(record.model_fields) - explained == set()  # type: ignore[attr-defined]


def test_every_hook_is_explained_with_its_base_class_and_method() -> None:
    hooks = [name for name, _ in inspect.getmembers(hookspecs, inspect.isfunction) if name.startswith("qsim_")]

    for hook in hooks:
        base = base_of(hook)
        (method,) = base.__abstractmethods__  # type: ignore[attr-defined]
        arguments = ", ".join(list(inspect.signature(getattr(base, method)).parameters)[1:])
        assert f"| `{hook}()` | `{base.__name__}` | `{method}({arguments})` |" in PAGES["docs/plugins.md"]


@pytest.mark.parametrize("module", sorted((ROOT / "docs" / "examples").glob("*/*.py")), ids=lambda path: path.stem)
def test_an_example_stands_in_the_page_as_it_is(module: Path) -> None:
    assert module.read_text() in blocks("docs/plugins.md", "python")


def test_links_lead_somewhere() -> None:
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"


def test_every_page_is_listed() -> None:
    listed = {target.partition("#")[0] for target in re.findall(r"\]\(([^)]+)\)", PAGES["docs/index.md"])}

    assert listed == {Path(page).name for page in PAGES if page.startswith("docs/")} - {"index.md"} | {
        "../CONTRIBUTING.md"
    }
    assert "/docs/index.md)" in PAGES["README.md"]
    assert "/docs/getting-started.md)" in PAGES["README.md"]


def test_every_module_of_the_core_is_a_file_to_open() -> None:
    named = set(re.findall(r"\(\.\./qsim_core/(\w+\.py)\)", PAGES["docs/architecture.md"]))

    assert named == {path.name for path in (ROOT / "qsim_core").glob("*.py") if not path.name.startswith("__")}


def test_the_glossary_is_in_order() -> None:
    words = re.findall(r"^\| ([^|]+) \|", PAGES["docs/glossary.md"], re.MULTILINE)[1:]

    assert words == sorted(set(words), key=str.lower)


def test_contributors_are_told_of_every_class_of_checks() -> None:
    tox = (ROOT / "tox.ini").read_text()

    for check in ("ruff check .", "mypy", "pytest -n 2"):
        assert check in tox
        assert check in PAGES["CONTRIBUTING.md"]
