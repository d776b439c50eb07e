"""Tasks by name, and the error messages for tasks that cannot be run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qsim_core as qsim


def data(tasks: str, directory: Path, options: str = "") -> qsim.Data:
    return qsim.parse(f"lm_eval({tasks}, include_path={json.dumps(str(directory))}{options})").default_data()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("text", "tasks"),
    [
        ("lm_eval(piqa)", ("piqa",)),
        ("lm_eval([piqa, arc_easy])", ("piqa", "arc_easy")),
        ("lm_eval(tasks='piqa, arc_easy')", ("piqa", "arc_easy")),
        ("lm_eval(['mmlu_*'])", ("mmlu_*",)),
    ],
)
def test_tasks_are_a_list_or_a_text_with_commas(text: str, tasks: tuple[str, ...]) -> None:
    evaluator = qsim.parse(text)

    assert evaluator.tasks == tasks
    assert qsim.parse(str(evaluator)) == evaluator


@pytest.mark.parametrize("text", ["lm_eval([])", "lm_eval('piqa,')"])
def test_no_task_is_an_error(text: str) -> None:
    with pytest.raises(qsim.SpecError, match=r"tasks: name a task, as in lm_eval\(\[piqa, arc_easy\]\)"):
        qsim.parse(text)


def test_a_directory_is_the_same_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    assert qsim.parse("lm_eval(piqa, include_path=mine)").include_path == tmp_path / "mine"


def test_a_pattern_is_all_tasks_that_fit(ends: Callable[..., Path]) -> None:
    ends("ends_b")
    ends("other")

    found = data("'ends_*'", ends("ends_a"))

    assert list(found.content.tasks) == ["ends_a", "ends_b"]
    assert found.name == "ends_a (version 1.5, 0-shot), ends_b (version 1.5, 0-shot)"


def test_a_task_shows_no_examples_if_it_says_so(ends: Callable[..., Path]) -> None:
    ends("none", num_fewshot=0)
    ends("three", num_fewshot=3)

    assert data("[none, three]", ends("any")).name == "none (version 1.5, 0-shot), three (version 1.5, 3-shot)"
    assert data("[none, three]", ends("any"), ", num_fewshot=1").name.endswith("three (version 1.5, 1-shot)")
    assert data("none", ends("any"), ", num_fewshot=1").name == "none (version 1.5, 0-shot)"


def test_the_fingerprint_is_of_documents_prompts_and_versions(ends: Callable[..., Path], tmp_path: Path) -> None:
    first = data("ends", ends()).sha256

    assert data("ends", ends()).sha256 == first
    assert data("ends", ends(count=7)).sha256 != first
    assert data("ends", ends(doc_to_text="Q: {{start}}")).sha256 != first
    assert data("ends", ends(metadata={"version": 2.0})).sha256 != first
    assert data("ends", ends(), ", num_fewshot=1").sha256 != first


@pytest.mark.slow  # the harness reads each of its tasks
def test_an_unknown_task_is_told_with_what_is_like_it(ends: Callable[..., Path]) -> None:
    with pytest.raises(qsim.DataError, match=r"^lm_eval has no task 'piqaa'; did you mean 'piqa'\? There are \d{4,}"):
        data("[ends, piqaa]", ends())


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(qsim.DataError, match=r"^lm_eval finds no directory /.*/nowhere$"):
        data("ends", tmp_path / "nowhere")


def test_documents_that_are_not_there(ends: Callable[..., Path]) -> None:
    directory = ends()
    (directory / "ends.jsonl").unlink()

    with pytest.raises(qsim.DataError, match=r"^lm_eval cannot load ends: FileNotFoundError: [^\n]*ends.jsonl[^\n]*$"):
        data("ends", directory)


def test_a_data_set_of_the_hub_without_a_network(ends: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    with pytest.raises(qsim.DataError, match=r"^lm_eval cannot load ends: ConnectionError: [^\n]*no/such"):
        data("ends", ends(dataset_path="no/such", dataset_kwargs={}))


def test_a_prompt_that_does_not_fit_the_documents(ends: Callable[..., Path]) -> None:
    with pytest.raises(qsim.DataError, match=r"^lm_eval cannot load ends: UndefinedError: 'begin' is undefined$"):
        data("ends", ends(doc_to_text="{{begin}}"))


def test_more_examples_than_there_are_documents(ends: Callable[..., Path]) -> None:
    with pytest.raises(qsim.DataError, match=r"^lm_eval cannot ask ends: ValueError: [^\n]*$"):
        data("ends", ends(count=3), ", num_fewshot=9")


def test_code_that_a_model_writes_is_not_run(ends: Callable[..., Path]) -> None:
    with pytest.raises(
        qsim.DataError, match="^ends runs code that the model has written; lm_eval does not run such tasks"
    ):
        data("ends", ends(unsafe_code=True))


def test_an_answer_longer_than_the_model_takes(loaded: Any, ends: Callable[..., Path]) -> None:
    directory = ends(
        output_type="generate_until", doc_to_choice=None, generation_kwargs={"max_gen_toks": 256, "until": ["."]},
        metric_list=[{"metric": "exact_match"}],
    )  # fmt: skip
    evaluator = qsim.parse(f"lm_eval(ends, include_path={json.dumps(str(directory))})")

    with pytest.raises(qsim.DataError, match=r"^lm-evaluation-harness: Invalid configuration: requested max tokens"):
        evaluator.evaluate(loaded, evaluator.default_data(), qsim.Run())
