"""The command line as a user sees it: answers, files, and one clear line for each mistake."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
import yaml
from click.testing import CliRunner, Result

import qsim_core as qsim
from qsim_core.cli.console import console, print_below
from qsim_core.cli.main import main
from qsim_core.files import writing

ZOO = Path(__file__).parent.parent / "plugins" / "zoo" / "qsim_zoo" / "models"
SHORT = ["--set", "perplexity.seqlen=32"]
QUICK = ["--limit", "1", "--quiet", *SHORT]
Qsim = Callable[..., Result]


@pytest.fixture
def qsim_(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Qsim:
    """`qsim_("evaluate", …)` in an empty directory."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(main, [str(argument) for argument in arguments])


def joined(text: str) -> str:
    """A text as one line: the lines under a table are wrapped."""
    return " ".join(text.split())


@pytest.fixture(scope="session")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The record of one short run."""
    file = tmp_path_factory.mktemp("record") / "result.json"
    outcome = CliRunner().invoke(
        main, ["evaluate", "--plugin", "abfp", "--precision", "w4a8", "--json", str(file), *QUICK]
    )
    assert outcome.exit_code == 0, outcome.output
    return file


def test_the_table_names_exceptions(qsim_: Qsim, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("weights: int4\noverrides: {'*.fc2': {weights: int8}, '*.fc1': {weights: null}}")

    outcome = qsim_("evaluate", "opt-tiny", "--recipe", str(tmp_path / "r.yaml"), "--limit", "1", *SHORT)

    lines = outcome.stdout.splitlines()
    assert {"otherwise at *.fc2: weights channel(int8)", "otherwise at *.fc1: weights as they are"} <= set(lines)


@pytest.mark.parametrize(
    ("arithmetic", "sites", "declined"),
    [
        ("int8", 24, "model.decoder.layers.0.self_attn:matmul.0 with token(int8) and token(int8)"),
        ("fp8", 0, "model.decoder.layers.0.self_attn.q_proj with token(int8) and channel(int8)"),
    ],
)
def test_an_arithmetic_that_is_named_says_how_many_took_it_and_which_did_not(
    arithmetic: str, sites: int, declined: str, qsim_: Qsim
) -> None:
    outcome = qsim_("evaluate", "opt-tiny", "--precision", "w8a8", "--arithmetic", arithmetic, "--limit", "1", *SHORT)

    said = f"{sites} of 33 matmuls were computed in {arithmetic}; the others do not fit it here, like {declined} "
    assert said in joined(outcome.stdout)


def test_a_result_is_no_recipe_and_a_recipe_no_result(qsim_: Qsim, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("weights: int4")
    (tmp_path / "r.json").write_text('{"schema_version": 1}')

    swapped = (
        qsim_("evaluate", "--recipe", str(tmp_path / "r.json")),
        qsim_("evaluate", "--from", str(tmp_path / "r.yaml")),
    )

    assert [outcome.stderr for outcome in swapped] == [
        f"Error: {tmp_path}/r.json is a result, not a recipe; --from {tmp_path}/r.json runs it again\n",
        f"Error: {tmp_path}/r.yaml is no qsim result: it is not JSON\n",
    ]


def test_the_table_says_what_a_reader_needs(qsim_: Qsim) -> None:
    outcome = qsim_("evaluate", "opt-tiny", "--plugin", "abfp", "--limit", "2", *SHORT)

    assert outcome.exit_code == 0
    for row in ("float32 perplexity", "simulated perplexity", "ratio", "seconds, in all"):
        assert row in outcome.stdout
    assert "32 of 33" in outcome.stdout
    assert [line.split()[1:4:2] for line in outcome.stdout.splitlines()[2:5]] == [
        ["weights", "abfp(int4)"],
        ["activations", "abfp(int4)"],
        ["outputs", "cast(bf16)"],
    ]
    assert "no confidence intervals: 2 samples are too few\n" in outcome.stdout
    assert "; of 2 samples only (--limit)" in joined(outcome.stdout)
    assert "left alone: lm_head (--skip none quantizes everything)" in joined(outcome.stdout)
    assert "v's scales are shared over tokens" in joined(outcome.stdout)
    assert "\x1b[" not in outcome.stdout
    assert max(map(len, outcome.stdout.splitlines())) <= 80, "the lines under the table are wrapped"


def test_a_long_name_below_a_table_stays_whole(capsys: pytest.CaptureFixture[str]) -> None:
    path = "/tmp/" + 100 * "x"

    print_below(console(), f"the others copied, to {path}")

    assert capsys.readouterr().out == f"the others copied, to\n{path}\n"


@pytest.mark.parametrize(
    ("command", "headings"),
    [
        ("evaluate", ["Recipe", "Data", "Computation", "Options"]),
        ("finetune", ["Recipe", "Data", "Training", "Computation", "Options"]),
        ("plugins", ["Options"]),
    ],
)
def test_options_stand_under_headings(command: str, headings: list[str], qsim_: Qsim) -> None:
    shown = qsim_(command, "--help").stdout

    assert re.findall(r"^(\w+):$", shown, re.MULTILINE) == headings
    assert shown.count("--help ") == 1


def test_a_result_has_everything_that_its_schema_promises(record: Path) -> None:
    result = json.loads(record.read_text())

    assert set(result) == {
        "schema_version", "model", "adapter", "weights", "recipe", "evaluator", "protocol", "metric", "baseline", "baseline_of", "simulated", "alone",
        "intervals", "samples", "audit", "plugins", "environment", "data", "calibration", "transforms", "warnings", "batch_size", "limit", "seed", "seconds", "cached",
    }  # fmt: skip
    assert result["recipe"] == {
        "weights": "abfp(int4)",
        "activations": "abfp(int8)",
        "outputs": "cast(bf16)",
        "value_axis": "tokens",
        "arithmetic": "auto",
        "transforms": [],
        "skip": ["lm_head"],
        "overrides": {},
    }
    assert set(result["plugins"]) == {"abfp", "core", "evaluators", "fp", "int", "opt", "zoo"}
    assert result["plugins"]["abfp"] == {"distribution": "qsim-abfp", "version": qsim.__version__}
    assert (result["model"], result["adapter"], result["evaluator"]) == ("opt-tiny", "opt", "perplexity(32)")
    assert set(result["audit"]) >= {"sites", "covered", "found", "bits_per_weight", "bits_per_activation"}
    assert set(result["audit"]["sites"][0]) >= {"site", "op", "input", "weight", "output", "arithmetic"}
    assert (result["audit"]["covered"], result["audit"]["found"]) == (32, 33)
    assert result["audit"]["bits_per_weight"] == 4.25
    assert 8.25 <= result["audit"]["bits_per_activation"] < 8.3
    assert set(result["environment"]) == {"python", "platform", "versions", "device", "dtype", "threads"}
    assert len(result["data"]["sha256"]) == 64
    assert (result["samples"], result["intervals"]) == (result["limit"], {})


def test_a_record_runs_again_to_the_same_numbers(qsim_: Qsim, record: Path) -> None:
    outcome = qsim_("evaluate", "--from", record, "--json", "again.json", "--quiet")

    assert (outcome.exit_code, outcome.stderr) == (0, "")
    first, again = qsim.Result.read(record), qsim.Result.read(Path("again.json"))
    assert first.simulated == again.simulated
    assert first.model_dump(exclude={"seconds"}) == again.model_dump(exclude={"seconds"})


def test_a_record_of_other_data_is_not_compared(qsim_: Qsim, record: Path) -> None:
    changed = json.loads(record.read_text())
    changed["data"]["sha256"] = "0" * 64
    Path("changed.json").write_text(json.dumps(changed))

    outcome = qsim_("evaluate", "--from", "changed.json", "--quiet", "--json", "again.json")

    assert outcome.exit_code == 1
    assert "have changed since the record was made (000000000000 then, " in outcome.stderr
    assert not Path("again.json").exists()


def test_a_record_of_other_weights_warns(qsim_: Qsim, record: Path) -> None:
    changed = json.loads(record.read_text())
    changed["weights"] = "0" * 64
    Path("changed.json").write_text(json.dumps(changed))

    outcome = qsim_("evaluate", "--from", "changed.json", "--quiet")

    assert outcome.exit_code == 0
    assert (
        "Warning: the weights of opt-tiny have changed since the record was made (000000000000 then, " in outcome.stderr
    )


def test_a_record_of_another_version_warns(qsim_: Qsim, record: Path) -> None:
    changed = json.loads(record.read_text())
    changed["plugins"]["abfp"]["version"] = "0.0.7"
    Path("changed.json").write_text(json.dumps(changed))

    outcome = qsim_("evaluate", "--from", "changed.json", "--quiet")

    assert outcome.exit_code == 0
    assert f"Warning: plugin 'abfp' was qsim-abfp 0.0.7, now {qsim.__version__}\n" in outcome.stderr


def test_a_record_of_another_machine_warns(qsim_: Qsim, record: Path) -> None:
    changed = json.loads(record.read_text())
    changed["environment"] |= {"device": "meta:7", "threads": 99}
    Path("changed.json").write_text(json.dumps(changed))

    there, here = (qsim_("evaluate", "--from", "changed.json", "--quiet", *more) for more in ([], ["--device", "cpu"]))

    assert there.exit_code == 1
    assert here.exit_code == 0
    assert "Warning: device was meta:7, now cpu: sums may be taken in another order\n" in here.stderr
    assert "Warning: threads was 99, now 1: sums may be taken in another order\n" in here.stderr


def test_a_record_of_a_directory_runs_again_from_elsewhere(
    qsim_: Qsim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(ZOO / "opt-tiny", tmp_path / "mine")
    (tmp_path / "text.txt").write_text("Some words of documentation, said again and again. " * 200)
    first = qsim_("evaluate", "mine", "--weights", "int8", "--data", "text.txt", "--json", "record.json", *QUICK)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    again = qsim_("evaluate", "--from", "../record.json", "--json", "again.json", "--quiet")

    assert (first.exit_code, again.exit_code) == (0, 0), first.output + again.output
    assert qsim.Result.read(Path("again.json")).simulated == qsim.Result.read(tmp_path / "record.json").simulated


def test_names_with_brackets_are_names_and_no_markup(qsim_: Qsim, tmp_path: Path) -> None:
    (tmp_path / "x[").mkdir()
    (tmp_path / "x[" / "b].txt").write_text("Some words of documentation, said again and again. " * 200)

    outcome = qsim_(
        "evaluate", "--weights", "int8", "--data", "x[/b].txt", "--skip", "*.[kq]_proj", "--limit", "2", *SHORT
    )

    assert outcome.exit_code == 0, outcome.output
    assert "x[/b].txt (sha256" in joined(outcome.stdout)
    assert "left alone: *.[kq]_proj (" in joined(outcome.stdout)


def test_a_terminal_that_lacks_a_character_shows_another(tmp_path: Path) -> None:
    command = [*forked.python(), "-m", "qsim_core", "components", "posit"]
    run = subprocess.run(command, capture_output=True, cwd=tmp_path, env={**os.environ, "PYTHONIOENCODING": "ascii"})

    assert (run.returncode, run.stderr) == (0, b"")
    assert run.stdout.startswith(b"posit(bits=8, es=2, rounding=even, seed=0)\n")


@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
def test_closed_standard_streams_end_no_command() -> None:
    command = " ".join(map(shlex.quote, [sys.executable, "-m", "qsim_core", "plugins", "--json"]))

    closed = [subprocess.run(f"{command} {streams}", shell=True).returncode for streams in (">&-", "<&- >&- 2>&-")]

    assert closed == [0, 0]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which Linux has")
@pytest.mark.parametrize("arguments", [["components"], ["plugins", "--json"]])
def test_a_full_disk_under_standard_output_is_one_line(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        run = subprocess.run(
            [*forked.python(), "-m", "qsim_core", *arguments], stdout=full, stderr=subprocess.PIPE, text=True
        )

    assert (run.returncode, run.stderr) == (1, "Error: cannot write the output: No space left on device\n")


def test_json_to_standard_output_is_json_and_nothing_else(qsim_: Qsim) -> None:
    outcome = qsim_("evaluate", "--weights", "int8", "--json", "-", *QUICK)

    result = json.loads(outcome.stdout)
    assert result["recipe"]["weights"] == "channel(int8)"
    assert result["recipe"]["activations"] is None
    assert result["simulated"]["perplexity"] == pytest.approx(result["baseline"]["perplexity"], rel=0.02)


def test_a_recipe_file_and_options_together(qsim_: Qsim) -> None:
    Path("recipe.yaml").write_text(
        "weights: abfp(int4)\nskip: [lm_head, '*.fc1']\noverrides: {'*.fc2': {weights: int8}}\n"
        "evaluate: perplexity(seqlen=64)\n"
    )

    outcome = qsim_("evaluate", "--recipe", "recipe.yaml", "--activations", "int8", "--set", "abfp.n=32", "--dry-run")

    assert yaml.safe_load(outcome.stdout) == {
        "model": "opt-tiny",
        "weights": "abfp(int4, n=32)",
        "activations": "token(int8)",
        "skip": ["lm_head", "*.fc1"],
        "overrides": {"*.fc2": {"weights": "channel(int8)"}},
        "evaluate": "perplexity(64)",
    }


def test_a_dry_run_looks_for_the_hardware(qsim_: Qsim) -> None:
    outcome = qsim_("evaluate", "--precision", "w8a8", "--on", "h999", "--dry-run")

    assert (outcome.exit_code, outcome.stderr.startswith("Error: no hardware 'h999'")) == (1, True)


def test_a_dry_run_prints_a_recipe_that_runs(qsim_: Qsim) -> None:
    dry = qsim_("evaluate", "--plugin", "abfp", "--set", "perplexity.seqlen=64", "--dry-run")
    Path("recipe.yaml").write_text(dry.stdout)

    again = qsim_("evaluate", "--recipe", "recipe.yaml", "--dry-run")

    assert again.stdout == dry.stdout == (
        "model: opt-tiny\nweights: abfp(int4)\nactivations: abfp(int4)\noutputs: cast(bf16)\nskip:\n- lm_head\n"
        "evaluate: perplexity(64)\n"
    )  # fmt: skip


def test_the_path_is_an_option_and_in_the_audit(qsim_: Qsim) -> None:
    arguments = ["evaluate", "--precision", "w8a8", "--limit", "1", "--json", "-"]
    records = [json.loads(qsim_(*arguments, "--arithmetic", path).stdout) for path in ("int8", "float32")]

    assert [record["audit"]["sites"][0]["arithmetic"] for record in records] == ["int8", "float32"]


def test_the_value_axis_is_an_option(qsim_: Qsim) -> None:
    outcome = qsim_("evaluate", "--plugin", "abfp", "--value-axis", "head", "--limit", "1", *SHORT)

    assert outcome.exit_code == 0
    assert "see later ones" not in outcome.stdout


def test_skip_none_quantizes_the_head_too(qsim_: Qsim) -> None:
    outcome = qsim_("evaluate", "--weights", "int8", "--skip", "none", "--json", "-", *QUICK)

    audit = json.loads(outcome.stdout)["audit"]
    assert [site["weight"] for site in audit["sites"]][-1] == "channel(int8)"
    assert audit["skipped"] == []


def test_data_from_a_file_and_the_batch_size_change_nothing_else(qsim_: Qsim) -> None:
    Path("text.txt").write_text("The list object supports comparison; sequences compare item by item. " * 60)
    runs = [
        json.loads(
            qsim_(
                "evaluate", "--weights", "int8", "--data", "text.txt", "--batch-size", size, "--json", "-", "-q"
            ).stdout
        )
        for size in (1, 3)
    ]

    assert runs[0]["data"]["name"] == "text.txt"
    assert runs[0]["simulated"]["perplexity"] == pytest.approx(runs[1]["simulated"]["perplexity"], rel=1e-5)


def test_dtype_is_recorded_and_used(qsim_: Qsim) -> None:
    outcome = qsim_("evaluate", "--weights", "int8", "--dtype", "bfloat16", "--json", "-", *QUICK)

    result = json.loads(outcome.stdout)
    assert result["environment"]["dtype"] == "bfloat16"
    assert {site["arithmetic"] for site in result["audit"]["sites"] if site["op"] == "linear"} == {"bfloat16"}


def test_a_transform_runs_from_the_command_line_and_its_record_again(qsim_: Qsim) -> None:
    """On the outliers ABFP with SmoothQuant loses a tenth; ABFP alone multiplies the perplexity by eight."""
    looked_at = ["--calibration-samples", "8", "--calibration-seqlen", "128"]
    smooth = qsim_(
        "evaluate", "opt-tiny-outliers", "--plugin", "abfp", "--plugin", "smoothquant", *looked_at, "--json", "smooth.json",
        "--limit", "2",
    )  # fmt: skip
    again = qsim_("evaluate", "--from", "smooth.json", "--json", "again.json", "--quiet")

    assert [outcome.exit_code for outcome in (smooth, again)] == [0, 0], smooth.output + again.output
    assert "smoothquant(0.5): 8 layers, largest channel over the median one " in joined(smooth.stdout)
    second, third = (qsim.Result.read(Path(f"{name}.json")) for name in ("smooth", "again"))
    assert second.ratio < 1.15
    assert second.simulated == third.simulated
    assert second.calibration is not None
    assert (second.calibration.name, second.calibration.samples, second.calibration.length) == (
        "zoo: Python's documentation, train split", 8, 128,
    )  # fmt: skip
    assert [r.note for r in second.transforms if r.after is None] == [
        "left alone: model.decoder.embed_tokens.weight is also read by embedding: it is tied"
    ]


def test_components_lists_and_shows(qsim_: Qsim, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    listing, one = qsim_("components"), qsim_("components", "abfp")
    rows = [line for line in listing.stdout.splitlines() if line.startswith("e4m3 ")]
    assert [row.endswith("largest 448, saturating") for row in rows] == [True], "a row is one line, for grep"
    data = json.loads(qsim_("components", "abfp", "--json").stdout)

    assert "e4m3" in listing.stdout
    assert "perplexity" in listing.stdout
    assert listing.stdout.index("\nint9 ") < listing.stdout.index("\nint10 "), "numbers in names are sorted as numbers"
    assert one.stdout.split("\nquantizer of")[0].replace("\n", "") == (
        "abfp(element=int4, n=64, scale=bf16, symmetric=true, range=minmax, rule=divide, static=false, gradient=clipped)"
    )
    assert data[0]["options"][1] == {
        "name": "n",
        "type": "whole number",
        "default": "64",
        "required": False,
        "doc": "elements of a vector that share a scale; the last vector may be short",
    }
    assert "Short for float(4, mantissa=3, specials=fn)." in qsim_("components", "e4m3").stdout


def test_components_table_prints_every_code(qsim_: Qsim) -> None:
    shown = qsim_("components", "e4m3", "--table").stdout
    rows = json.loads(qsim_("components", "float(2, 1)", "--table", "--json").stdout)

    assert shown.startswith("e4m3: 8 bits, -448 to 448\n")
    assert all(f"{code:02x}  {code:08b}  " in shown for code in range(256))
    assert [row["value"] for row in rows] == [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]
    assert rows[9] == {"code": 9, "bits": "1001", "value": -0.5}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["bf16"], 1, "bf16 has 16 bits; a table of codes is printed up to 8"),
        (["abfp"], 1, "'abfp' is a quantizer, not a format (character 1 of 'abfp')"),
        (["e4m4"], 1, "no format 'e4m4'; did you mean 'e4m3'?"),
        ([], 2, "--table needs the NAME of a number format, like e4m3"),
    ],
)
def test_what_has_no_table_says_so(arguments: list[str], code: int, message: str, qsim_: Qsim) -> None:
    outcome = qsim_("components", *arguments, "--table")

    assert (outcome.exit_code, message in outcome.stderr) == (code, True)


def test_plugins_lists_names_distributions_and_versions(qsim_: Qsim) -> None:
    rows = json.loads(qsim_("plugins", "--json").stdout)

    assert {
        "name": "abfp",
        "distribution": "qsim-abfp",
        "version": qsim.__version__,
        "provides": ["components"],
    } in rows
    assert [row["name"] for row in rows] == sorted(row["name"] for row in rows)


WRONG: dict[str, tuple[list[str], str]] = {
    "nothing to do": ([], "nothing to do: say --plugin, --precision, --weights, --activations or --recipe"),
    "unknown plugin": (["--plugin", "abpf"], "no plugin 'abpf' is installed; did you mean 'abfp'?"),
    "unknown format": (["--weights", "int44"], "no quantizer 'int44'; did you mean 'int4'?"),
    "unknown model": (["opt-tinny", "--weights", "int8"], "did you mean 'opt-tiny'?"),
    "no such directory": (["./nowhere", "--weights", "int8"], "there is no directory ./nowhere"),
    "a file as model": (["text.txt", "--weights", "int8"], "text.txt is a file; a model is a directory that save_pretrained wrote"),
    "empty directory": (["empty", "--weights", "int8"], "empty has no config.json; a model is a directory that save_pretrained wrote"),
    "n=0": (["--weights", "abfp(int4, n=0)"], "abfp: n should be greater than 0, not 0"),
    "n=7.5": (["--weights", "abfp(int4, n=7.5)"], "got a number with a fractional part, not 7.5"),
    "negative bits": (["--weights", "int(-4)"], "int: bits should be greater than or equal to 2, not -4"),
    "unknown key": (["--recipe", "unknown.yaml"], "a recipe has no key 'weigths'; did you mean 'weights'?"),
    "not yaml": (["--recipe", "broken.yaml"], "broken.yaml is not YAML: "),
    "no recipe": (["--recipe", "nowhere.yaml"], "cannot read nowhere.yaml: No such file or directory"),
    "text as recipe": (["--recipe", "text.txt"], "text.txt is not a recipe: expected keys and values"),
    "empty data": (["--weights", "int8", "--data", "empty.txt"], "empty.txt is empty: there is no text"),
    "short data": (["--weights", "int8", "--data", "text.txt"], "fewer than one window of 256; lower it: --set perplexity.seqlen=N"),
    "missing data": (["--weights", "int8", "--data", "nowhere.txt"], "there is no file nowhere.txt"),
    "output is a directory": (["--weights", "int8", "--json", "empty"], "cannot write empty: it is a directory; give a file's name"),
    "output is a device": (["--weights", "int8", "--json", "/dev/null"], "cannot write /dev/null: it is not a regular file; `--json -` writes"),
    "empty model": (["", "--weights", "int8"], "an empty name is not a model. There are: bert-tiny, bert-tiny-classifier, codegen-tiny, ddpm-tiny, llama-tiny, minilm, opt-1m, opt-2m, opt-tiny, opt-tiny-outliers, opt-tiny-outliers-everywhere, phi-tiny, qwen3-tiny, vit-tiny"),
    "no quantizer": (["--weights", "perplexity"], "'perplexity' is an evaluator, not a quantizer"),
    "output has no directory": (["--weights", "int8", "--json", "no/where.json"], "cannot write no/where.json: there is no directory no"),
    "pattern without site": (["--weights", "int8", "--skip", "*.fc3"], "pattern '*.fc3' matches no site"),
    "nothing reached": (["--weights", "int8", "--skip", "*"], "weights: channel(int8) reached no site of this model"),
    "unknown dtype": (["--weights", "int8", "--dtype", "float31"], "no dtype 'float31'; did you mean 'float32'? There are: bfloat16, float16, float32, float64"),
    "unknown device": (["--weights", "int8", "--device", "gpu7"], "device 'gpu7' cannot be used: "),
    "calibration that is too short": (["--precision", "w4a8", "--plugin", "smoothquant", "--calibration-seqlen", "999"],
                                      "calibration windows of 999 tokens: the model takes 2 to 256"),
    "calibration data that are not there": (["--precision", "w4a8", "--plugin", "smoothquant", "--calibration-data", "no.txt"],
                                            "there is no file no.txt"),
    "static scales of nothing": (["--weights", "int8", "--static", "mse"],
                                 "--static mse: no format of activations to give static scales; say --precision with it"),
    "static scales by no calibrator": (["--precision", "w4a8", "--static", "mes"], "no calibrator 'mes'; did you mean 'mse'? There are: absmax"),
    "a record that is none": (["--from", "text.txt"], "text.txt is no qsim result: "),
    "a record and options": (["--from", "text.txt", "--weights", "int8"], "--from runs a record as it is; leave weights out"),
    "an evaluator of another field": (["vit-tiny", "--weights", "int8", "--evaluator", "perplexity"],
                                      "perplexity does not fit a ViTForImageClassification; accuracy and fidelity do"),
    "an evaluator of images": (["--weights", "int8", "--evaluator", "accuracy"],
                               "accuracy does not fit an OPTForCausalLM; perplexity, pass_at_k and fidelity do"),
    "what a model wrote": (["--weights", "int8", "--evaluator", "pass_at_k", "--data", "problems.jsonl"], "--allow-code-execution"),
    "samples of a perplexity": (["--weights", "int8", "--save-samples", "pictures"], "perplexity makes no samples that could be saved"),
    "precision": (["--precision", "4bit"], "--precision is written w4a8"),
}  # fmt: skip


def test_a_working_directory_that_was_deleted_is_one_line(qsim_: Qsim) -> None:
    Path.cwd().rmdir()

    run = qsim_("components", "int4")

    assert run.output == "Error: the working directory was deleted; change to another one\n"


def test_static_scales_from_one_option(qsim_: Qsim) -> None:
    static = [
        "evaluate",
        "--precision",
        "w4a8",
        "--static",
        "percentile(97)",
        "--calibration-samples",
        "2",
        "--limit",
        "2",
    ]

    done = qsim_(*static, "--json", "static.json")
    result = json.loads(Path("static.json").read_text())

    assert result["recipe"]["activations"] == "tensor(int8, range=percentile(97.0), static=true)"
    assert result["calibration"]["samples"] == 2
    assert "Warning: model.decoder.layers.0.self_attn.q_proj (input) clips 2.9% of" in done.stderr
    assert result["warnings"][0].startswith("model.decoder.layers.0.self_attn.q_proj (input) clips 2.9% of")


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_gets_one_clear_line_and_writes_nothing(name: str, qsim_: Qsim) -> None:
    arguments, message = WRONG[name]
    Path("empty").mkdir()
    Path("empty.txt").write_text("\n")
    Path("text.txt").write_text("too short")
    Path("unknown.yaml").write_text("weigths: int4\n")
    Path("broken.yaml").write_text("weights: [int4\n")
    Path("problems.jsonl").write_text('{"prompt": "def f(): ", "test": "def check(f): pass", "entry_point": "f"}\n')
    before = sorted(Path().rglob("*"))
    output = [] if "--json" in arguments else ["--json", "out.json"]

    outcome = qsim_("evaluate", *arguments, *output)

    assert outcome.exit_code == 1
    assert message in outcome.stderr
    assert outcome.stderr.startswith("Error: ")
    assert outcome.stderr.count("\n") == 1
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize("arguments", [["--bogus"], ["--batch-size", "0"], ["--limit", "none"], ["a", "b"]])
def test_misused_options_exit_with_2(arguments: list[str], qsim_: Qsim) -> None:
    assert qsim_("evaluate", *arguments).exit_code == 2


def test_a_full_disk_leaves_no_half_of_a_file(tmp_path: Path) -> None:
    """A limit on file size takes the place of a full disk: the kernel answers a write past it with an error too."""

    def small_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    program = (
        "from pathlib import Path; from qsim_core.files import writing; from qsim_core import QsimError\n"
        "try:\n  with writing(Path('out.json')) as file: file.write(b'x' * 5000)\n"
        "except QsimError as error: print(error)"
    )
    run = subprocess.run(
        [sys.executable, "-B", "-c", program], cwd=tmp_path, capture_output=True, text=True, preexec_fn=small_disk
    )

    assert run.stdout == "cannot write out.json: File too large\n"
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    (tmp_path / "out.json").write_text("old")

    with writing(tmp_path / "out.json") as file:
        file.write(b"new")

    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
    assert (tmp_path / "out.json").read_text() == "new"
    assert (tmp_path / "out.json").stat().st_mode & 0o777 == 0o666 & ~_umask()


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, ValueError])
def test_what_is_interrupted_leaves_nothing_behind(interruption: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(interruption), writing(tmp_path / "out.json") as file:
        file.write(b"half")
        raise interruption

    assert list(tmp_path.iterdir()) == []


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_ctrl_c_is_one_line_and_exit_code_130(tmp_path: Path) -> None:
    command = [*forked.python(), "-m", "qsim_core", "evaluate", "--plugin", "abfp"]
    run = subprocess.Popen(
        [*command, "--json", "out.json", "--batch-size", "1", "--evaluator", "perplexity(256, stride=4)"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs ignore SIGINT
    )
    with run:
        for wait in (3, 30):  # Python itself may lose one that comes during an import
            time.sleep(wait if run.poll() is None else 0)
            run.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                _, errors = run.communicate(timeout=20)
                break

    assert run.returncode == 130
    assert errors.endswith("Error: interrupted; nothing was written\n")
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def test_infinite_perplexity_survives_the_record(record: Path, tmp_path: Path) -> None:
    result: Any = qsim.Result.read(record)
    result.simulated["perplexity"] = float("inf")
    result.write(tmp_path / "r.json")

    assert json.loads((tmp_path / "r.json").read_text())["simulated"]["perplexity"] == "Infinity"
    assert qsim.Result.read(tmp_path / "r.json").simulated["perplexity"] == float("inf")
