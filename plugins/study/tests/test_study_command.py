"""`qsim study` in a shell."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from qsim_core.cli.main import main

TEXT = str(Path(__file__).parents[3] / "README.md")


def study(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["study", *arguments])


def test_a_dry_run_lists_the_cells_of_a_grid_without_a_file() -> None:
    run = study("--plugin", "abfp", "--vary", "abfp.n=16,32", "--vary", "model=opt-tiny,codegen-tiny", "--dry-run")

    assert run.output.splitlines() == [
        "model=opt-tiny, abfp.n=16",
        "model=opt-tiny, abfp.n=32",
        "model=codegen-tiny, abfp.n=16",
        "model=codegen-tiny, abfp.n=32",
        "4 cells",
    ]


def test_options_say_it_for_all_cells_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "formats.yaml").write_text("models: [opt-tiny]\nvary: {weights: [int4, int8]}\nlimit: 16\n")

    run = study(str(tmp_path / "formats.yaml"), "--limit", "2", "--outputs", "bf16", "--dry-run", "--json", "-")

    cells = json.loads(run.output)
    assert [(cell["circumstances"]["limit"], cell["recipe"]["outputs"]) for cell in cells] == [(2, "cast(bf16)")] * 2


def test_rows_and_tables_are_written(tmp_path: Path) -> None:
    files = {name: str(tmp_path / name) for name in ("out", "rows.json", "rows.csv")}

    run = study("opt-tiny", "--vary", "weights=int4,int99", "--output", files["out"], "--data", TEXT, "--limit", "1")
    assert run.exit_code == 1  # nothing runs as long as a recipe is wrong

    run = study(
        "opt-tiny", "--vary", "weights=int4", "--output", files["out"], "--data", TEXT, "--limit", "1",
        "--json", files["rows.json"], "--csv", files["rows.csv"],
    )  # fmt: skip

    (row,) = json.loads(Path(files["rows.json"]).read_text())["rows"]
    assert row["recipe"] == "weights=int4"
    assert f"{row['simulated']:.5g}" in run.output
    assert str(row["simulated"]) in Path(files["rows.csv"]).read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["opt-tiny", "--vary", "weights"], "--vary is written KEY=VALUE,VALUE"),
        (["opt-tiny", "--vary", "weights=int4"], "say where results go: --output DIR"),
        (["opt-tiny", "--vary", "weihgts=int4", "--dry-run"], "did you mean 'weights'?"),
        (["opt-tiny", "--vary", "weights=int4", "-o", "x", "--dask", "local", "--slurm", "2"], "name one of"),
        (["opt-tiny", "--vary", "weights=int4", "-o", "x", "--difference", "half"], "is a share like 0.5%"),
        (["missing.yaml", "--dry-run"], "cannot read missing.yaml"),
        (["opt-tiny", "--vary", "weights=int4", "-o", "x", "--data", "missing.txt"], "there is no file missing.txt"),
    ],
)
def test_a_wrong_command_ends_in_one_line(arguments: list[str], message: str) -> None:
    run = study(*arguments)

    assert run.exit_code != 0
    assert message in run.output.splitlines()[-1]


def test_a_study_without_any_result_says_why_and_fails(tmp_path: Path) -> None:
    run = study(str(tmp_path / "missing"), "--vary", "weights=int4", "--output", str(tmp_path / "out"), "--no-report")

    assert run.exit_code == 1
    assert "there is no directory" in " ".join(run.output.split())
    assert "rank" not in run.output
