"""What is made once is read from the user's cache by later runs, and where nothing can be kept each run makes it."""

from __future__ import annotations

from pathlib import Path

import pytest
from qsim_cache.made_once import made_once


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QSIM_CACHE", str(tmp_path / "cache"))


def test_what_was_made_of_other_bytes_is_made_again() -> None:
    made = [made_once("tokens", "tokens of a text", text, lambda text=text: text) for text in (b"one", b"two")]

    assert made == [b"one", b"two"]


def test_what_cannot_be_kept_is_made_by_each_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("QSIM_CACHE", str(tmp_path / "file"))
    contents = iter(["first", "second"])

    made = [made_once("tokens", "tokens of a text", b"a text", lambda: next(contents)) for _ in range(2)]

    assert made == ["first", "second"]
