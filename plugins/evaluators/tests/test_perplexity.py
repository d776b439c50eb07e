"""Perplexity against a plain loop, on a model small enough to write down."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from qsim_evaluators.fitting import longest
from qsim_evaluators.text import KEPT, tokens_of_corpus
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

import qsim_core as qsim
from qsim_core.matmuls.dispatch import OperatorWatcher, operator_name
from qsim_core.testing import EvaluatorSuite

TEXT = "the quick brown fox jumps over the lazy dog " * 4


class Bigram(nn.Module):
    """A language model of one matrix: the logits of the next letter depend on the last letter."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(128, 128, generator=torch.Generator().manual_seed(0)))
        self.config = SimpleNamespace(max_position_embeddings=64)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        return SimpleNamespace(logits=self.table[input_ids])


def letters(text: str, verbose: bool = True) -> Any:
    return SimpleNamespace(input_ids=[ord(letter) for letter in text])


@pytest.fixture
def loaded() -> qsim.LoadedModel:
    return qsim.LoadedModel(Bigram(), letters)


def by_hand(model: Any, seqlen: int, stride: int) -> tuple[float, int]:
    """Compute the metrics token by token. Each position counts in the first window that predicts it."""
    tokens, counted, total = [ord(letter) for letter in TEXT], set(), 0.0
    for start in range(0, len(tokens) - seqlen + 1, stride):
        for position in range(start + 1, start + seqlen):
            if position not in counted and (start == 0 or position >= start + seqlen - stride):
                counted.add(position)
                total -= model.table[tokens[position - 1]].double().log_softmax(-1)[tokens[position]].item()
    return math.exp(total / len(counted)), len(counted)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize(("seqlen", "stride"), [(16, 16), (16, 4), (16, 15), (7, 1), (64, 64), (2, 2)])
def test_it_is_what_a_plain_loop_gives(loaded: qsim.LoadedModel, seqlen: int, stride: int, batch_size: int) -> None:
    evaluator = qsim.parse(f"perplexity({seqlen}, stride={stride})")

    metrics = evaluator.evaluate(loaded, qsim.Data.of_text("fox", TEXT), qsim.Run(batch_size=batch_size))

    perplexity, tokens = by_hand(loaded.model, seqlen, stride)
    assert metrics["tokens"] == tokens
    assert metrics["perplexity"] == pytest.approx(perplexity, rel=1e-6)
    assert metrics["nll"] == pytest.approx(math.log(perplexity), rel=1e-6)


def test_words_and_bytes_are_counted_as_lm_eval_counts_them(loaded: qsim.LoadedModel) -> None:
    """It is exp(-log-likelihood / words). The first token is not predicted, and counts with the mean of the others."""
    text = "un garçon\n\nmange" + " une pomme" * 3
    loaded.tokenizer = lambda text, verbose: SimpleNamespace(input_ids=[ord(letter) % 128 for letter in text])
    whole = qsim.parse(f"perplexity({len(text)})")

    found = whole.evaluate(loaded, qsim.Data.of_text("pomme", text), qsim.Run())

    nll = found["nll"] * len(text)
    assert found["word_perplexity"] == pytest.approx(math.exp(nll / 9), rel=1e-9)
    assert found["byte_perplexity"] == pytest.approx(math.exp(nll / (len(text) + 1)), rel=1e-9)
    assert found["bits_per_byte"] == pytest.approx(nll / (len(text) + 1) / math.log(2), rel=1e-9)


