"""Tests of `tools.spoken_text`, which makes synthetic speech from the texts of a kit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import soundfile

from tools import spoken_text
from tools.spoken_text import main, sentences
from trainer.data.manifest import read_manifest
from trainer.scoring.text import DIGIT_WORDS


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    """Write a kit with a few texts, one of which is the answer of a test sample, and return its folder."""
    texts = tmp_path / "kit" / "text"
    texts.mkdir(parents=True)
    book = 'He said: "No!" I saw the sea. It was blue;\nand the boat, which\nwe had bought there, '
    book += "went on and on to the east."
    (texts / "botchan.txt").write_text(book, encoding="utf-8")
    captions = 'id,caption\n1,a dog barks twice\n2,"a bell, rings"\n3,5 men talk loudly\n'
    (texts / "audiocaps_test.csv").write_text(captions)
    rows = [{"split": "test", "answer": "I saw the sea."}, {"split": "train", "answer": "a dog barks twice"}]
    (tmp_path / "kit" / "asr.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "kit"


def test_sentences_are_short_readable_and_not_held_out(kit: Path) -> None:
    assert sentences(kit) == [
        "A bell, rings.",
        "A dog barks twice.",
        "And the boat.",
        "It was blue.",
        "Went on and on to the east.",
        "Which we had bought there.",
    ]


@pytest.mark.parametrize("has_flite", [False, True])
def test_the_manifest_can_be_trained_on(
    kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_flite: bool
) -> None:
    if has_flite and shutil.which("flite") is None:
        pytest.skip("flite is not installed")
    if not has_flite:
        monkeypatch.setattr(spoken_text.shutil, "which", lambda name: None)
    outs = [tmp_path / "one", tmp_path / "two"]
    for out in outs:
        assert main([str(kit), str(out), "--sentences", "4", "--digits", "3"]) == 0
    manifests = [(out / "spoken.jsonl").read_text() for out in outs]
    assert manifests[0] == manifests[1], "the same seed must give the same speech"
    rows = [json.loads(line) for line in manifests[0].splitlines()]
    assert len(rows) == 7 and len(read_manifest(outs[0] / "spoken.jsonl")) == 7
    assert {row["split"] for row in rows} == {"train"}
    assert all(set(row["answer"].split()) <= set(DIGIT_WORDS) for row in rows if row["subset"] == "digits")
    assert has_flite or all(row["group"].startswith("espeak-") for row in rows)
    for row in rows:
        samples, rate_hz = soundfile.read(outs[0] / row["audio"])
        assert rate_hz == 16000 and abs(len(samples) / rate_hz - row["duration"]) < 0.001
        assert 0.2 < row["duration"] < 6 and 0.4 < abs(samples).max() < 0.6


def test_a_folder_without_texts_is_a_one_line_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path}/text/botchan.txt: no such file; KIT must be the kit's folder, with a subfolder named text\n"
    )
