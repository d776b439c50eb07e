"""`qsim cache` shows the files that qsim keeps, and removes those files and no others."""

from __future__ import annotations

import json
import os
import pty
import subprocess
from pathlib import Path

import forked
import pytest
import torch
from click.testing import CliRunner, Result
from qsim_cache.blocks import Blocks
from qsim_cache.made_once import made_once
from qsim_cache.sealing import seal
from torch import nn

from qsim_core.cli.main import main
from qsim_core.files import keep, make_cache_folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's cache with a compiled kernel and a model of the zoo, and with somebody else's files."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("QSIM_CACHE", str(folder))
    make_cache_folder("kernels", "compiled kernels")
    make_cache_folder("zoo", "made of another model")
    for name in ("kernels/0123456789abcdef.so", "zoo/0123456789abcdef/opt-tiny-outliers/config.json", "zoo/mine.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("1234567")
    seal(folder / "zoo" / "0123456789abcdef" / "opt-tiny-outliers")
    return folder


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A work directory with a baseline, statistics and blocks, and with somebody else's files."""
    folder = tmp_path / "work"
    keep(folder / "baseline" / "digest.kept", "metrics", model="opt-tiny", what="perplexity, text, float32")
    keep(folder / "statistics" / "digest.kept", "extremes", model="opt-tiny", what="24 tensors, 32 batches")
    Blocks.of(folder, nn.Linear(2, 2), [torch.ones(1, 2)], "gptq").save(0, nn.Linear(2, 2), {})
    (folder / "baseline" / "notes.txt").write_text("mine")
    (folder / "feedfeedfeedfeed").mkdir()
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["cache", *map(str, arguments)])


def rows(*arguments: object) -> list[tuple[str, str, str]]:
    return [(row["kind"], row["model"], row["what"]) for row in json.loads(run(*arguments, "--json").stdout)]


def test_everything_is_listed(work: Path) -> None:
    assert rows("--work-dir", work) == [
        ("baseline", "opt-tiny", "perplexity, text, float32"),
        ("statistics", "opt-tiny", "24 tensors, 32 batches"),
        ("blocks", "", "1 finished by a transform"),
        ("kernels", "", "compiled kernels"),
        ("zoo", "opt-tiny-outliers", "made of another model"),
    ]


def test_the_table_has_sizes_and_ages_and_says_where(cache: Path) -> None:
    os.utime(cache / "kernels" / "0123456789abcdef.so", (0, 0))

    lines = run().stdout.splitlines()

    assert lines[0].split() == ["kind", "model", "what", "size", "age"]
    assert lines[1].split()[:5] == ["kernels", "compiled", "kernels", "7", "bytes"]
    assert int(lines[1].split()[5]) > 20_000
    assert " ".join(lines[3:5]).split() == f"2 entries (102 bytes) in {cache}".split()


def test_one_kind_is_cleared_and_the_rest_stays(work: Path) -> None:
    outcome = run("--work-dir", work, "--clear", "baseline", "--yes")

    assert outcome.stdout.startswith("removed 1 entry (")
    assert [kind for kind, _, _ in rows("--work-dir", work)] == ["statistics", "blocks", "kernels", "zoo"]


def test_all_is_cleared_but_what_others_have_put_there(work: Path, cache: Path) -> None:
    outcome = run("--work-dir", work, "--clear", "--yes")

    assert outcome.stdout.startswith("removed 5 entries (")
    assert rows("--work-dir", work) == []
    left = sorted(str(path.relative_to(work.parent)) for path in work.parent.rglob("*") if path.is_file())
    assert left == ["cache/kernels/.qsim", "cache/zoo/.qsim", "cache/zoo/mine.txt", "work/baseline/notes.txt"]
    assert (work / "feedfeedfeedfeed").is_dir()