@pytest.mark.parametrize("piece", [1, 7, 10**6])
def test_pieces_of_the_logits_give_the_same_numbers(
    loaded: qsim.LoadedModel, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, evaluator = qsim.Data.of_text("fox", TEXT), qsim.parse("perplexity(16)")
    whole = evaluator.evaluate(loaded, data, qsim.Run())

    monkeypatch.setattr("qsim_evaluators.perplexity.PIECE", piece * 128)
    by_pieces = evaluator.evaluate(loaded, data, qsim.Run())

    assert by_pieces == whole


def test_a_forward_has_as_many_windows_as_their_logits_allow(
    loaded: qsim.LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, evaluator, seen = qsim.Data.of_text("fox", TEXT), qsim.parse("perplexity(16)"), list[int]()
    whole = evaluator.evaluate(loaded, data, qsim.Run(batch_size=8))
    loaded.model.config.vocab_size = 128
    loaded.model.register_forward_pre_hook(
        lambda _, args, given: seen.append(len(given["input_ids"])), with_kwargs=True
    )

    monkeypatch.setattr("qsim_evaluators.perplexity.LOGITS", 3 * 16 * 128)
    few = evaluator.evaluate(loaded, data, qsim.Run(batch_size=8))
    monkeypatch.setattr("qsim_evaluators.perplexity.LOGITS", 1)
    single = evaluator.evaluate(loaded, data, qsim.Run(batch_size=8))

    assert seen == [3, 3, 3, 2] + [1] * 11
    assert few == whole == single
    assert evaluator.protocol(loaded).endswith(", 1 at a time at most")


@pytest.mark.slow
def test_a_large_vocabulary_takes_the_memory_of_one_window() -> None:
    grown = int(subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, check=True).stdout)

    model, window = 2 * 2**17 * 16 * 4, 2048 * 2**17 * 4
    assert grown < 1.1 * (model + window)


LARGE = """
import resource
from types import SimpleNamespace
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import qsim_core as qsim

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

torch.set_num_threads(1)
evaluator = qsim.parse("perplexity(2048)")
small = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, max_position_embeddings=2048
)

def measure(vocabulary, length):
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **small)).eval()
    tokens = lambda text, **_: SimpleNamespace(input_ids=[ord(letter) for letter in text])
    loaded, data = qsim.LoadedModel(model, tokens), qsim.Data.of_text("a", "ab" * length)
    qsim.parse(f"perplexity({length})").evaluate(loaded, data, qsim.Run(batch_size=8))

measure(128, 16)  # what is loaded once
before = peak()
measure(2**17, 2048)
print(peak() - before)
"""


def test_no_tensor_beside_the_logits_is_as_large(loaded: qsim.LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    class Largest(OperatorWatcher):
        elements = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if operator_name(func) in ("_log_softmax", "clone", "_to_copy"):
                self.elements = max(self.elements, out.numel())
            return out

    monkeypatch.setattr("qsim_evaluators.perplexity.PIECE", 256)
    with Largest() as largest:
        qsim.parse("perplexity(16)").evaluate(loaded, qsim.Data.of_text("fox", TEXT), qsim.Run(batch_size=8))

    assert 0 < largest.elements <= 256


def test_the_windows_are_the_samples(loaded: qsim.LoadedModel) -> None:
    metrics = qsim.parse("perplexity(16, stride=4)").evaluate(loaded, qsim.Data.of_text("fox", TEXT), qsim.Run())

    assert metrics.samples["tokens"].tolist() == [15, *[4] * 40]
    assert metrics.left_out()["perplexity"].std() > 0
    assert metrics.in_order


class Opened:
    """A tokenizer of letters that puts token 1 before a text."""

    bos_token_id = 1

    def __call__(self, text: str, verbose: bool = True) -> Any:
        return SimpleNamespace(input_ids=[1, *map(ord, text)])


@pytest.mark.parametrize("batch_size", [1, 100])
def test_each_window_begins_with_the_token_that_the_tokenizer_puts_first(batch_size: int) -> None:
    opened = qsim.LoadedModel(Bigram(), Opened())
    logs = opened.model.table.double().log_softmax(-1)  # type: ignore[union-attr, operator]
    windows = [[1, *map(ord, TEXT[start : start + 15])] for start in range(0, len(TEXT) - 14, 15)]
    losses = [-logs[a, b].item() for window in windows for a, b in itertools.pairwise(window)]

    found = qsim.parse("perplexity(16)").evaluate(
        opened, qsim.Data.of_text("fox", TEXT), qsim.Run(batch_size=batch_size)
    )

    assert found["nll"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert found["tokens"] == len(losses)


def test_the_protocol_says_which_windows_have_the_first_token() -> None:
    opened, data = qsim.LoadedModel(Bigram(), Opened()), qsim.Data.of_text("fox", TEXT)

    each, first = (qsim.parse(f"perplexity(16, first_token={of})").protocol(opened) for of in ("true", "false"))

    assert each.endswith(", each after the token that the tokenizer puts before a text")
    assert first.endswith(", only the first one after the token that the tokenizer puts before a text")
    batches = qsim.parse("perplexity(16)").calibration(opened, data, 3, 8, 0)
    assert [(batch["input_ids"][0, 0].item(), batch["input_ids"].shape) for batch in batches] == [(1, (1, 8))] * 3


def test_a_token_that_the_model_does_not_have_is_one_line(loaded: qsim.LoadedModel) -> None:
    qsim.parse("perplexity(16)").evaluate(loaded, qsim.Data.of_text("fox", TEXT), qsim.Run())
    loaded.model.get_input_embeddings = lambda: nn.Embedding(100, 1)  # type: ignore[assignment]

    with pytest.raises(
        qsim.DataError,
        match=r"^the tokenizer gives token 122, and the model has tokens 0 to 99: one is not of the other$",
    ):
        qsim.parse("perplexity(16)").evaluate(loaded, qsim.Data.of_text("fox", TEXT), qsim.Run())


@pytest.mark.parametrize(
    ("config", "most"),
    [
        ({"max_seq_len": 48}, 48),
        ({"max_position_embeddings": -1, "n_positions": 32}, 32),
        ({"text_config": SimpleNamespace(max_position_embeddings=24)}, 24),
        ({"max_position_embeddings": 10}, 8),
        (None, 2048),
    ],
)
def test_a_model_takes_as_many_tokens_as_it_has_positions(config: Any, most: int) -> None:
    model = Bigram()
    model.position_embeddings = nn.Embedding(10, 1, padding_idx=1)  # two rows of it are not for tokens
    if config is None:
        del model.config
    else:
        model.config = SimpleNamespace(**config)

    assert longest(qsim.LoadedModel(model, letters), 2048) == most


def test_a_table_of_positions_may_be_of_any_class() -> None:
    class Positions(nn.Module):
        def __init__(self, rows: int) -> None:
            super().__init__()
            self.weight, self.padding_idx = nn.Parameter(torch.zeros(rows, 1)), 1

    takes = []
    for rows in (10, 12):  # a table of 12 rows has two more than the model takes tokens
        model = Bigram()
        model.position_embeddings, model.config = Positions(rows), SimpleNamespace(max_position_embeddings=10)
        takes.append(longest(qsim.LoadedModel(model, letters), 2048))

    assert takes == [8, 10]


def test_the_window_is_what_the_model_takes(loaded: qsim.LoadedModel) -> None:
    assert qsim.parse("perplexity").protocol(loaded) == (
        "perplexity per token over non-overlapping windows of 64 tokens of the concatenated text"
    )
    assert qsim.parse("perplexity(32, stride=8)").protocol(loaded) == (
        "perplexity per token over stride 8 windows of 32 tokens of the concatenated text"
    )


def test_limit_takes_the_first_windows(loaded: qsim.LoadedModel) -> None:
    metrics = qsim.parse("perplexity(16)").evaluate(loaded, qsim.Data.of_text("fox", TEXT), qsim.Run(limit=2))

    assert metrics["tokens"] == 30


def test_progress_is_told_batch_by_batch(loaded: qsim.LoadedModel) -> None:
    told: list[tuple[int, str]] = []

    def track(items: Any, total: int, description: str) -> Any:
        told.append((total, description))
        return items

    qsim.parse("perplexity(16)").evaluate(loaded, qsim.Data.of_text("fox", TEXT), qsim.Run(batch_size=4, track=track))

    assert told == [(3, "perplexity")]


def test_a_hopeless_model_has_infinite_perplexity(loaded: qsim.LoadedModel) -> None:
    loaded.model.table.data.mul_(1e6)

    metrics = qsim.parse("perplexity(16)").evaluate(loaded, qsim.Data.of_text("fox", TEXT), qsim.Run())

    assert metrics["perplexity"] == math.inf


def test_a_tokenizer_that_changes_between_two_evaluations_is_asked_again() -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    )
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    loaded = qsim.LoadedModel(Bigram(), tokenizer)
    data, run = qsim.Data("a text", "a b a b a b", "0" * 64), qsim.Run()
    tokens = [qsim.parse("perplexity(seqlen=3)").evaluate(loaded, data, run)["tokens"] for _ in range(2)]

    tokenizer.add_tokens(["b a"])

    tokens.append(qsim.parse("perplexity(seqlen=3)").evaluate(loaded, data, run)["tokens"])
    assert tokens == [4, 4, 2]


def test_a_tokenizer_that_is_loaded_again_is_not_asked_again() -> None:
    asked = []

    class Asked(PreTrainedTokenizerFast):  # type: ignore[misc]
        def __call__(self, text: str, **options: Any) -> Any:
            asked.append(text)
            return super().__call__(text, **options)

    for _ in range(2):
        words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        loaded = qsim.LoadedModel(Bigram(), Asked(tokenizer_object=words))
        qsim.parse("perplexity(seqlen=3)").evaluate(loaded, qsim.Data.of_text("a text", "a b a b a b"), qsim.Run())

    assert asked == ["a b a b a b"]


def test_the_tokens_of_a_long_text_are_kept_for_later_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QSIM_CACHE", str(tmp_path))
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    loaded = qsim.LoadedModel(Bigram(), PreTrainedTokenizerFast(tokenizer_object=words))

    first = tokens_of_corpus(loaded, "a b b " * 50_000)
    KEPT.clear()  # a later run has an empty memory

    assert torch.equal(tokens_of_corpus(loaded, "a b b " * 50_000), first)
    assert first.tolist() == [0, 1, 1] * 50_000
    assert [len(path.read_bytes()) > 4 * 150_000 for path in tmp_path.glob("tokens/*.kept")] == [True]


def test_text_shorter_than_a_window_is_an_error(loaded: qsim.LoadedModel) -> None:
    with pytest.raises(
        qsim.DataError, match=r"^fox has 3 tokens, fewer than one window of 64; lower it: --set perplexity.seqlen=N$"
    ):
        qsim.parse("perplexity").evaluate(loaded, qsim.Data.of_text("fox", "fox"), qsim.Run())


def test_a_window_longer_than_the_model_takes_is_an_error(loaded: qsim.LoadedModel) -> None:
    with pytest.raises(qsim.DataError, match=r"^the model takes 64 tokens at most, not seqlen=65$"):
        qsim.parse("perplexity(65)").evaluate(loaded, qsim.Data.of_text("fox", TEXT), qsim.Run())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("perplexity(1)", "a window of 1 token has no token to predict; seqlen is at least 2"),
        ("perplexity(8, stride=9)", "a stride of 9 would leave tokens out between windows of 8"),
        ("perplexity(0)", "seqlen should be greater than 0, not 0"),
    ],
)  # fmt: skip
def test_options_that_measure_nothing_are_refused(text: str, message: str) -> None:
    with pytest.raises(qsim.SpecError, match=message):
        qsim.parse(text)


