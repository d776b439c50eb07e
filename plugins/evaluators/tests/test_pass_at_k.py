"""HumanEval's estimate by hand and by counting, and a model that writes given programs."""

from __future__ import annotations

import gzip
import itertools
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from qsim_evaluators.completing import before_stop, gumbel
from qsim_evaluators.pass_at_k import estimate, problems
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

import qsim_core as qsim
from qsim_core.cli.main import main
from qsim_core.testing import EvaluatorSuite

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="seccomp is Linux's")
PIECES = ["def f(a, b):\n", "    return", " a", " +", " -", " b", "\nprint", "()", "</s>", "<pad>", "<unk>"]
ADDS = {"def f(a, b):\n": "    return", "    return": " a", " a": " +", " +": " b", " b": "\nprint", "\nprint": "()"}
PROBLEM = {"task_id": "sum", "prompt": "def f(a, b):\n", "entry_point": "f"}
RIGHT = PROBLEM | {"test": "def check(candidate):\n    assert candidate(2, 3) == 5\n"}
IMPOSSIBLE = PROBLEM | {"test": "def check(candidate):\n    assert candidate(2, 3) == 6\n"}
ALLOWED = {"allow_code_execution": True}
GREEDY = "pass_at_k([1], samples=1, temperature=0, max_new_tokens=8)"


def tokenizer() -> Any:
    """Make a tokenizer that has one token for each piece."""
    words = Tokenizer(models.WordLevel({piece: place for place, piece in enumerate(PIECES)}, unk_token="<unk>"))
    pattern = "|".join(re.escape(piece) for piece in PIECES)
    words.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    words.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def writer(chain: dict[str, str | list[str]], **options: Any) -> Any:
    """Make an OPT whose next token depends only on the last one. Several next tokens are equally likely."""
    width, ends = 16, PIECES.index("</s>")
    config = OPTConfig(
        vocab_size=width, hidden_size=width, word_embed_proj_dim=width, num_hidden_layers=1, num_attention_heads=2,
        ffn_dim=16, max_position_embeddings=64, tie_word_embeddings=False, bos_token_id=ends, eos_token_id=ends,
        pad_token_id=PIECES.index("<pad>"), **options,
    )  # fmt: skip
    model = OPTForCausalLM(config).eval()
    decoder = model.model.decoder
    with torch.no_grad():
        for weight in (decoder.embed_positions, decoder.layers[0].self_attn.out_proj, decoder.layers[0].fc2):
            weight.weight.zero_()
        decoder.embed_tokens.weight.copy_(torch.eye(width))
        model.lm_head.weight.zero_()
        for last, following in chain.items():
            for piece in [following] if isinstance(following, str) else following:
                model.lm_head.weight[PIECES.index(piece), PIECES.index(last)] = 10.0
    return qsim.LoadedModel(model, tokenizer())


def measure(loaded: Any, evaluator: str, *rows: dict[str, str], **run: Any) -> Any:
    return qsim.parse(evaluator).evaluate(loaded, problems("sums", list(rows)), qsim.Run(**ALLOWED | run))


@pytest.mark.parametrize(
    ("n", "c", "k", "value"),
    [
        (1, 0, 1, 0), (1, 1, 1, 1), (4, 1, 1, 1 / 4), (4, 1, 2, 1 / 2), (5, 2, 2, 1 - 3 / 10), (4, 2, 3, 1),
        (10, 3, 5, 1 - 21 / 252), (200, 0, 100, 0), (200, 1, 100, 1 / 2), (200, 200, 1, 1),
    ],
)  # fmt: skip
def test_the_estimate_by_hand(n: int, c: int, k: int, value: float) -> None:
    assert estimate(n, c, k) == pytest.approx(value, abs=1e-12)


def test_the_estimate_is_the_share_of_subsets_with_a_pass() -> None:
    for n, k in itertools.product(range(1, 8), repeat=2):
        for c in range(n + 1 if k <= n else 0):
            subsets = list(itertools.combinations(range(n), k))
            share = sum(min(subset) < c for subset in subsets) / len(subsets)
            assert estimate(n, c, k) == pytest.approx(share, abs=1e-12)


