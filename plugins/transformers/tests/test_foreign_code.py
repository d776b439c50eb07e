"""A checkpoint cannot make the libraries run its code, or read other weights than its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build, write

import qsim_core as qsim
from qsim_core.evaluation.locate import locate


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(build("GPT-2"), tmp_path_factory.mktemp("gpt2"))


def refused(checkpoint: Path, name: str, content: dict[str, Any]) -> str:
    """The message for a checkpoint in which a file holds this, too."""
    path = checkpoint / name
    before = path.read_text() if path.exists() else None
    path.write_text(json.dumps({**json.loads(before or "{}"), **content}))
    try:
        located = locate(str(checkpoint), qsim.Host())
        with pytest.raises(qsim.ModelError) as error:
            located.adapter.load(located.source, torch.float32)
    finally:
        path.unlink() if before is None else path.write_text(before)
    return str(error.value).removeprefix(str(checkpoint.resolve()))


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
@pytest.mark.parametrize("value", ["org/kernel", "org/kernel@main", "org/kernel:forward", "paged|org/kernel"])
def test_code_of_a_hub_is_not_fetched(key: str, value: str, checkpoint: Path) -> None:
    expected = f"/config.json names the {key} {value!r}, which is code from a hub; write sdpa or eager there"

    assert refused(checkpoint, "config.json", {key: value}) == expected
    assert refused(checkpoint, "config.json", {key: {"": "sdpa", "text_config": value}}) == expected
    assert refused(checkpoint, "config.json", {"text_config": {key: value}}) == expected


@pytest.mark.parametrize("shard", ["model.bin", "../model.safetensors", "/tmp/model.safetensors", 7])
def test_an_index_names_safetensors_files_beside_it(shard: Any, checkpoint: Path) -> None:
    content = {"metadata": {}, "weight_map": {"transformer.wte.weight": shard}}

    assert refused(checkpoint, "model.safetensors.index.json", content) == (
        f"/model.safetensors.index.json names {shard!r}, which is no safetensors file beside it"
    )


def test_an_adapter_leads_to_no_other_model(checkpoint: Path) -> None:
    assert refused(checkpoint, "adapter_config.json", {"base_model_name_or_path": "org/other"}) == (
        " holds an adapter for another model; merge it into that model, and save the result"
    )
