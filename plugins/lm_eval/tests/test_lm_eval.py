"""The harness's numbers against plain torch, qsim's own perplexity, and the harness's own results."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import qsim_core as qsim
from qsim_core.cli.main import main
from qsim_core.evaluation.metrics import intervals
from qsim_core.testing import EvaluatorSuite

PAGE = "Return a list of all the names that are defined in the module, sorted.\nA file is closed when it is deleted. "
PAIRS = [("The function", " returns a list"), ("The", " end"), ("", "Return the name"), ("A file is ", "closed")]


def evaluator(tasks: str, directory: Path, options: str = "") -> Any:
    return qsim.parse(f"lm_eval({tasks}, include_path={json.dumps(str(directory))}{options})")


def measure(loaded: Any, tasks: str, directory: Path, options: str = "", **run: Any) -> Any:
    found = evaluator(tasks, directory, options)
    return found.evaluate(loaded, found.default_data(), qsim.Run(**run))


def by_hand(loaded: Any, context: str, continuation: str) -> float:
    """Compute the log-likelihood of a continuation, token by token."""
    end = len(context.rstrip())
    prefix = loaded.tokenizer(context[:end]).input_ids if end else [loaded.tokenizer.eos_token_id]
    ids = loaded.tokenizer(context + continuation).input_ids
    ids = ids if end else prefix + ids
    with torch.no_grad():
        logs = loaded.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(logs[place - 1, ids[place]].item() for place in range(len(prefix), len(ids)))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_log_likelihood_is_what_torch_computes(loaded: Any, batch_size: int) -> None:
    from lm_eval.api.instance import Instance
    from qsim_lm_eval.language_model import InMemory

    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(PAIRS)]

    found = InMemory(loaded, qsim.Run(batch_size=batch_size), None).loglikelihood(requests)

    assert [value for value, _ in found] == pytest.approx([by_hand(loaded, *pair) for pair in PAIRS], rel=1e-5)


def test_a_choice_is_the_likeliest_one_also_by_its_length(loaded: Any, ends: Callable[..., Path]) -> None:
    found = measure(loaded, "ends", ends(count=6))

    plain, normed = [], []
    for n in range(6):
        logs = {e: by_hand(loaded, f"The function returns {n}", f" {e}") for e in ("when called.", "a list of names")}
        right = list(logs)[n % 2]
        plain.append(max(logs, key=lambda e: logs[e]) == right)
        normed.append(max(logs, key=lambda e: logs[e] / len(e)) == right)
    assert found == {"ends/acc": sum(plain) / 6, "ends/acc_norm": sum(normed) / 6, "documents": 6}


def test_word_perplexity_is_that_of_qsims_own_windows(loaded: Any, write: Callable[..., Path]) -> None:
    """An input of 31 tokens and the token before it predict 31 tokens; so do windows of 32 tokens with stride 31."""
    ids = loaded.tokenizer(PAGE * 10).input_ids[: 31 * 5]
    text, metrics = loaded.tokenizer.decode(ids), ("word_perplexity", "byte_perplexity", "bits_per_byte")
    assert loaded.tokenizer(text).input_ids == ids
    directory = write(
        "page",
        [{"page": text}],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{page}}",
        metric_list=[{"metric": metric} for metric in metrics],
    )
    begun = SimpleNamespace(input_ids=[loaded.tokenizer.eos_token_id, *ids])
    own = qsim.parse("perplexity(32, stride=31)").evaluate(
        qsim.LoadedModel(loaded.model, lambda text, verbose: begun), qsim.Data.of_text("page", text), qsim.Run()
    )

    found = measure(loaded, "page", directory, ", max_length=31")

    assert own["tokens"] == len(ids)
    nll, words, letters = own["nll"] * len(ids), len(text.split()), len(text.encode())
    assert found["page/word_perplexity"] == pytest.approx(math.exp(nll / words), rel=1e-5)
    assert found["page/byte_perplexity"] == pytest.approx(math.exp(nll / letters), rel=1e-5)
    assert found["page/bits_per_byte"] == pytest.approx(nll / letters / math.log(2), rel=1e-5)


def test_what_is_generated_is_compared_and_a_corpus_score_has_no_interval(
    loaded: Any, write: Callable[..., Path]
) -> None:
    ids = loaded.tokenizer("The function returns", return_tensors="pt").input_ids
    said = loaded.tokenizer.decode(loaded.model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :])
    directory = write(
        "say",
        [{"start": "The function returns", "end": end} for end in (said, "something else") * 4],
        output_type="generate_until",
        doc_to_text="{{start}}",
        doc_to_target="{{end}}",
        target_delimiter="",
        generation_kwargs={"until": ["\n\n\n"], "max_gen_toks": 6, "do_sample": False},
        metric_list=[{"metric": "exact_match"}, {"metric": "chrf"}],
    )

    found = measure(loaded, "say", directory)

    assert found["say/exact_match"] == 0.5
    assert 50 < found["say/chrf"] < 100
    assert intervals(found, found).keys() == {"say/exact_match"}


def test_choices_that_are_equally_likely_are_wrong(loaded: Any, ends: Callable[..., Path]) -> None:
    metrics = ["acc", "acc_norm", "acc_bytes", "acc_mutual_info", "f1", "mcc"]
    asked: Any = {"doc_to_target": "0", "metric_list": [{"metric": metric} for metric in metrics]}
    directory = ends(count=6, doc_to_choice="{{['no end', 'no end']}}", **asked)

    assert measure(loaded, "ends", directory) == {**{f"ends/{metric}": 0 for metric in metrics}, "documents": 6}


def test_of_equally_likely_choices_no_right_one_is_the_answer(loaded: Any, ends: Callable[..., Path]) -> None:
    directory = ends(count=6, doc_to_choice="{{['no end', 'no end', 'no end']}}", doc_to_target="{{[0, 1]}}")

    assert measure(loaded, "ends", directory)["ends/acc"] == 0


@pytest.mark.parametrize("kind", ["multiple_choice", "loglikelihood_rolling", "generate_until"])
def test_a_token_that_the_model_does_not_have(loaded: Any, ends: Callable[..., Path], kind: str) -> None:
    loaded.model.resize_token_embeddings(100)
    rest: Any = {"doc_to_choice": "{{ends}}"} if kind == "multiple_choice" else {"doc_to_target": "{{start}}"}
    if kind == "generate_until":
        rest["generation_kwargs"] = {"until": ["\n"], "max_gen_toks": 2}
    directory = ends(count=1, output_type=kind, metric_list=[], **rest)

    message = r"^the tokenizer gives token \d+, and the model has tokens 0 to 99: one is not of the other$"
    with pytest.raises(qsim.DataError, match=message):
        measure(loaded, "ends", directory)
    with pytest.raises(qsim.DataError, match=message):
        evaluator("ends", directory).example(loaded, evaluator("ends", directory).default_data())


def test_a_model_whose_logits_are_nan_has_no_score(loaded: Any, ends: Callable[..., Path]) -> None:
    loaded.model.get_input_embeddings().weight.data.fill_(math.nan)

    found = measure(loaded, "ends", ends())

    assert math.isnan(found["ends/acc"])
    assert found["documents"] == 6


def test_a_group_is_the_mean_over_the_documents_of_its_tasks(loaded: Any, ends: Callable[..., Path]) -> None:
    ends("few", 12, doc_to_target="0")
    directory = ends("many", 20, doc_to_target="1")
    (directory / "both.yaml").write_text(
        "group: both\ntask: [few, many]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )

    found = measure(loaded, "both", directory)

    assert next(iter(found)) == "both/acc"
    assert found["few/acc"] != found["many/acc"]
    assert found["both/acc"] == pytest.approx((12 * found["few/acc"] + 20 * found["many/acc"]) / 32)
    without = found.left_out()
    assert torch.allclose(without["both/acc"], (12 * without["few/acc"] + 20 * without["many/acc"]) / 32)


def test_samples_are_documents_and_the_first_ones_under_a_limit(loaded: Any, ends: Callable[..., Path]) -> None:
    found = measure(loaded, "ends", ends(count=6), limit=4)

    assert found["documents"] == 4
    assert found.samples["ends/acc,none sum"].mean() == found["ends/acc"]
    assert found.samples["ends/acc,none weight"].tolist() == [1.0] * 4


def test_tasks_of_different_lengths_are_samples_together(loaded: Any, ends: Callable[..., Path]) -> None:
    ends("short", 3)

    found = measure(loaded, "[short, long]", ends("long", 40))

    alone = measure(loaded, "long", ends("long", 40))
    assert found.samples["short/acc,none weight"].tolist() == [1.0] * 3 + [0.0] * 37
    assert torch.equal(found.left_out()["long/acc"], alone.left_out()["long/acc"])
    assert intervals(found, found).keys() == {"long/acc", "long/acc_norm"}


def test_both_runs_see_the_same_examples_and_another_seed_others(loaded: Any, ends: Callable[..., Path]) -> None:
    found = evaluator("ends", ends(count=20), ", num_fewshot=3")
    data = found.default_data()

    def prompts(seed: int) -> list[str]:
        found.evaluate(loaded, data, qsim.Run(seed=seed, limit=2))
        return [request.args[0] for request in data.content.tasks["ends"].instances]

    assert prompts(0) == prompts(0) != prompts(1)
    assert prompts(0)[0].count("The function returns") == 4
    assert data.name == "ends (version 1.5, 3-shot)"


def test_weights_that_were_one_and_are_two_stay_two(loaded: Any, ends: Callable[..., Path]) -> None:
    head = loaded.model.lm_head
    head.weight = nn.Parameter(head.weight * 0.5)

    measure(loaded, "ends", ends())

    assert head.weight is not loaded.model.get_input_embeddings().weight
    assert "tie_weights" not in vars(loaded.model)


def test_the_tokenizer_is_left_as_it_is(loaded: Any, ends: Callable[..., Path]) -> None:
    loaded.tokenizer.pad_token = None

    measure(loaded, "ends", ends())

    assert loaded.tokenizer.pad_token is None


def test_progress_is_told_and_the_harness_says_nothing(
    loaded: Any, ends: Callable[..., Path], capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    told: list[tuple[int, str]] = []

    def track(items: Any, total: int, description: str) -> Any:
        told.append((total, description))
        return items

    measure(loaded, "ends", ends(count=20), batch_size=1, track=track)

    assert told == [(3, "requests")]  # forty, sixteen at once
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


def test_bars_and_logs_are_back_afterwards(capfd: pytest.CaptureFixture[str]) -> None:
    import logging

    from qsim_lm_eval.quiet import quiet
    from tqdm import tqdm

    with pytest.raises(KeyError), quiet():
        list(tqdm(range(3), desc="hidden"))
        raise KeyError
    list(tqdm(range(3), desc="shown"))

    shown = capfd.readouterr().err
    assert ("hidden" in shown, "shown" in shown, logging.root.manager.disable) == (False, True, 0)


def test_transforms_look_at_text_as_perplexitys_do(loaded: Any, ends: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(PAGE * 20)
    found, own = evaluator("ends", ends()), qsim.parse("perplexity")

    text = found.read(str(tmp_path / "a.txt"))

    batches = [e.calibration(loaded, text, 2, 16, 0) for e in (found, own)]
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(*batches, strict=True))
    with pytest.raises(qsim.DataError, match="^lm_eval's tasks cannot be used for calibration; name a text with"):
        found.calibration(loaded, found.default_data(), 2, 16, 0)


def test_a_command_says_what_ran_and_its_record_runs_again(ends: Callable[..., Path], tmp_path: Path) -> None:
    evaluate = ["evaluate", "opt-tiny", "--precision", "w4a4", "--limit", "8", "--json"]
    text = f"lm_eval(ends, include_path={json.dumps(str(ends(count=8)))})"

    first = CliRunner().invoke(main, [*evaluate, str(tmp_path / "a.json"), "--evaluator", text])
    again = CliRunner().invoke(
        main, ["evaluate", "--from", str(tmp_path / "a.json"), "--json", str(tmp_path / "b.json")]
    )

    assert (first.exit_code, again.exit_code) == (0, 0), first.output + again.output
    before, after = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert (before["metric"], before["limit"]) == ("ends/acc", 8)
    assert before["protocol"].startswith("lm-evaluation-harness 0.4.")
    assert before["data"]["name"] == "ends (version 1.5, 0-shot)"
    assert before["simulated"] == after["simulated"] != before["baseline"]
    assert before["intervals"].keys() == {"ends/acc", "ends/acc_norm"}


def test_a_record_tells_that_documents_have_changed(ends: Callable[..., Path], tmp_path: Path) -> None:
    text = f"lm_eval(ends, include_path={json.dumps(str(ends(count=8)))})"
    record = str(tmp_path / "a.json")
    CliRunner().invoke(main, ["evaluate", "--precision", "w4a4", "--limit", "2", "--json", record, "--evaluator", text])
    ends(count=9)

    again = CliRunner().invoke(main, ["evaluate", "--from", record])

    assert "the data 'ends (version 1.5, 0-shot)' have changed since the record was made" in again.output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("family", "^lm_eval needs a causal language model of transformers, not a BertForMaskedLM$"),
        ("tokenizer", "^lm_eval needs a tokenizer with an end-of-text token, and this OPTForCausalLM has none$"),
        ("data", "^lm_eval's tasks have their own documents; leave --data out$"),
    ],
)
def test_what_it_cannot_be_run_on(loaded: Any, ends: Callable[..., Path], change: str, message: str) -> None:
    found = evaluator("ends", ends())
    data = qsim.Data.of_text("page", PAGE) if change == "data" else found.default_data()
    if change == "family":
        loaded = qsim.LoadedModel(type("BertForMaskedLM", (nn.Module,), {})(), loaded.tokenizer)
    if change == "tokenizer":
        loaded.tokenizer = copy.deepcopy(loaded.tokenizer)
        loaded.tokenizer.eos_token = None

    with pytest.raises(qsim.DataError, match=message):
        found.example(loaded, data)


def test_looking_it_up_does_not_import_the_harness() -> None:
    program = (
        "import sys, qsim_core; qsim_core.parse('lm_eval(piqa)'); print({'lm_eval', 'transformers'} & set(sys.modules))"
    )

    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert run.stdout == "set()\n"


class TestLmEval(EvaluatorSuite):
    text = "lm_eval"

    @pytest.fixture
    def component(self, ends: Callable[..., Path], loaded: Any) -> Any:
        self.model = loaded
        return evaluator("ends", ends())

    def loaded(self) -> qsim.LoadedModel:
        return copy.deepcopy(self.model)  # type: ignore[no-any-return]
