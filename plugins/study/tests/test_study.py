"""A study computes its cells, goes on where it was interrupted, and says what failed."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path
from typing import Any

import forked
import pytest
from qsim_study import Processes, Slurm, Specification, Study, study
from qsim_study.comparison import comparable
from qsim_study.executors import InProcess
from qsim_study.folder import Folder
from qsim_study.table import doubts, write_csv, write_parquet

import qsim_core as qsim
from qsim_core.components.host import installed

TEXT = str(Path(__file__).parents[3] / "README.md")
EVALUATE = "perplexity(seqlen=16)"
SMALL: dict[str, Any] = {
    "models": ["opt-tiny"],
    "recipe": {"evaluate": EVALUATE},
    "vary": {"weights": ["int4", "int8"]},
    "data": TEXT,
    "limit": 2,
}


def numbers(found: Study) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in found.rows]


@pytest.fixture
def quick_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are forks of one process that has imported the libraries."""
    monkeypatch.setattr("sys.executable", forked.executable())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Study]:
    folder = tmp_path_factory.mktemp("study")
    return folder, study(SMALL, folder)


def test_a_cell_has_the_numbers_of_an_evaluation(whole: tuple[Path, Study]) -> None:
    recipe = {"model": "opt-tiny", "weights": "int4", "evaluate": EVALUATE}

    alone = qsim.evaluate(recipe, data=TEXT, run=qsim.Run(limit=2))

    assert whole[1].rows[0]["simulated"] == alone.simulated["perplexity"]
    assert whole[1].rows[0]["bits_per_weight"] == alone.audit.bits_per_weight


def test_a_study_that_is_done_computes_nothing(whole: tuple[Path, Study]) -> None:
    written = {file: file.stat().st_mtime_ns for file in (whole[0] / "cells").iterdir()}

    again = study(SMALL, whole[0])

    assert again.rows == whole[1].rows
    assert {file: file.stat().st_mtime_ns for file in (whole[0] / "cells").iterdir()} == written


