from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.services.swift import Swift, install, running


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swift]:
    """Start a Swift server for this test session. Tests are skipped without one, unless CI sets REQUIRE_SERVICES."""
    try:
        install()
    except (subprocess.CalledProcessError, OSError) as error:
        if os.environ.get("REQUIRE_SERVICES"):
            raise
        pytest.skip(f"Swift cannot be installed here: {error}")
    with running(tmp_path_factory.mktemp("swift")) as swift:
        swift.make_bucket("bucket")
        yield swift


@pytest.fixture
def swift(server: Swift, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Swift:
    """Set the environment variables for the server; no configuration file of the machine's user is read."""
    for name in [n for n in os.environ if n.startswith(("AWS_", "GOOGLE_", "AZURE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in server.environ.items():
        monkeypatch.setenv(name, value)
    return server
