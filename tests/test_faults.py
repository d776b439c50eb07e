"""Whatever qsim keeps: after a kill, a full disk or a flipped bit it is what was written, or it is made again.

`benchmarks/faults.py` does the same to whole runs.
"""

from __future__ import annotations

import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from qsim_cache.sealing import damaged, seal, sealed
from torch import nn

import qsim_core as qsim
from qsim_core.files import keep, kept, read_checked, write_checked, writing

ROOT = Path(__file__).parent.parent
FLIPS = 60


def flipped(path: Path, seed: int = 0) -> Iterator[int]:
    """Flip one bit of a file after another, each of the file as it was."""
    whole, draw = path.read_bytes(), random.Random(seed)
    for _ in range(FLIPS):
        bit = draw.randrange(8 * len(whole))
        path.write_bytes(whole[: bit // 8] + bytes([whole[bit // 8] ^ 1 << bit % 8]) + whole[bit // 8 + 1 :])
        yield bit
    path.write_bytes(whole)


def test_a_value_that_was_kept_is_read_back_as_it_was_or_not_at_all(tmp_path: Path) -> None:
    path, value = tmp_path / "entry.kept", {"scale": torch.arange(20.0), "names": ["q", "k"], "loss": 0.5}
    keep(path, value, model="opt", what="scales")

    assert str(kept(path)) == str(value)
    assert all(kept(path) is None for _ in flipped(path))
    assert str(kept(path)) == str(value)


def test_checked_content_is_read_back_as_it_was_or_not_at_all(tmp_path: Path) -> None:
    write_checked(tmp_path / "library.so", bytes(range(256)))

    assert read_checked(tmp_path / "library.so") == bytes(range(256))
    assert all(read_checked(tmp_path / "library.so") is None for _ in flipped(tmp_path / "library.so"))


@pytest.mark.parametrize("name", ["weights.bin", "sha256.json"])
def test_a_flipped_bit_in_a_sealed_folder_is_noticed(name: str, tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(bytes(100))
    (tmp_path / "empty").touch()
    seal(tmp_path)
    before = sealed(tmp_path)

    assert damaged(tmp_path, "weights.bin") == []
    for bit in flipped(tmp_path / name):
        assert damaged(tmp_path, "weights.bin") or sealed(tmp_path) == before, bit  # in the layout of the JSON


def test_a_file_that_was_not_sealed_or_has_gone_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").touch()
    assert damaged(tmp_path) == ["sha256.json"]

    seal(tmp_path)
    assert damaged(tmp_path, "state.bin") == ["state.bin"]

    (tmp_path / "weights.bin").unlink()
    assert damaged(tmp_path) == ["weights.bin"]


def test_a_file_of_an_earlier_version_is_made_again_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "entry.kept").write_bytes(b'content\n{"sha256": "0123"}')

    assert read_checked(tmp_path / "entry.kept") is None
    assert caplog.messages == []


def test_flipped_bits_in_a_work_directory_change_no_output(tmp_path: Path) -> None:
    def outputs() -> Any:
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8)), torch.randn(64, 16)
        recipe = qsim.Recipe.of({"weights": "int4", "activations": "tensor(int8, static=true)", "transforms": ["gptq"]})
        qsim.simulate(model, recipe, calibration=[x], run=qsim.Run(work_dir=tmp_path))
        return model(x).tolist()

    expected, draw = outputs(), random.Random(0)
    files = [path for path in sorted(tmp_path.rglob("*")) if path.is_file()]
    for count in range(6):
        path = draw.choice(files)
        next(flipped(path, count))
        assert outputs() == expected, path
    assert {path.suffix for path in files} == {".pt"}


WRITER = """
import sys
from pathlib import Path
from qsim_core.files import writing
print("ready", flush=True)
while True:
    for letter in (b"a", b"b"):
        with writing(Path(sys.argv[1])) as file:
            for _ in range(50):
                file.write(letter * 2**16)
"""


def test_a_process_that_is_killed_while_it_writes_leaves_one_whole_file_and_no_other(tmp_path: Path) -> None:
    path, draw = tmp_path / "file", random.Random(0)
    for _ in range(5):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(draw.uniform(0, 0.1))
        writer.send_signal(signal.SIGKILL)
        writer.communicate()

        assert list(tmp_path.iterdir()) in ([], [path])
        if path.exists():
            assert path.read_bytes() in (b"a" * 50 * 2**16, b"b" * 50 * 2**16)


@contextmanager
def full_disk(most: int) -> Iterator[None]:
    """No file may grow beyond `most` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("most", [0, 10, 1000, 5000])
def test_on_a_full_disk_nothing_is_kept_and_the_run_goes_on(
    most: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with full_disk(most):
        keep(tmp_path / "entry.kept", torch.zeros(10_000))

    assert caplog.messages[0].startswith("nothing is kept for later runs: cannot write ")
    assert list(tmp_path.iterdir()) == []


def test_on_a_full_disk_the_old_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text("old")

    refused = pytest.raises(qsim.QsimError, match="^cannot write .*result.json: File too large$")
    with full_disk(1000), refused, writing(path) as file:
        file.write(bytes(10_000))

    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("result.json", "old")]


@pytest.mark.slow
def test_whole_runs_are_killed_and_their_bits_flipped_without_another_number() -> None:
    script = ROOT / "benchmarks" / "faults.py"

    done = subprocess.run([sys.executable, str(script), "--kills", "3", "--flips", "6"], capture_output=True, text=True)

    assert done.returncode == 0, done.stdout + done.stderr
