"""Files of data that are archives: how much they hold is not known until they are unpacked."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from qsim_evaluators.text import read_lines, read_text

import qsim_core as qsim


@pytest.mark.parametrize("ending", [".csv", ".json", ".jsonl", ".parquet"])
def test_an_archive_that_is_called_a_file_of_rows_is_not_unpacked(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{ending}"
    path.write_bytes(gzip.compress(bytes(2**20)))

    with pytest.raises(qsim.DataError, match="rows.* is an archive; unpack it, and name the file of rows$"):
        read_text(str(path), "perplexity", "test")


def test_a_compressed_file_is_unpacked_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qsim_evaluators.text.LARGEST", 2**20)
    (tmp_path / "rows.gz").write_bytes(gzip.compress(bytes(2**21)))

    with pytest.raises(qsim.DataError, match="rows.gz unpacks to more than"):
        read_lines(tmp_path / "rows.gz")
