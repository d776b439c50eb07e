"""Fixtures: a small model, and functions that write a task's definition and documents to one directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import qsim_core as qsim
from qsim_core.evaluation.locate import locate

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _cached_here(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the cache of `datasets` in the temporary directory of the tests."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


@pytest.fixture
def loaded() -> Any:
    """Load `opt-tiny` in float32 and its tokenizer."""
    located = locate("opt-tiny", qsim.Host())
    return located.adapter.load(located.source, torch.float32)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """`write("ends", rows, output_type="multiple_choice", …)` writes a task and returns its directory."""

    def task(name: str, rows: list[dict[str, Any]], **definition: Any) -> Path:
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / f"{name}.jsonl")}}}
        whole = {"task": name, **source, "test_split": "test", "metadata": {"version": 1.5}, **definition}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(whole))
        return tmp_path

    return task


@pytest.fixture
def ends(write: Callable[..., Path]) -> Callable[..., Path]:
    """`ends()` writes a task of sentences with two possible ends each, one of them correct."""

    def task(name: str = "ends", count: int = 6, **definition: Any) -> Path:
        rows = [
            {"start": f"The function returns {n}", "ends": ["when called.", "a list of names"], "label": n % 2}
            for n in range(count)
        ]
        asked = {
            "output_type": "multiple_choice",
            "doc_to_text": "{{start}}",
            "doc_to_choice": "{{ends}}",
            "doc_to_target": "label",
        }
        scored = {"metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}
        return write(name, rows, **{**asked, **scored, **definition})

    return task
