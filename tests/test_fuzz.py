"""Whatever is typed or read ends in exit code 0, 1 or 2, with one line for an error: thousands of seeded cases."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

import qsim_core as qsim
from qsim_core.cli.main import main
from qsim_core.simulation.recipe import Recipe

WORDS = [
    *("int4", "e4m3", "abfp", "block", "token", "scaled", "smoothquant", "gptq", "none", "true", "perplexity", "core.int4"),
    *("abfp(int4, n=64)", "block(int4", "int(4)", "nf4", "x" * 300, "", " ", "~nosuchuser", "../..", "a\0b", "é" * 200, "\ud800"),
    *("9" * 5000, "0x" + "f" * 5000, "1e999", "-1", "nan", ".inf", "15int4", "((((" * 50, "[" * 500, "{}", "*a", "&a", "!!int x"),
]  # fmt: skip
NUMBERS = [0, -1, 1, 4, 2**31, 2**63, 10**21, -(10**30), 0.5, float("nan"), float("inf"), 1e308]
KEYS = [*Recipe.model_fields, "kv_cache", "schema_version", "1", "weight"]
SCALARS: list[Any] = [*WORDS, *NUMBERS, None, True]


def value(draw: random.Random, depth: int = 0) -> Any:
    """Make a value of a recipe or a record: mostly a word or a number, sometimes a list or a mapping of them."""
    kind = draw.random()
    if depth > 3 or kind < 0.7:
        return draw.choice(SCALARS)
    if kind < 0.85:
        return [value(draw, depth + 1) for _ in range(draw.randrange(4))]
    return {draw.choice([*KEYS, "*.fc1"]): value(draw, depth + 1) for _ in range(draw.randrange(4))}


def garbled(draw: random.Random, text: str) -> str:
    """Put a few characters of syntax, or of nothing, anywhere into a text."""
    for _ in range(draw.randrange(4)):
        where = draw.randrange(len(text) + 1)
        text = text[:where] + draw.choice("(){}[],=:.*&!'\"\\-#\n\t 0x~%@|>é\x00") + text[where + draw.randrange(3) :]
    return text


def is_clean(act: Callable[[], Any]) -> bool:
    """Run something that may raise a `QsimError` of one line, and nothing else; true if it did not raise."""
    try:
        act()
        return True
    except qsim.QsimError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 20_000
        return False


def test_a_components_text_is_built_or_refused(host: qsim.Host) -> None:
    draw = random.Random(0)
    for _ in range(2000):
        texts = [str(draw.choice(SCALARS)) for _ in range(draw.randrange(1, 4))]
        text = garbled(
            draw, draw.choice(["abfp(%s)", "int(%s)", "scaled(%s)", "%s", "block(int4, n=%s)"]) % ", ".join(texts)
        )
        is_clean(lambda text=text: host.parse(text))  # type: ignore[misc]


def test_a_recipes_values_are_a_recipe_or_refused(host: qsim.Host) -> None:
    draw = random.Random(1)
    good = 0
    for _ in range(1500):
        values = {draw.choice(KEYS): value(draw) for _ in range(draw.randrange(1, 4))}
        good += is_clean(lambda values=values: Recipe.of(values, host).to_yaml())  # type: ignore[misc]

    assert 10 < good < 1000


def test_a_recipes_text_is_a_recipe_or_refused(host: qsim.Host) -> None:
    draw = random.Random(2)
    for _ in range(1000):
        values = {draw.choice(KEYS): value(draw) for _ in range(draw.randrange(1, 4))}
        text = garbled(draw, yaml.dump(values, allow_unicode=True))
        is_clean(lambda text=text: Recipe.from_yaml(text, host))  # type: ignore[misc]


def bomb(merge: str) -> str:
    lines = ["a: &a {x: [1, 1, 1, 1, 1, 1, 1, 1, 1]}"]
    for before, name in zip("abcdefghij", "bcdefghijk", strict=True):
        many = ", ".join([f"*{before}"] * 9)
        lines.append(f"{name}: &{name} {{{merge}: [{many}]}}")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (bomb("y"), "a recipe has at most 10000 values, those behind aliases counted each time"),
        (bomb("<<"), "a recipe has at most 10000 values, those behind aliases counted each time"),
        ("weights: &a [*a]", "a recipe has at most 10000 values, those behind aliases counted each time"),
        ("weights: " + "[" * 5000 + "]" * 5000, "recipe is not YAML for qsim: it is nested too deep"),
        (
            "weights: 0x" + "f" * 5000,
            "recipe is not YAML: a value cannot be read: a whole number has more than 64 bits",
        ),
        ("model: 2020-99-99", "recipe is not YAML: a value cannot be read: month must be in 1..12"),
        ("weights: !!int x", "recipe is not YAML: a value cannot be read: invalid literal for int() with base 10: 'x'"),
        ("weights: !!bool x", "recipe is not YAML: a value cannot be read: 'x'"),
        ("weights: {}", "recipe: weights: expected a quantizer or its text, found a mapping"),
        ("weights: abfp(int4, n=18446744073709551616)", "a whole number has more than 64 bits (character 14 of "),
    ],
)
def test_yaml_that_is_no_recipe_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(qsim.QsimError) as error:
        Recipe.from_yaml(text)

    assert str(error.value).startswith(message)


def run(*arguments: str) -> tuple[int, str]:
    """Run a command in this process; give its exit code and its standard error."""
    outcome = CliRunner().invoke(main, arguments)
    assert outcome.exception is None or isinstance(outcome.exception, SystemExit), (arguments, outcome.exception)
    return outcome.exit_code, outcome.stderr


OPTIONS = [
    *("--precision", "--weights", "--activations", "--outputs", "--static", "--kv-cache", "--set", "--skip", "--plugin"),
    *("--evaluator", "--arithmetic", "--device", "--dtype", "--batch-size", "--limit", "--seed", "--data", "--recipe"),
    *("--from", "--calibration-samples", "--calibration-seqlen", "--work-dir", "--value-axis", "--json", "--save-samples"),
]  # fmt: skip


def test_a_command_line_ends_with_an_exit_code_and_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    draw = random.Random(3)
    words = [*(word for word in WORDS if "\0" not in word and "\ud800" not in word), *map(str, NUMBERS), "opt-tiny"]
    for _ in range(150):
        chosen = [(draw.choice(OPTIONS), draw.choice(words)) for _ in range(draw.randrange(1, 4))]
        code, said = run("evaluate", "opt-tiny", *(part for pair in chosen for part in pair), "--dry-run")
        assert code in (0, 1, 2)
        assert code == 0 or said.splitlines()[-1].startswith("Error: ")
        assert code != 1 or len(said.splitlines()) == 1
        assert "by a fault of its own" not in said, chosen


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "--precision", "w4a8", "--batch-size", "1" + "0" * 21], "is not in the range 1<=x<=2147483647"),
        (["evaluate", "--precision", "w4a8", "--seed", "1" + "0" * 21], "is not in the range 0<=x<="),
        (["evaluate", "--precision", "w4a8", "--seed", "-1"], "is not in the range 0<=x<="),
        (["evaluate", "--precision", "w4a8", "--device", "meta"], "Error: device 'meta' cannot be used: "),
        (["evaluate", "--precision", "w4a8", "--device", "cpu:x"], "Error: device 'cpu:x' cannot be used: "),
        (["evaluate", "~nosuchuser", "--precision", "w4a8"], "Error: '~nosuchuser' cannot be a file or a directory: "),
        (["evaluate", "x" * 5000, "--precision", "w4a8"], "cannot be a file or a directory: File name too long"),
        (["evaluate", "loop", "--precision", "w4a8"], "cannot be a file or a directory: Too many levels of symbolic links"),
        (["evaluate", "--recipe", "fifo"], "Error: cannot read fifo: it is not a regular file"),
        (["evaluate", "--recipe", "/dev/zero"], "Error: cannot read /dev/zero: it is not a regular file"),
        (["evaluate", "--from", "fifo"], "Error: cannot read fifo: it is not a regular file"),
        (["evaluate", "--recipe", "large"], "Error: cannot read large: it has more than 1 MiB"),
        (["finetune", "--precision", "w4a8", "--output", "o", "--lr", "nan"], "'nan' is not a finite number"),
        (["finetune", "--precision", "w4a8", "--output", "o", "--epochs", "inf"], "'inf' is not a finite number"),
        (["quantize", "fifo", "o.safetensors", "--weights", "int4"], "Error: cannot read fifo: it is not a regular file"),
        (["quantize", "loop", "o.safetensors", "--weights", "int4"], "cannot be a file or a directory: Too many levels of symbolic"),
    ],
)  # fmt: skip
def test_what_cannot_be_right_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    os.mkfifo("fifo")
    Path("large").write_bytes(b"#" * (2 << 20))

    code, said = run(*arguments)

    assert code in (1, 2)
    assert message in said.splitlines()[-1]


def test_a_record_is_run_again_or_refused(tmp_path: Path, host: qsim.Host) -> None:
    from qsim_core.evaluation.record import recipe_of
    from qsim_core.evaluation.result import Result

    result = qsim.evaluate({"weights": "int4"}, run=qsim.Run(limit=1))
    path, draw = tmp_path / "result.json", random.Random(4)
    for _ in range(300):
        record = json.loads(result.model_dump_json())
        parts = [record, record["recipe"], record["data"], record["environment"]]
        for _ in range(draw.randrange(1, 3)):
            part = draw.choice(parts)
            part[draw.choice([*part, *KEYS])] = value(draw)
        path.write_text(json.dumps(record), errors="surrogatepass")
        is_clean(lambda: recipe_of(Result.read(path), host))


def test_a_dry_run_looks_for_the_data() -> None:
    code, said = run("evaluate", "--weights", "int4", "--data", "missing.txt", "--dry-run")

    assert (code, said) == (1, "Error: there is no file missing.txt\n")
