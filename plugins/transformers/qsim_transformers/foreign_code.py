"""Refuse checkpoints whose own files make the libraries run code, or read other weights than those beside them.

A configuration may name attention of a hub (`org/kernel`), which is code. An index of shards may name pickles, or files
of another directory. A configuration of an adapter leads to another model.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qsim_core.errors import ModelError
from qsim_core.evaluation.configuration import read_configuration
from qsim_transformers.hub import offline_unless_reachable

CHOICE = "implementation"
"""The end of the keys by which a configuration chooses the code of attention, experts and the like."""


def check_no_foreign_code(source: str, subfolder: str, weights: str) -> None:
    """Raise `ModelError` for a checkpoint that names code or other weights; `weights` is the name of its file."""
    where = f"{source}/{subfolder}" if subfolder else source
    for key, value in _choices(_read(source, subfolder, "config.json")):
        if "/" in value or ("flash" in value and importlib.util.find_spec("flash_attn") is None):
            raise ModelError(
                f"{where}/config.json names the {key} {value!r}, which is code from a hub; write sdpa or eager there"
            )
    shards = _read(source, subfolder, f"{weights}.index.json").get("weight_map")
    for shard in shards.values() if isinstance(shards, dict) else ():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ModelError(f"{where}/{weights}.index.json names {shard!r}, which is no safetensors file beside it")
    if (Path(where) / "adapter_config.json").is_file():
        raise ModelError(f"{where} holds an adapter for another model; merge it into that model, and save the result")


def _choices(configuration: dict[str, Any], chosen: str = "") -> Iterator[tuple[str, str]]:
    """The implementations that a configuration and its parts choose, by key; `chosen` is the key of a part."""
    for key, value in configuration.items():
        choice = key if key.endswith(CHOICE) else chosen
        if isinstance(value, dict):
            yield from _choices(value, choice)
        elif choice and isinstance(value, str):
            yield choice, value


def _read(source: str, subfolder: str, name: str) -> dict[str, Any]:
    """A file of JSON of a directory or of a model on a hub; empty if there is none."""
    if Path(source).is_dir():
        path = Path(source) / subfolder / name
        return read_configuration(path) if path.is_file() else {}
    from transformers.utils.hub import cached_file

    missing = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    try:
        with offline_unless_reachable(source):
            found = cached_file(source, name, subfolder=subfolder, **missing)
    except (OSError, ValueError):
        return {}  # the library reads none either, or says why
    return read_configuration(Path(found)) if found else {}
