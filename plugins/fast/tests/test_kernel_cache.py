"""Compiled kernels in the user's cache: what is damaged, or was written by others, is built again and never loaded."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from qsim_fast.kernels import native

ANSWER = 'extern "C" int answer() {{ return {}; }}'
NOBODY = 65534

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a compiler")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QSIM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels"


def built(tmp_path: Path, run: str, answer: int = 42) -> ctypes.CDLL | None:
    """The library as another run finds it: a source of another name, and so with nothing in memory."""
    source = tmp_path / f"{run}.cpp"
    source.write_text(ANSWER.format(answer))
    with native.only(True):
        return native.compiled(source, 0)


def answer(library: ctypes.CDLL | None) -> int | None:
    return None if library is None else int(library.answer())


def file(cache: Path) -> Path:
    (path,) = cache.glob("*.so")
    return path


@pytest.mark.parametrize(
    "damage",
    [lambda b: b[:2000], lambda b: b[:999] + bytes([b[999] ^ 1]) + b[1000:], lambda b: b[:-1] + b"?", lambda b: b""],
    ids=["cut off", "a bit", "the digest", "empty"],
)
def test_a_damaged_library_is_built_again(damage: Callable[[bytes], bytes], cache: Path, tmp_path: Path) -> None:
    built(tmp_path, "first")
    whole = file(cache).read_bytes()
    file(cache).write_bytes(damage(whole))

    assert answer(built(tmp_path, "second")) == 42
    assert len(file(cache).read_bytes()) == len(whole)


def test_a_library_that_is_cut_off_while_in_use_stays_in_memory(cache: Path, tmp_path: Path) -> None:
    library = built(tmp_path, "first")

    os.truncate(file(cache), 0)

    assert answer(library) == 42


def test_the_folder_is_private(cache: Path, tmp_path: Path) -> None:
    cache.mkdir(parents=True, mode=0o777)

    built(tmp_path, "first")

    assert cache.stat().st_mode & 0o777 == 0o700


def plant(cache: Path, tmp_path: Path) -> None:
    """Put another library, with its digest, in place of the right one."""
    built(tmp_path, "right")
    right = file(cache)
    built(tmp_path, "wrong", answer=666)
    (wrong,) = set(cache.glob("*.so")) - {right}
    os.replace(wrong, right)


def test_a_library_that_others_could_have_written_is_built_again(cache: Path, tmp_path: Path) -> None:
    plant(cache, tmp_path)
    file(cache).chmod(0o666)

    assert answer(built(tmp_path, "next")) == 42
    assert file(cache).stat().st_mode & 0o022 == 0


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away")
def test_what_another_user_has_put_there_is_not_loaded(
    cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plant(cache, tmp_path)
    os.chown(file(cache), NOBODY, NOBODY)
    os.chown(cache, NOBODY, NOBODY)

    assert built(tmp_path, "next") is None
    assert caplog.messages[-1] == (
        f"quantizing in Python: others can write to {cache}; set QSIM_CACHE to a directory of your own"
    )
