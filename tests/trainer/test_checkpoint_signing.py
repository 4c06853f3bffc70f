"""Tests that a process with a key only loads checkpoints signed with this key, even if all checksums match."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model.errors import UserError
from tests.tools.exportable import STEP, write_run
from tools import checkpoints, export
from trainer.checkpoint.catalog import damage_of
from trainer.checkpoint.folder import LocalFolder
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.origin import open_origin
from trainer.checkpoint.reader import MANIFEST, STATE, DamagedError, hash_file, read_manifest
from trainer.checkpoint.signing import VARIABLE, signing_key

KEY = "0123456789abcdef" * 4


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv(VARIABLE, raising=False)
    write_run(tmp_path / "run")
    return tmp_path / "run"


def folder_of(run: Path) -> LocalFolder:
    return LocalFolder(run / "checkpoints" / f"step-{STEP:08d}")


def sign(run: Path, monkeypatch: pytest.MonkeyPatch) -> LocalFolder:
    monkeypatch.setenv(VARIABLE, KEY)
    assert checkpoints.main([str(run), "sign"]) == 0
    return folder_of(run)


def test_unsigned_checkpoints_are_refused_everywhere(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(VARIABLE, KEY)
    for arguments in ([str(run)], [str(run), "verify"]):
        assert checkpoints.main(arguments) == 2
    assert export.main([str(run), str(tmp_path / "out")]) == 2
    messages = capsys.readouterr().err.splitlines()
    assert len(messages) == 3 and all("is not signed with the key in EARSHOT_CHECKPOINT_KEY" in m for m in messages)
    with pytest.raises(UserError, match="not signed"):
        open_origin(str(run), exported=False)


@pytest.mark.slow
def test_signed_checkpoints_are_read_with_and_without_the_key(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = sign(run, monkeypatch)
    assert capsys.readouterr().out == f"step {STEP}: signed\n"
    assert damage_of(folder) is None and export.main([str(run), str(tmp_path / "a")]) == 0
    capsys.readouterr()
    assert checkpoints.main([str(run), "sign"]) == 0 and capsys.readouterr().out == ""  # it is already signed
    monkeypatch.setenv(VARIABLE, KEY[::-1])
    with pytest.raises(UserError, match="not signed"):
        read_manifest(folder)
    monkeypatch.delenv(VARIABLE)
    assert damage_of(folder) is None and export.main([str(run), str(tmp_path / "b")]) == 0


def change_state(folder: LocalFolder) -> None:
    path = folder.path / STATE
    path.write_text(path.read_text().replace('"step": 40', '"step": 41'))


def forged(manifest: Manifest, folder: LocalFolder, cryptographic: bool) -> str:
    files = {**manifest.files, STATE: hash_file(folder, STATE, cryptographic)}
    return replace(manifest, files=files).dumps()


@pytest.mark.parametrize("cryptographic", [False, True])
@pytest.mark.parametrize("keep_signature", [False, True])
def test_a_forged_manifest_is_refused(
    run: Path, monkeypatch: pytest.MonkeyPatch, cryptographic: bool, keep_signature: bool
) -> None:
    """Check a checkpoint whose state was changed and whose checksums were updated, but without the key."""
    folder = sign(run, monkeypatch)
    before = json.loads((folder.path / MANIFEST).read_text())
    change_state(folder)
    text = forged(read_manifest(folder), folder, cryptographic)
    if keep_signature:
        text = json.dumps({**json.loads(text), "hmac": before["hmac"]})
    (folder.path / MANIFEST).write_text(text)
    with pytest.raises(UserError, match="not signed"):
        read_manifest(folder)
    monkeypatch.delenv(VARIABLE)
    assert damage_of(folder) is None  # without a key, the forgery is not detected


def test_a_changed_file_is_damage(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sign(run, monkeypatch)
    change_state(folder)
    assert damage_of(folder) == f"{STATE} has a different checksum than when it was written"


def test_a_signature_without_cryptographic_checksums_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(run)
    text = read_manifest(folder).dumps(KEY.encode())
    monkeypatch.setenv(VARIABLE, KEY)
    (folder.path / MANIFEST).write_text(text)
    with pytest.raises(DamagedError, match="not all of its files have a SHA-256"):
        read_manifest(folder)


@pytest.mark.parametrize("signature", [None, 7, "", "ä", "0" * 64, []])
def test_any_other_signature_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch, signature: Any) -> None:
    folder = sign(run, monkeypatch)
    tree = json.loads((folder.path / MANIFEST).read_text())
    (folder.path / MANIFEST).write_text(json.dumps({**tree, "hmac": signature}))
    with pytest.raises(UserError, match="not signed"):
        read_manifest(folder)


def test_a_damaged_checkpoint_is_not_signed(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    change_state(folder_of(run))
    monkeypatch.setenv(VARIABLE, KEY)
    assert checkpoints.main([str(run), "sign"]) == 1
    assert "not signed: state.json has a different checksum" in capsys.readouterr().out


def test_a_short_key_is_a_one_line_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "secret")
    with pytest.raises(UserError, match="has 6 characters, which is too short") as caught:
        signing_key()
    assert "secret" not in str(caught.value)
