"""A hub that is not there is asked once, not six times for each file."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from qsim_core.cli.hub import offline_unless_reachable


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.invalid")  # a name that never resolves, RFC 6761


def offline(model: str | None, *data: str | None) -> bool:
    offline_unless_reachable(model, *data)
    return os.environ.pop("HF_HUB_OFFLINE", None) == "1"


def test_a_name_that_only_the_hub_may_know(tmp_path: Path) -> None:
    assert offline("acme/model")
    assert offline(None, "wikitext:wikitext-2-raw-v1")
    assert not offline("opt-tiny", str(tmp_path))


def test_a_hub_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://localhost:1")

    assert not offline("acme/model")


def test_behind_a_proxy_names_are_the_proxys_to_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://localhost:1")

    assert not offline("acme/model")


def test_who_has_said_it_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(socket, "getaddrinfo", None)

    offline_unless_reachable("acme/model")

    assert os.environ["HF_HUB_OFFLINE"] == "0"
