from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.services.swift import Swift, install, running


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swift]:
    """Start a Swift server for this test session.

    If it cannot be installed, the tests are skipped. In CI, where REQUIRE_SERVICES is set, they fail.
    """
    try:
        install()
    except (subprocess.CalledProcessError, OSError) as error:
        if os.environ.get("REQUIRE_SERVICES"):
            raise
        pytest.skip(f"Swift cannot be installed on this machine: {error}")
    with running(tmp_path_factory.mktemp("swift")) as swift:
        swift.make_bucket("bucket")
        yield swift


@pytest.fixture
def swift(server: Swift, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Swift:
    """Set a client's environment variables for the server, and hide the user's own configuration files."""
    for name in [n for n in os.environ if n.startswith(("AWS_", "GOOGLE_", "AZURE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in server.environ.items():
        monkeypatch.setenv(name, value)
    return server
