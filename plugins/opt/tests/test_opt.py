"""The OPT adapter on directories that the test writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from safetensors.torch import load_file, save_file

import qsim_core as qsim
from qsim_core.testing import AdapterSuite

SMALL: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "ffn_dim": 24,
    "word_embed_proj_dim": 16,
    "max_position_embeddings": 32,
}
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write()` makes a directory as `save_pretrained` writes it, with a tokenizer."""
    from tokenizers import Tokenizer, models
    from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

    def directory(**options: Any) -> Path:
        folder = tmp_path / "model"
        with torch.random.fork_rng():
            torch.manual_seed(0)
            OPTForCausalLM(OPTConfig(**SMALL)).save_pretrained(folder, **options)
        vocabulary = {chr(32 + n): n for n in range(60)}
        tokenizer = Tokenizer(models.BPE(vocabulary, []))
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=" ").save_pretrained(folder)
        return folder

    return directory


def load(folder: Path, dtype: torch.dtype = torch.float32) -> qsim.LoadedModel:
    return qsim.parse("opt").load(str(folder), dtype)  # type: ignore[no-any-return]


def test_what_save_pretrained_wrote_is_loaded_bit_for_bit(write: Write) -> None:
    folder = write()

    loaded = load(folder)

    saved = load_file(folder / "model.safetensors")
    state = loaded.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in saved.items())
    assert not loaded.model.training
    assert loaded.tokenizer("AB").input_ids == [33, 34]


def test_sharded_weights_are_loaded(write: Write) -> None:
    assert load(write(max_shard_size="4KB")).model is not None


def test_a_hub_name_goes_through_from_pretrained(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's cache on disk replaces the network: the name resolves like that of a downloaded model."""
    folder = write()
    commit = "0123456789abcdef0123456789abcdef01234567"
    entry = tmp_path / "hub" / "models--acme--tiny"
    (entry / "refs").mkdir(parents=True)
    (entry / "refs" / "main").write_text(commit)
    (entry / "snapshots").mkdir()
    folder.rename(entry / "snapshots" / commit)
    for module in ("huggingface_hub.constants", "transformers.utils.hub"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    from qsim_core.evaluation.locate import locate

    located = locate("acme/tiny", qsim.Host())

    assert located.adapter.name == "opt"
    assert located.adapter.load(located.source, torch.float32).model.config.hidden_size == 16


def break_nothing(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def break_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def break_corrupt(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def break_missing(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.decoder.layers.0.fc1.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def break_shape(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.decoder.layers.0.fc1.weight"] = torch.ones(3, 3)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def break_nan(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.decoder.layers.0.fc1.weight"][2, 3] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def break_width(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": "abc"}))


def break_tokenizer(folder: Path) -> None:
    for file in folder.iterdir():
        if file.name not in ("config.json", "generation_config.json", "model.safetensors"):
            file.unlink()


def break_family(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_nothing, "{} has no weights: expected model.safetensors"),
        (break_pickle, "{} holds pytorch_model.bin, a pickle, which could run code; load it where you trust it and "
         "save_pretrained() it as safetensors"),
        (break_corrupt, "the weights of {} are corrupt: "),
        (break_missing, "the weights of {} lack model.decoder.layers.0.fc1.weight"),
        (break_shape, "weight model.decoder.layers.0.fc1.weight of {} has shape (3, 3), its configuration says (24, 16)"),
        (break_width, "{} cannot be loaded: "),
        (break_tokenizer, "{} has no tokenizer: expected tokenizer.json; save the tokenizer beside the model"),
        (break_nan, "weight model.decoder.layers.0.fc1.weight holds NaN or Inf; nothing measured on this model would "
         "mean much"),
    ],
)  # fmt: skip
def test_a_damaged_directory_is_one_clear_line(write: Write, damage: Callable[[Path], None], message: str) -> None:
    folder = write()
    damage(folder)

    with pytest.raises(qsim.ModelError) as error:
        load(folder)

    assert str(error.value).startswith(message.format(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_config, "{0}/config.json is not the JSON of a model's configuration"),
        (break_family, "{0} is a 'mamba' model, no adapter of that name is installed (there are: "),
        (lambda folder: (folder / "config.json").unlink(), "{0} has no config.json; a model is a directory that "
         "save_pretrained wrote"),
    ],
)  # fmt: skip
def test_a_directory_that_names_no_family_we_know(write: Write, damage: Callable[[Path], None], message: str) -> None:
    from qsim_core.evaluation.locate import locate

    folder = write()
    damage(folder)

    with pytest.raises(qsim.ModelError) as error:
        locate(str(folder), qsim.Host())

    assert str(error.value).startswith(message.format(folder))


def test_lm_head_is_left_alone_by_default() -> None:
    assert qsim.parse("opt").skip == ("lm_head",)


class TestOpt(AdapterSuite):
    text = "opt"

    def checkpoint(self, folder: Path) -> Path:
        return architectures.write(architectures.pretrained("OPTForCausalLM", **SMALL)(), folder)