def test_neither_a_file_of_others_nor_what_a_link_leads_to_is_removed(work: Path, cache: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    theirs = [elsewhere / "block-000.pt", elsewhere / "0123456789abcdef.so", elsewhere / "digest.kept"]
    theirs += [elsewhere / ".qsim", elsewhere / "photo.jpg", cache / "zoo" / "0123456789abcdef" / "notes.txt"]
    for number in ("000", "1-draft", "001.pt.tex"):
        theirs.append(work / "0123456789abcdef" / f"block-{number}.txt")
    for path in theirs:
        path.parent.mkdir(exist_ok=True)
        path.write_text("theirs")
    (work / "fedcba9876543210").symlink_to(elsewhere)
    (cache / "models").symlink_to(elsewhere)
    (work / "0123456789abcdef" / "block-007.pt").symlink_to(elsewhere / "photo.jpg")

    assert run("--work-dir", work, "--clear", "--yes").exit_code == 0

    assert all(path.read_text() == "theirs" for path in theirs)
    assert (work / "0123456789abcdef" / "block-007.pt").is_symlink()
    assert rows("--work-dir", work) == []


def test_without_a_terminal_nothing_is_removed_unasked(cache: Path) -> None:
    outcome = run("--clear", "kernels")

    assert (outcome.exit_code, outcome.stdout) == (1, "")
    assert (
        outcome.stderr == "Error: 1 entry (7 bytes) would be removed, and there is no terminal to ask on; say --yes\n"
    )
    assert len(rows()) == 2


@pytest.mark.parametrize(("answer", "left"), [("n", 2), ("y", 1)])
def test_on_a_terminal_it_asks(answer: str, left: int) -> None:
    mine, theirs = pty.openpty()
    process = subprocess.Popen(
        [*forked.python(), "-m", "qsim_core", "cache", "--clear", "zoo"],
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    os.write(mine, f"{answer}\n".encode())
    _, said = process.communicate()

    assert (process.returncode, len(rows())) == (answer == "n", left)
    assert said.startswith(b"Remove 1 entry (95 bytes)? [y/N]: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--clear", "kernel"],
            "nothing of kind 'kernel' is kept; did you mean 'kernels'? "
            "There are: all, baseline, blocks, kernels, statistics, zoo",
        ),
        (
            ["--clear", "baseline"],
            "--clear baseline needs the work directory; name it with --work-dir",
        ),
        (["--work-dir", "nowhere"], "there is no directory nowhere"),
    ],
)
def test_what_cannot_be_done_is_said(arguments: list[str], message: str) -> None:
    outcome = run(*arguments)

    assert (outcome.exit_code, outcome.stderr) == (1, f"Error: {message}\n")


def test_a_damaged_entry_is_listed_and_can_go(work: Path) -> None:
    (file,) = (work / "baseline").glob("*.kept")
    file.write_bytes(b"\xff\xfe")

    assert rows("--work-dir", work)[0] == ("baseline", "", "damaged")
    assert run("--work-dir", work, "--clear", "baseline", "-y").exit_code == 0


def test_a_run_whose_blocks_are_cleared_keeps_the_next_ones(work: Path) -> None:
    checkpoint = Blocks.of(work, nn.Linear(2, 2), [torch.zeros(1, 2)], "gptq")
    checkpoint.save(0, nn.Linear(2, 2), {})
    run("--work-dir", work, "--clear", "--yes")

    checkpoint.save(1, nn.Linear(2, 2), {"reports": []})

    assert checkpoint.restore(0, nn.Linear(2, 2)) is None
    assert checkpoint.restore(1, nn.Linear(2, 2)) == {"reports": []}


def test_what_was_made_once_is_read_by_later_runs_until_it_is_cleared() -> None:
    contents = iter(["first", "second"])

    made = [made_once("tokens", "tokens of a text", b"a text", lambda: next(contents)) for _ in range(2)]
    run("--clear", "tokens", "--yes")
    made.append(made_once("tokens", "tokens of a text", b"a text", lambda: next(contents)))

    assert made == ["first", "first", "second"]
    assert ("tokens", "", "tokens of a text") in rows()


def test_many_entries_that_differ_by_their_digest_share_a_row(cache: Path) -> None:
    for number in range(300):
        (cache / "kernels" / f"{number:016x}.so").write_text("12345")

    lines = [line.split() for line in run().stdout.splitlines()]

    assert ["kernels", "301", "of:", "compiled", "kernels", "1.5", "kB", "0", "s"] in lines
    assert len(lines) < 8


def test_blocks_that_have_changed_places_are_computed_again(work: Path) -> None:
    blocks = Blocks.of(work, nn.Linear(2, 2), [torch.zeros(1, 2)], "gptq")
    other = Blocks.of(work, nn.Linear(2, 2), [torch.zeros(1, 2)], "awq")
    for index in (0, 1):
        blocks.save(index, nn.Linear(2, 2), {})
    other.save(0, nn.Linear(2, 2), {})
    first, second, third = (next(b.directory.glob(f"*{i}.pt")) for b, i in ((blocks, 0), (blocks, 1), (other, 0)))

    second.write_bytes(first.read_bytes())
    third.rename(first)

    assert [blocks.restore(index, nn.Linear(2, 2)) for index in (0, 1)] == [None, None]
