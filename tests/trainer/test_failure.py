"""Tests of the report that a rank writes about the error that ends it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from trainer.run.exit_codes import ExitCode
from trainer.run.failure import FaultError, Position, emit_failure
from trainer.telemetry.events import begin_attempt, read_events


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EMFILE, os.strerror(errno.EMFILE)), RuntimeError("[enforce fail] socket: Too many open files")],
)
def test_too_few_file_descriptors_are_named(tmp_path: Path, error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    assert emit_failure(error, Position(), begin_attempt(tmp_path)) == ExitCode.FAILED
    (event,) = [e for e in read_events(tmp_path) if e["event"] == "failed"]
    assert "files here; raise the hard limit (docs/scale.md)" in event["error"] and event["fingerprint"]
    assert event["error"] in caplog.text


def test_a_fault_of_the_machine_is_a_one_line_error_and_has_no_fingerprint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert emit_failure(FaultError("gone"), Position(step=3), begin_attempt(tmp_path)) == ExitCode.FAILED
    (event,) = [e for e in read_events(tmp_path) if e["event"] == "failed"]
    assert event["step"] == 3 and "fingerprint" not in event and "Traceback" not in capsys.readouterr().err
