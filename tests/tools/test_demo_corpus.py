"""Tests of the demo corpus (format, splits, determinism), and of the report that the demo prints after its run."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

pytest.importorskip("espeakng_loader", reason="the optional extra `demo` is not installed")

from model.errors import UserError
from tools import demo
from tools.demo_corpus import EMOTIONS, SIZES, SPEAKERS, main, write_corpus
from tools.demo_sounds import SOUNDS, make_sound
from trainer.scoring.questions import is_correct

SCALE = 0.05


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("demo") / "corpus", seed=3, scale=SCALE).parent


@pytest.fixture(scope="module")
def rows(corpus: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (corpus / "demo.jsonl").read_text().splitlines()]


def test_rows_describe_their_files(corpus: Path, rows: list[dict[str, Any]]) -> None:
    assert len({row["id"] for row in rows}) == len(rows)
    required = {"id", "audio", "sampling_rate", "channels", "duration", "task", "split", "instruction", "answer"}
    required |= {"subset", "label_kind", "group", "source", "licence", "sha256"}
    for row in rows:
        assert required <= set(row), row["id"]
        path = corpus / row["audio"]
        info = soundfile.info(path)
        assert (info.samplerate, info.channels, info.format) == (16_000, 1, "FLAC")
        assert info.duration == pytest.approx(row["duration"], abs=1e-3)
        assert hashlib.sha256(path.read_bytes()).hexdigest() == row["sha256"]
    assert {row["task"] for row in rows} == {"asr", "sqa", "er", "aqa", "ac"}


def test_clips_contain_sound_and_are_not_clipped(corpus: Path, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        wave, _ = soundfile.read(corpus / row["audio"])
        assert 0.05 < np.abs(wave).max() < 1.0, row["id"]


def test_answers_are_correct_by_the_scorer_and_among_the_choices(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert is_correct(row["answer"], row), row["id"]
        if "choices" in row:
            assert row["answer"] in row["choices"]
        if "references" in row:
            assert row["answer"] in row["references"]


def test_splits_share_no_speaker_and_no_sound_setting(rows: list[dict[str, Any]]) -> None:
    splits: dict[str, set[str]] = {}
    for row in rows:
        splits.setdefault(row["group"], set()).add(row["split"])
    assert all(len(s) == 1 for s in splits.values())
    voices = Counter(voice for group in SPEAKERS.values() for voice in {speaker.voice for speaker in group})
    assert set(voices.values()) == {1}


def test_full_sizes() -> None:
    asr = {split: sizes["digits"] + sizes["digit_strings"] + sizes["commands"] for split, sizes in SIZES.items()}
    assert asr["train"] == 1200 and asr["test"] == 40
    assert all(150 <= SIZES["train"][task] <= 300 for task in ("sqa", "er", "aqa", "ac"))


@pytest.mark.slow
def test_same_seed_same_bytes_and_other_seed_other_bytes(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    # Both corpora are made in one process, in which espeak-ng could keep state from the first one.
    def read(seed: int) -> list[dict[str, Any]]:
        path = write_corpus(tmp_path / str(seed), seed=seed, scale=SCALE)
        return [json.loads(line) for line in path.read_text().splitlines()]

    assert read(3) == rows
    assert [row["sha256"] for row in read(4)] != [row["sha256"] for row in rows]


def test_existing_corpus_is_reused_and_foreign_files_are_not_touched(corpus: Path, tmp_path: Path) -> None:
    before = (corpus / "demo.jsonl").stat().st_mtime_ns
    write_corpus(corpus, seed=3, scale=SCALE)
    assert (corpus / "demo.jsonl").stat().st_mtime_ns == before
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="contains files that are not a demo corpus"):
        write_corpus(tmp_path)
    assert main([str(tmp_path)]) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(UserError, match="pip install espeakng-loader"):
        write_corpus(tmp_path / "out")


def test_yes_no_answers_and_emotions_are_balanced(rows: list[dict[str, Any]]) -> None:
    train = [row for row in rows if row["split"] == "train"]
    emotions = Counter(row["answer"] for row in train if row["task"] == "er")
    assert set(emotions) == set(EMOTIONS) and max(emotions.values()) - min(emotions.values()) <= 1
    answers = Counter(row["answer"] for row in train if row.get("qtype") == "yesno")
    assert abs(answers["yes"] - answers["no"]) <= 1


def test_sad_is_slower_than_happy(rows: list[dict[str, Any]]) -> None:
    seconds = {e: [r["duration"] for r in rows if r["task"] == "er" and r["answer"] == e] for e in EMOTIONS}
    assert np.mean(seconds["sad"]) > 1.2 * np.mean(seconds["happy"])


@pytest.mark.parametrize("name", list(SOUNDS))
def test_sounds(name: str) -> None:
    first, again, other = (make_sound(name, setting, np.random.default_rng(1)) for setting in (0, 0, 1))
    assert first.dtype == np.float32 and np.abs(first).max() == pytest.approx(1.0)
    assert 0.6 * 16_000 - 1 <= len(first) <= 16_000
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def finished_run(folder: Path, rows: list[dict[str, Any]]) -> None:
    test = [row for row in rows if row["split"] == "test"]
    for step, right in ((0, False), (90, True)):
        records = [
            {
                "key": row["id"],
                "task": row["task"],
                "subset": row["subset"],
                "reference": row["answer"],
                "hypothesis": row["answer"] if right else "",
            }
            for row in test
        ]
        text = "".join(json.dumps(r) + "\n" for r in records)
        (folder / f"predictions-test-step{step}.jsonl").write_text(text)
    summary = {"wer_before": 1.0, "wer_after": 0.21, "loss_first": 6.2, "loss_last": 0.4, "num_ranks": 2}
    (folder / "summary.json").write_text(json.dumps({**summary, "seconds": 12.0}))


def test_report_shows_the_last_predictions(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    finished_run(tmp_path, rows)
    text = demo.report(tmp_path, rows, "files  runs/demo/")
    assert "1.00 before  ->  0.21 after" in text
    assert "captions" in text and "1.000" in text  # the score of step 90, because step 0 had no correct answer
    assert "runs/demo/" in text and max(map(len, text.splitlines())) <= 120


def use_trainer_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the demo run in `folder`, with the package `trainer` in this folder."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(demo, "module_command", lambda module, *a: [sys.executable, "-m", module, *a])


def test_demo_reports_a_failed_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], corpus: Path
) -> None:
    use_trainer_of(tmp_path, monkeypatch)
    monkeypatch.setattr(demo, "write_corpus", lambda out: corpus / "demo.jsonl")
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "__init__.py").touch()
    (tmp_path / "trainer" / "__main__.py").write_text("import sys; sys.exit(3)")
    old = tmp_path / "runs" / "demo"
    (old / "corpus").mkdir(parents=True)
    (old / "summary.json").write_text("{}")
    assert demo.main(["seeed=3"]) == 2 and (old / "summary.json").exists()
    assert "seeed: unknown key" in capsys.readouterr().err
    assert demo.main([]) == 3
    assert "training failed (exit code 3)" in capsys.readouterr().err
    # The earlier run is kept, and the failed run leaves no files.
    assert (old / "summary.json").exists() and (old / "corpus").exists()
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["demo"]


def test_demo_runs_the_training_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], corpus: Path, rows: list[Any]
) -> None:
    use_trainer_of(tmp_path, monkeypatch)
    monkeypatch.setattr(demo, "write_corpus", lambda out: corpus / "demo.jsonl")
    ready = tmp_path / "ready"
    ready.mkdir()
    finished_run(ready, rows)
    (tmp_path / "runs" / "demo" / "corpus").mkdir(parents=True)
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "__init__.py").touch()
    (tmp_path / "trainer" / "__main__.py").write_text(
        "import shutil, sys\n"
        "given = ['demo_cpu', 'name=demo', 'train.run_dir=runs', 'data.root=runs/demo/corpus', 'seed=3']\n"
        "assert sys.argv[1:] == given\n"
        "shutil.copytree('ready', 'runs/demo', dirs_exist_ok=True)\n"
    )
    assert demo.main(["seed=3"]) == 0
    assert "0.21 after" in capsys.readouterr().out