def test_a_right_program_passes_and_an_impossible_test_fails() -> None:
    found = measure(writer(ADDS), GREEDY, RIGHT, IMPOSSIBLE)

    assert found == {"pass@1": 0.5, "problems": 2}
    assert found.samples["pass@1"].tolist() == [1, 0]
    assert found.outputs == [
        {"task_id": "sum", "completion": "    return a + b", "verdict": "passed"},
        {"task_id": "sum", "completion": "    return a + b", "verdict": "failed: AssertionError"},
    ]


def test_a_model_whose_logits_are_nan_has_no_score() -> None:
    broken = writer(ADDS)
    broken.model.lm_head.weight.data.fill_(math.nan)

    found = measure(broken, GREEDY, RIGHT)

    assert math.isnan(found["pass@1"])
    assert found["problems"] == 1


def test_samples_that_pass_and_samples_that_do_not() -> None:
    either = writer(ADDS | {" a": [" +", " -"], " -": " b"})

    found = measure(either, "pass_at_k([1, 3], samples=12, temperature=1, max_new_tokens=8)", RIGHT)

    passed = [output["completion"] for output in found.outputs].count("    return a + b")
    assert 0 < passed < 12
    assert {output["completion"] for output in found.outputs} == {"    return a + b", "    return a - b"}
    assert found == pytest.approx({"pass@1": passed / 12, "pass@3": estimate(12, passed, 3), "problems": 1})


@pytest.mark.parametrize("batch_size", [1, 5])
def test_samples_depend_on_the_seed_and_neither_on_the_batch_nor_on_torchs_own_numbers(batch_size: int) -> None:
    either, evaluator = (
        writer(ADDS | {" a": [" +", " -"]}),
        "pass_at_k([1], samples=8, temperature=1, max_new_tokens=3)",
    )
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    first = measure(either, evaluator, RIGHT, RIGHT)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(1)

    again = measure(either, evaluator, RIGHT, RIGHT, batch_size=batch_size)

    assert again.outputs == first.outputs
    assert again.outputs[:8] != again.outputs[8:]
    assert measure(either, evaluator, RIGHT, RIGHT, seed=1).outputs != first.outputs