def test_a_damaged_cell_is_computed_again(whole: tuple[Path, Study], tmp_path: Path) -> None:
    study(SMALL, tmp_path)
    first, *_ = (tmp_path / "cells").iterdir()
    content = bytearray(first.read_bytes())
    content[len(content) // 2] ^= 1
    first.write_bytes(content)

    assert numbers(study(SMALL, tmp_path)) == numbers(whole[1])


def test_a_study_with_more_cells_goes_on_in_its_folder(whole: tuple[Path, Study]) -> None:
    wider = SMALL | {"vary": {"weights": ["int4", "int8", "int6"]}}

    found = study(wider, whole[0])

    assert found.rows[:2] == whole[1].rows
    assert len(found.rows) == 3


def test_processes_give_the_same_numbers(quick_workers: None, whole: tuple[Path, Study], tmp_path: Path) -> None:
    found = study(SMALL, tmp_path, executor=Processes(2))

    assert numbers(found) == numbers(whole[1])
    assert len({entry.worker for entry in found.entries.values()} - {""}) >= 1


@pytest.mark.slow
def test_jobs_give_the_same_numbers(whole: tuple[Path, Study], tmp_path: Path) -> None:
    pytest.importorskip("submitit")

    found = study(SMALL, tmp_path, executor=Slurm(1, cluster="local"))

    assert numbers(found) == numbers(whole[1])


def test_a_model_that_does_not_load_fails_and_others_run(tmp_path: Path) -> None:
    found = study(
        SMALL | {"models": [str(tmp_path / "missing"), "opt-tiny"], "vary": {"weights": ["int4"]}}, tmp_path / "out"
    )

    missing, measured = found.rows
    assert "there is no directory" in missing["failure"]
    assert "failure" not in measured


def test_a_recipe_that_does_not_fit_is_a_row_with_its_reason(tmp_path: Path) -> None:
    found = study(
        SMALL | {"recipe": {"skip": ["nothing.*"], "evaluate": EVALUATE}, "vary": {"weights": ["int4"]}}, tmp_path
    )

    assert "matches no site" in found.rows[0]["failure"]


KILLED = """
import os, signal
from contextlib import contextmanager
import qsim_core as qsim
from qsim_study import study

@contextmanager
def count(total, done, description):
    yield lambda text: os.kill(os.getpid(), signal.SIGKILL)

study({spec!r}, {folder!r}, run=qsim.Run(count=count))
"""
"""A study that is killed when its first cell is done."""


def test_a_study_killed_in_the_middle_goes_on(whole: tuple[Path, Study], tmp_path: Path) -> None:
    program = KILLED.format(spec=SMALL, folder=str(tmp_path))
    assert subprocess.run([*forked.python(), "-c", program]).returncode == -signal.SIGKILL
    done = len(list(tmp_path.glob("cells/*.jsonl")))

    assert numbers(study(SMALL, tmp_path)) == numbers(whole[1])
    assert done == 1


MORTAL = """
import os, signal
from pathlib import Path
import qsim_core as qsim

class KillsOnce(qsim.Transform):
    name = "kills_once"

    def apply(self, model, context):
        next(model.parameters()).mul_(2)
        try:
            Path({mark!r}).open("x")
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)

@qsim.hookimpl
def qsim_transforms():
    return [KillsOnce]
"""
"""A plugin whose transform kills the first process that applies it."""


@pytest.fixture
def mortal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install the plugin for this process and those that it starts; return the file that marks the kill."""
    place, mark = tmp_path / "installed", tmp_path / "killed"
    info = place / "qsim_mortal-1.0.dist-info"
    info.mkdir(parents=True)
    (place / "qsim_mortal.py").write_text(MORTAL.format(mark=str(mark)))
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: qsim-mortal\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[qsim]\nmortal = qsim_mortal\n")
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.setenv("PYTHONPATH", str(place))
    return mark


@pytest.mark.parametrize("many", [1, 2])
def test_a_process_that_is_killed_is_started_again(
    many: int, quick_workers: None, mortal: Path, tmp_path: Path
) -> None:
    specification = SMALL | {"recipe": SMALL["recipe"] | {"transforms": ["kills_once"]}}

    found = study(specification, tmp_path / "out", executor=Processes(many), host=qsim.Host())

    assert mortal.exists()
    assert numbers(found) == numbers(study(specification, tmp_path / "again", host=qsim.Host()))


def test_a_cell_that_kills_its_process_fails(tmp_path: Path) -> None:
    folder = Folder.make(tmp_path, Specification.of(SMALL), Specification.of(SMALL).cells(installed()), installed())
    key = next(iter(folder.cells))
    code = f"import os\nfrom pathlib import Path\nfrom qsim_study.folder import Folder\nwith Folder.open(Path({str(tmp_path)!r})).claim({key!r}): os.kill(os.getpid(), 9)"
    for _ in range(2):
        subprocess.run([*forked.python(), "-c", code])

    with folder.claim(key) as mine:
        assert not mine
    entry = folder.entry(key)
    assert entry is not None
    assert "died, 2 times" in str(entry.failure)


def test_two_workers_do_not_compute_the_same_cell(tmp_path: Path) -> None:
    cells = Specification.of(SMALL).cells(installed())
    first = Folder.make(tmp_path, Specification.of(SMALL), cells, installed())
    key = next(iter(first.cells))

    with first.claim(key) as mine, Folder.open(tmp_path).claim(key) as other:
        assert (mine, other) == (True, False)


def test_a_cell_that_another_process_gave_up_is_computed(tmp_path: Path) -> None:
    folder = Folder.make(tmp_path, Specification.of(SMALL), Specification.of(SMALL).cells(installed()), installed())
    claimed = next(iter(folder.cells))
    computed = InProcess().run(folder, installed(), qsim.Run())

    with folder.claim(claimed):
        other = next(computed)

    assert [other, *computed] == [key for key in folder.cells if key != claimed] + [claimed]
    assert [entry.failure for entry in folder.entries().values()] == [None, None]


def test_a_folder_of_another_study_is_an_error(whole: tuple[Path, Study]) -> None:
    with pytest.raises(qsim.QsimError, match="holds another study, 'study'"):
        study(SMALL | {"name": "other", "vary": {"weights": ["e2m1"]}}, whole[0])


def test_a_folder_with_other_files_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()

    with pytest.raises(qsim.QsimError, match="is not empty and holds no study"):
        study(SMALL, tmp_path)


def test_a_million_cells_have_to_be_allowed(tmp_path: Path) -> None:
    grid = {key: list(range(1, 101)) for key in ("limit", "seed", "batch_size")}

    with pytest.raises(qsim.QsimError, match="1,000,000 cells are many"):
        study({"models": ["opt-tiny"], "recipe": {"weights": "int4"}, "vary": grid}, tmp_path)


def test_samples_are_added_until_comparisons_are_decided(tmp_path: Path) -> None:
    spec = {
        "models": ["opt-tiny"],
        "vary": {"weights": ["int2", "int8", "int7"]},
        "recipe": {"evaluate": "perplexity(seqlen=16)"},
    }

    found = study(spec, tmp_path, until_decided=True, difference=0.005)

    coarse, fine, close = found.rows
    assert coarse["samples"] < fine["samples"] == close["samples"]
    assert (coarse["rank"], coarse["tied"]) == (3, False)


@pytest.mark.parametrize("weights", ["int4", "int(4, rounding=stochastic)"])
def test_a_look_at_more_samples_has_the_numbers_of_a_study_of_as_many(weights: str, tmp_path: Path) -> None:
    spec = SMALL | {"vary": {"weights": [weights]}, "batch_size": 3}
    for limit in (5, 8):
        longer = study(spec | {"limit": limit}, tmp_path / "looks")

    at_once = study(spec | {"limit": 8}, tmp_path / "once")

    assert [one.scores for one in longer.entries.values()] == [one.scores for one in at_once.entries.values()]


def test_draws_of_calibration_are_a_spread_of_their_own(tmp_path: Path) -> None:
    spec = SMALL | {
        "recipe": {"weights": "int8", "activations": "tensor(int6, static=true)", "evaluate": EVALUATE},
        "vary": {"calibration_seed": [0, 1, 2]},
        "calibration_samples": 1,
        "calibration_seqlen": 16,
    }

    rows = study(spec, tmp_path).rows

    assert len({row["spread over calibration_seed"] for row in rows}) == 1
    assert rows[0]["spread over calibration_seed"] > 0


def test_rows_are_written_as_tables(whole: tuple[Path, Study], tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    write_csv(whole[1].rows, tmp_path / "rows.csv")
    write_parquet(whole[1].rows, tmp_path / "rows.parquet")

    frames = [
        pandas.read_csv(tmp_path / "rows.csv"),
        pandas.read_parquet(tmp_path / "rows.parquet"),
        whole[1].to_dataframe(),
    ]

    assert [list(frame["simulated"]) for frame in frames] == [[row["simulated"] for row in whole[1].rows]] * 3


def test_cells_of_other_weights_are_said_and_not_compared(tmp_path: Path) -> None:
    found = study(SMALL | {"vary": {"weights": ["int4", "int8"]}, "limit": 16}, tmp_path)
    first, second = found.entries.values()
    assert first.result is not None
    changed = first.model_copy(update={"result": first.result.model_copy(update={"weights": "another"})})

    assert comparable(first, second)
    assert not comparable(changed, second)
    assert "had different weights" in doubts([changed, second])[0]


def test_warnings_of_results_stand_in_their_rows(tmp_path: Path) -> None:
    spec = SMALL | {"recipe": {"activations": "cast(e2m1)", "evaluate": EVALUATE}, "vary": {"weights": ["int8"]}}

    (row,) = study(spec, tmp_path).rows

    assert "cast(e2m1)" in row["warnings"]