def test_a_stride_is_held_to_the_models_own_window(loaded: qsim.LoadedModel) -> None:
    with pytest.raises(qsim.DataError, match="a stride of 65 would leave tokens out between windows of 64"):
        qsim.parse("perplexity(stride=65)").evaluate(loaded, qsim.Data.of_text("fox", TEXT), qsim.Run())


class TestRead:
    """Sources of text."""

    def read(self, source: Any) -> qsim.Data:
        return qsim.parse("perplexity").read(str(source))  # type: ignore[no-any-return]

    def test_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text(TEXT)

        data = self.read(tmp_path / "a.txt")

        assert data == qsim.Data.of_text(str(tmp_path / "a.txt"), TEXT)

    def test_a_data_set_by_name_rows_joined_by_blank_lines(self, tmp_path: Path) -> None:
        rows = [{"text": "one"}, {"text": "two"}]
        (tmp_path / "set").mkdir()
        (tmp_path / "set" / "test.jsonl").write_text("\n".join(json.dumps(row) for row in rows))

        assert self.read(tmp_path / "set").content == "one\n\ntwo"

    def test_a_split_of_a_data_set(self, tmp_path: Path) -> None:
        (tmp_path / "set").mkdir()
        for split in ("train", "test"):
            (tmp_path / "set" / f"{split}.jsonl").write_text(json.dumps({"text": f"in {split}"}))

        assert self.read(f"{tmp_path / 'set'}::train").content == "in train"
        assert qsim.parse("perplexity").read(str(tmp_path / "set"), split="train").content == "in train"

    @pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet"])
    def test_a_file_of_rows(self, tmp_path: Path, name: str) -> None:
        rows = datasets.Dataset.from_dict({"text": ["one", "two"], "label": [0, 1]})
        {".csv": rows.to_csv, ".parquet": rows.to_parquet}.get(Path(name).suffix, rows.to_json)(tmp_path / name)

        assert self.read(tmp_path / name).content == "one\n\ntwo"

    def test_a_file_of_rows_without_text(self, tmp_path: Path) -> None:
        (tmp_path / "rows.csv").write_text("x,y\n1,2\n")

        with pytest.raises(qsim.DataError, match=r"rows.csv' has no column 'text'; it has x, y$"):
            self.read(tmp_path / "rows.csv")

    def test_a_file_of_rows_that_is_broken(self, tmp_path: Path) -> None:
        (tmp_path / "rows.jsonl").write_text("{")

        with pytest.raises(qsim.DataError, match=r"^datasets cannot load .*rows.jsonl: JSON parse error: "):
            self.read(tmp_path / "rows.jsonl")

    @pytest.mark.parametrize("text", ["", " \n\n "])
    def test_an_empty_file(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "a.txt").write_text(text)

        with pytest.raises(qsim.DataError, match=r"a.txt is empty: there is no text to measure perplexity on$"):
            self.read(tmp_path / "a.txt")

    def test_a_missing_file(self) -> None:
        with pytest.raises(qsim.DataError, match=r"^there is no file ./nowhere.txt$"):
            self.read("./nowhere.txt")

    def test_bytes_that_are_no_text(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")

        with pytest.raises(qsim.DataError, match="a.txt: it is not UTF-8 text$"):
            self.read(tmp_path / "a.txt")

    def test_a_data_set_without_text(self, tmp_path: Path) -> None:
        (tmp_path / "set").mkdir()
        (tmp_path / "set" / "test.jsonl").write_text(json.dumps({"words": "x"}))

        with pytest.raises(qsim.DataError, match="has no column 'text'; it has words$"):
            self.read(tmp_path / "set")

    def test_a_name_that_nothing_is_behind(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)

        with pytest.raises(qsim.DataError, match="^'no_such_set' is not a file, and datasets cannot load it: "):
            self.read("no_such_set")


class TestPerplexity(EvaluatorSuite):
    text = ("perplexity", "perplexity(16, stride=4)")