def test_draws_follow_the_softmax() -> None:
    logits, draws = torch.tensor([0.0, 1.0, 2.0, -1.0]), 40_000
    noise = torch.cat([gumbel(torch.zeros(draws // 10, 4), "x", step, seed=0) for step in range(10)])

    share = (logits + noise).argmax(1).bincount(minlength=4) / draws

    chance = logits.softmax(0)
    assert ((share - chance).abs() < 4 * (chance * (1 - chance) / draws).sqrt()).all()


def test_top_p_leaves_the_unlikely_out() -> None:
    rarely = writer(ADDS | {" a": [" +", " -"], " -": " b"})
    rarely.model.lm_head.weight.data[PIECES.index(" -"), PIECES.index(" a")] = 9.8

    def completions(top_p: float) -> set[str]:
        evaluator = f"pass_at_k([1], samples=30, temperature=1, top_p={top_p}, max_new_tokens=8)"
        return {output["completion"] for output in measure(rarely, evaluator, RIGHT, batch_size=30).outputs}

    assert completions(0.95) == {"    return a + b", "    return a - b"}
    assert completions(0.5) == {"    return a + b"}


def test_the_end_of_a_text_ends_a_completion() -> None:
    found = measure(writer(ADDS | {" b": "</s>", "</s>": " -"}), GREEDY, RIGHT)

    assert found.outputs[0]["completion"] == "    return a + b"


class Logits(nn.Module):
    """A model without `generate` and without a configuration."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.inner(tokens).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("options", ["8, temperature=1", "8, temperature=1, top_p=0.5", "1, temperature=0"])
def test_a_model_that_has_logits_alone_writes_what_generate_writes(options: str) -> None:
    either = writer(ADDS | {" a": [" +", " -"], " b": ["</s>", "\nprint"], "</s>": " -"})
    evaluator = f"pass_at_k([1], samples={options}, max_new_tokens=8)"

    found = measure(qsim.LoadedModel(Logits(either.model), either.tokenizer), evaluator, RIGHT)

    assert found.outputs == measure(either, evaluator, RIGHT).outputs


def test_a_tokenizer_that_cannot_decode_is_one_line() -> None:
    with pytest.raises(qsim.DataError, match=r"^pass_at_k reads what the model writes: give the model a tokenizer tha"):
        measure(qsim.LoadedModel(writer(ADDS).model, lambda text: text), GREEDY, RIGHT)


def test_a_checkpoints_own_settings_for_generation_are_left_out() -> None:
    loaded = writer(ADDS)
    loaded.model.generation_config.update(do_sample=True, temperature=9.0, top_k=2, top_p=0.5, repetition_penalty=9.0)

    found = measure(loaded, GREEDY, RIGHT, PROBLEM | {"prompt": "def f(a, b):\n    return a", "test": RIGHT["test"]})

    assert [output["completion"] for output in found.outputs] == ["    return a + b", " + b"]


def test_a_text_is_cut_before_its_first_stop() -> None:
    assert before_stop("x\ndef y\nclass z", ("\nclass", "\ndef")) == "x"
    assert before_stop("x define", ("\nclass", "\ndef")) == "x define"


def test_nothing_is_generated_unless_code_may_run() -> None:
    loaded = writer(ADDS)
    del loaded.model.model  # it could not generate

    with pytest.raises(qsim.QsimError) as error:
        measure(loaded, GREEDY, RIGHT, allow_code_execution=False)

    assert str(error.value) == (
        "pass_at_k runs programs that the model writes; allow it with --allow-code-execution "
        "(in Python: Run(allow_code_execution=True))"
    )


def test_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = writer(ADDS)
    for part in (loaded.model, loaded.tokenizer):
        part.save_pretrained(tmp_path / "writer")
    Path("sums.jsonl").write_text("\n".join(json.dumps(row) for row in (RIGHT, IMPOSSIBLE, RIGHT, RIGHT) * 2))
    run = ["evaluate", "writer", "--precision", "w8a8", "--evaluator", GREEDY, "--data", "sums.jsonl", "--quiet"]

    refused = CliRunner().invoke(main, run)
    allowed = CliRunner().invoke(
        main, [*run, "--allow-code-execution", "--json", "result.json", "--save-samples", "samples"]
    )
    record = ["evaluate", "--from", "result.json", "--quiet"]
    again = [CliRunner().invoke(main, [*record, *option]) for option in ([], ["--allow-code-execution"])]

    assert refused.exit_code == 1
    assert refused.stderr.startswith("Error: pass_at_k runs programs that the model writes; allow it with --allow-code")
    assert allowed.exit_code == 0, allowed.output
    result = json.loads(Path("result.json").read_text())
    assert result["baseline"] == result["simulated"] == {"pass@1": 0.75, "problems": 8}
    low, high = result["intervals"]["pass@1"]["difference"]
    assert low < 0 < high
    assert [json.loads(line)["verdict"] for line in Path("samples/simulated.jsonl").read_text().splitlines()] == [
        "passed", "failed: AssertionError", "passed", "passed",
    ] * 2  # fmt: skip
    assert [outcome.exit_code for outcome in again] == [1, 0]


def test_the_protocol_in_words() -> None:
    loaded = writer(ADDS)

    assert qsim.parse("pass_at_k").protocol(loaded) == (
        "unbiased pass@k (arXiv 2107.03374, eq. 1) over 20 completions of each prompt as it is at temperature 0.2 and "
        'top-p 0.95, of 512 tokens at most, cut at "\\nclass", "\\ndef", "\\n#", "\\nif", "\\nprint"; 3 s of processor '
        "time for each program"
    )
    assert "over the greedy completion of each prompt as it is, of 8 tokens" in qsim.parse(GREEDY).protocol(loaded)


def test_its_text_is_read_back() -> None:
    evaluator = qsim.parse('pass_at_k([1, 5], samples=8, stop=["\\nclass", "\\n\\n"])')

    assert evaluator.stop == ("\nclass", "\n\n")
    assert qsim.parse(str(evaluator)) == evaluator


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pass_at_k([1, 10], samples=5)", "pass@10 takes 10 samples of a problem, not 5"),
        ("pass_at_k([1], temperature=0)", "at temperature=0 all 20 samples are equal; set samples=1 and k=\\[1\\]"),
        ('pass_at_k(stop=[""])', "an empty stop text would end every completion at once"),
        ("pass_at_k([0])", "k.0 should be greater than 0, not 0"),
        ("pass_at_k(top_p=0)", "top_p should be greater than 0, not 0"),
    ],
)
def test_options_that_measure_nothing_are_refused(text: str, message: str) -> None:
    with pytest.raises(qsim.SpecError, match=message):
        qsim.parse(text)


def test_what_does_not_fit_the_model_is_told_before_anything_is_generated() -> None:
    with pytest.raises(
        qsim.DataError, match=r"^the model takes 64 tokens at most, not 1 of sum and max_new_tokens=64$"
    ):
        measure(writer(ADDS), "pass_at_k([1], samples=1, max_new_tokens=64)", RIGHT)


def test_text_is_no_problem() -> None:
    with pytest.raises(qsim.DataError, match=r"^fox has no programming problems; name a file of them with --data$"):
        qsim.parse(GREEDY).evaluate(writer(ADDS), qsim.Data.of_text("fox", "fox"), qsim.Run(**ALLOWED))


def test_calibration_reads_prompts_with_their_solutions() -> None:
    data = problems("sums", [RIGHT | {"canonical_solution": "    return a + b"}] * 3)

    batches = qsim.parse(GREEDY).calibration(writer(ADDS), data, 4, 5, seed=0)

    seen = {tokenizer().decode(batch["input_ids"][0]) for batch in batches}
    assert {batch["input_ids"].shape for batch in batches} == {(1, 5)}
    assert any("    return a + b" in text for text in seen)


class TestRead:
    """Sources of problems."""

    def read(self, source: Any) -> qsim.Data:
        return qsim.parse("pass_at_k").read(str(source))  # type: ignore[no-any-return]

    def test_files_and_data_sets_read_the_same(self, tmp_path: Path) -> None:
        lines = "\n".join(json.dumps(row) for row in (RIGHT, IMPOSSIBLE)) + "\n"
        (tmp_path / "sums.jsonl").write_text(lines)
        (tmp_path / "sums.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
        (tmp_path / "set").mkdir()
        (tmp_path / "set" / "test.jsonl").write_text(lines)

        plain, packed, data_set = (self.read(tmp_path / name) for name in ("sums.jsonl", "sums.jsonl.gz", "set"))

        assert plain.content["test"] == [RIGHT["test"], IMPOSSIBLE["test"]]
        assert plain.content["canonical_solution"] == ["", ""]
        assert plain.content == packed.content == data_set.content
        assert plain.sha256 == packed.sha256 == data_set.sha256

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "a.jsonl has no problems"),
            ("no json", "a.jsonl as JSON lines: Expecting value: line 1 column 1 "),
            ("[1]", "a.jsonl, problem 1: a problem needs the text 'prompt'"),
            (json.dumps(RIGHT | {"prompt": " "}), "a.jsonl, problem 1: a problem needs the text 'prompt'"),
            (json.dumps(RIGHT) + "\n\n" + json.dumps(PROBLEM), "a.jsonl, problem 2: a problem needs the text 'test'"),
        ],
    )
    def test_files_without_problems(self, tmp_path: Path, text: str, message: str) -> None:
        (tmp_path / "a.jsonl").write_text(text)

        with pytest.raises(qsim.DataError, match=message):
            self.read(tmp_path / "a.jsonl")


class TestPassAtK(EvaluatorSuite):
    text = GREEDY
    run = qsim.Run(batch_size=3, allow_code_execution=True)

    def loaded(self) -> qsim.LoadedModel:
        return writer(ADDS)  # type: ignore[no-any-return]

    def data(self, evaluator: Any) -> qsim.Data:
        return problems("sums", [RIGHT, IMPOSSIBLE])
