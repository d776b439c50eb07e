"""The hub: where its host has no address, the libraries look in their caches alone."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from architectures import build, write
from huggingface_hub import constants
from qsim_transformers.hub import offline_unless_reachable

NOWHERE = "https://hub.invalid"
"""A host whose name never resolves, RFC 6761."""
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY", "all_proxy")


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", *PROXIES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def offline(name: str) -> bool:
    """True if the libraries are told to make no request for a name."""
    with offline_unless_reachable(name):
        return bool(constants.HF_HUB_OFFLINE)


def test_a_name_that_only_the_hub_may_know() -> None:
    assert offline("acme/model")
    assert not constants.HF_HUB_OFFLINE, "outside of the context the libraries are as they were"


def test_the_name_of_a_directory_needs_no_hub(tmp_path: Path) -> None:
    assert not offline(str(tmp_path))


def test_a_hub_that_can_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://localhost:1")

    assert not offline("acme/model")


def test_behind_a_proxy_it_is_the_proxy_that_resolves_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://localhost:1")

    assert not offline("acme/model")


def test_the_users_own_setting_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(socket, "getaddrinfo", None)

    assert not offline("acme/model")


def test_data_sets_are_looked_for_in_the_cache_alone_too() -> None:
    datasets = pytest.importorskip("datasets")
    before = datasets.config.HF_HUB_OFFLINE

    with offline_unless_reachable("acme/data"):
        assert datasets.config.HF_HUB_OFFLINE

    assert before == datasets.config.HF_HUB_OFFLINE


COUNTING = """
import socket, sys
from qsim_core.cli.main import main

lookups, look_up = [], socket.getaddrinfo

def counting(host, *rest, **options):
    lookups.append(host)
    return look_up(host, *rest, **options)

socket.getaddrinfo = counting
try:
    main(sys.argv[1:])
finally:
    print(lookups.count("hub.invalid"))
"""
"""`qsim`, and how many times it has looked for the hub's address."""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["acme/model"], "Error: no model 'acme/model': it is neither a directory nor a model that a plugin names, and the hub"),
        pytest.param(
            *(["acme"], "Error: no model 'acme': it is neither a directory nor a model that a plugin names, and the hub"),
            marks=pytest.mark.slow,
        ),
        (["{model}", "--data", "acme/data"], "Error: 'acme/data' is not a file, and datasets cannot load it: "),
    ],
)  # fmt: skip
def test_without_a_network_a_command_looks_for_the_hub_once_and_ends_in_one_line(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    """The libraries themselves would try six times for each file, which takes a minute."""
    folder = write(build("GPT-2"), tmp_path / "model")
    words = [word.format(model=folder) for word in arguments]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache")}

    run = subprocess.run(
        [sys.executable, "-c", COUNTING, "evaluate", *words, "--precision", "w8a8"],
        capture_output=True,
        text=True,
        env=environment,
    )

    assert (run.returncode, run.stderr.count("\n")) == (1, 1)
    assert run.stderr.startswith(message)
    assert int(run.stdout) <= 2, "an answer is used again for a minute"
