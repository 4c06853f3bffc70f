"""Tests of `earshot evaluate`: answers do not depend on batches or processes, and a killed evaluation keeps them."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from model.errors import UserError
from tests.tools.exportable import INSTRUCTION, STEP, messages_about, write_conversations, write_manifest, write_run
from tools import compare, evaluate, export, make_shards, transcribe
from trainer.data.decode import decode_audio
from trainer.data.stored import open_stored
from trainer.evaluation.offline import worker
from trainer.evaluation.offline.answer import Answerer, Decoding, Question, Windows
from trainer.evaluation.offline.model import Loaded, find_model, load_model
from trainer.evaluation.offline.pool import open_workers
from trainer.evaluation.predictions import Prediction, read_predictions
from trainer.scoring.tasks import TASKS

ROOT = Path(__file__).parents[2]
NUM = 12


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a folder with `run` and its export `out`, and the path to a manifest with one broken sample."""
    root = tmp_path_factory.mktemp("evaluate")
    write_run(root / "run")
    assert export.main([str(root / "run"), str(root / "out"), "--dtype", "fp32"]) == 0
    manifest = write_manifest(root, NUM)
    (root / "3-0.flac").write_bytes(b"no audio")
    return root, manifest


def ask(*arguments: object) -> int:
    return evaluate.main([str(a) for a in arguments])


def in_batches_of_two(made: tuple[Path, Path]) -> worker.Request:
    origin = find_model(made[0] / "out")
    decoding = Decoding(origin.max_new_tokens, 1, 2, 600.0)
    return worker.Request(origin, str(made[1]), None, (), None, "fp32", Windows.of(origin, 30.0, 1.0), decoding)


def said(folder: Path) -> dict[str, str]:
    return {p.key: p.hypothesis for p in read_predictions(folder / "predictions.jsonl")}


def questions(manifest: Path) -> list[Question]:
    stored = open_stored(str(manifest))
    found = []
    for item, encoded in zip(stored.items, stored.read(range(len(stored.items))), strict=True):
        if item.key != "s3":
            assert isinstance(encoded, tuple)
            files, meta = encoded
            in_windows = TASKS[meta["task"]].is_transcription
            found.append(Question(item.key, tuple(decode_audio(file) for file in files), meta, in_windows))
    return found


@pytest.fixture(scope="module")
def loaded(made: tuple[Path, Path]) -> Loaded:
    return load_model(find_model(made[0] / "out"), torch.float32, torch.device("cpu"))


@pytest.mark.slow
def test_rotary_frequencies_of_a_checkpoint_stay_in_fp32(made: tuple[Path, Path], loaded: Loaded) -> None:
    half = load_model(find_model(made[0] / "run"), torch.bfloat16, torch.device("cpu")).model
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.llm.model.rotary_emb.inv_freq.equal(loaded.model.llm.model.rotary_emb.inv_freq)


@pytest.fixture(scope="module")
def alone(made: tuple[Path, Path], loaded: Loaded) -> dict[str, str]:
    """Return the answers of transformers' `generate` to all usable samples, one sample per call, by key."""
    found = {}
    for q in questions(made[1]):
        inputs = loaded.processor(audio=[list(q.clips)] if q.clips else None, text=q.meta["instruction"])
        (found[q.key],) = loaded.processor.batch_decode(
            loaded.model.generate(**inputs, generation_config=loaded.settings)
        )
    assert len(set(found.values())) > 2, "equal answers would prove nothing"
    return found


@pytest.mark.slow
def test_export_and_checkpoint_give_the_answers_of_generate(
    made: tuple[Path, Path], alone: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, manifest = made
    for name, model in (("a", root / "out"), ("b", root / "run"), ("c", root / "run/checkpoints" / f"step-{STEP:08d}")):
        code = ask(model, "--data", manifest, "--out", tmp_path / name, "--batch-size", 5, "--json")
        shown = capsys.readouterr()
        assert code == 1 and said(tmp_path / name) == alone, shown.err
        last = json.loads(shown.out.splitlines()[-1])
        assert last["num_samples"] == NUM - 1 and last["num_skipped"] == {"broken": 1}
        assert {(s["task"], s["metric"]) for s in last["scores"]} >= {("asr", "wer"), ("sqa", "token_f1")}
    skipped = [json.loads(line) for line in (tmp_path / "a" / "skipped.jsonl").read_text().splitlines()]
    assert [(s["key"], s["reason"]) for s in skipped] == [("s3", "broken")]
    names = {p.name for p in (tmp_path / "a").iterdir()}
    assert {"predictions.jsonl", "scores.json", "scores.csv", "report.html", "scores.png"} <= names
    assert compare.main([str(tmp_path / name / "predictions.jsonl") for name in "ab"]) == 0


@pytest.mark.slow
def test_shards_and_two_processes_give_the_same_answers(
    made: tuple[Path, Path], alone: dict[str, str], tmp_path: Path
) -> None:
    root, manifest = made
    assert make_shards.main([str(manifest), str(tmp_path / "shards"), "--max-skipped", "0.5"]) == 0
    arguments = ["--data", tmp_path / "shards", "--batch-size", 2, "--nproc", 2, "--tasks", "asr", "sqa"]
    assert ask(root / "out", *arguments, "--out", tmp_path / "a") == 0
    wanted = {p.key for p in questions(manifest) if p.meta["task"] != "text"}
    assert said(tmp_path / "a") == {key: text for key, text in alone.items() if key in wanted}


@pytest.mark.slow
def test_workers_answer_every_request(made: tuple[Path, Path], alone: dict[str, str]) -> None:
    request = in_batches_of_two(made)
    stored, places = worker.open_wanted(request)
    jobs = worker.batches(request, stored, places)
    with open_workers(request, 2) as run:
        for part in (jobs, jobs[:1], jobs):
            outcomes = [o for found in run(part) for o in found]
            assert {o.key for o in outcomes} == {stored.items[place].key for job in part for place in job}
            answers = {o.key: o.hypothesis for o in outcomes if isinstance(o, Prediction)}
            assert answers.items() <= alone.items() and len(answers) >= len(outcomes) - 1


def test_workers_that_die_while_loading_are_a_one_line_error(made: tuple[Path, Path]) -> None:
    request = in_batches_of_two(made)
    with open_workers(request, 2) as run:
        outcomes = run([[0], [1], [2], [4], [5]])
        before = multiprocessing.active_children()
        for process in before:
            process.kill()
        with pytest.raises(UserError, match=r"a worker ended with exit code -9; .* lower --nproc or --batch-size"):
            list(outcomes)
        for process in before:
            process.join()
        with pytest.raises(UserError, match="a worker ended with exit code -9"):
            list(run([[0]]))


@pytest.mark.slow
def test_killed_evaluation_continues_with_the_missing_samples(
    made: tuple[Path, Path], alone: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    root, manifest = made
    out = tmp_path / "a"
    command = [
        sys.executable,
        "-m",
        "tools.evaluate",
        root / "out",
        "--data",
        manifest,
        "--out",
        out,
        "--batch-size",
        "1",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [str(a) for a in command], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 120
        while not (out / "predictions.jsonl").exists() or not (out / "predictions.jsonl").stat().st_size:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with (out / "predictions.jsonl").open("r+b") as file:  # makes the last line incomplete
        lines = file.read().splitlines(keepends=True)
        file.truncate(sum(map(len, lines[:2])) - 5)
    kept = len(lines[:2]) - 1
    decoded: list[str] = []
    inner = Answerer.__call__

    def watched(self: Answerer, asked: Any) -> Any:
        decoded.extend(q.key for q in asked)
        return inner(self, asked)

    monkeypatch.setattr(worker.Answerer, "__call__", watched)
    assert ask(root / "out", "--data", manifest, "--out", out, "--json") == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["num_resumed"] == kept
    assert len(decoded) == NUM - 1 - kept and said(out) == alone
    decoded.clear()
    assert ask(root / "out", "--data", manifest, "--out", out) == 1
    assert decoded == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--max-new-tokens", "3"], "contains an evaluation with max_new_tokens = 5, not 3"),
        (["--tasks", "ast"], "--tasks ast: tasks are asr"),
        (["--tasks", "er"], "has samples only of the tasks asr, sqa, text"),
        (["--split", "train"], "no samples of split 'train'"),
        (["--window", "0"], "--window 0: must be at least"),
        (["--window", "4", "--overlap", "3"], "--overlap 3: must be between 0 and half a window"),
        (["--nproc", "0"], "--nproc 0: must be at least 1"),
    ],
)
def test_user_error_is_one_line(
    made: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory, capsys: Any, arguments: list[str], words: str
) -> None:
    root, manifest = made
    out = root / "once"
    if not out.exists():
        assert ask(root / "out", "--data", manifest, "--out", out) == 1
    capsys.readouterr()
    assert ask(root / "out", "--data", manifest, "--out", out, *arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0], lines


def test_folder_without_model_is_a_one_line_error(made: tuple[Path, Path], tmp_path: Path, capsys: Any) -> None:
    root, manifest = made
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm" / "config.json").write_text("{}")
    for model, words in ((tmp_path, "holds no checkpoint"), (tmp_path / "llm", "it is an LLM without encoders")):
        assert ask(model, "--data", manifest, "--out", tmp_path / "x") == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and words in lines[0], lines


def test_beams_equal_those_of_transformers(made: tuple[Path, Path], loaded: Loaded) -> None:
    own = [q for q in questions(made[1]) if q.meta["task"] == "asr"]
    answers = Answerer(loaded, Windows(30.0, 5.0), Decoding(5, 3, 64, 600.0))(own)
    for question, answer in zip(own, answers, strict=True):
        inputs = loaded.processor(audio=[list(question.clips)], text=question.meta["instruction"])
        rows = loaded.model.generate(**inputs, generation_config=loaded.settings, num_beams=3)
        assert isinstance(answer, Prediction) and answer.hypothesis == loaded.processor.batch_decode(rows)[0]


def test_the_last_turn_of_a_conversation_is_answered(made: tuple[Path, Path], loaded: Loaded, tmp_path: Path) -> None:
    talk = write_conversations(tmp_path)
    assert ask(made[0] / "out", "--data", talk, "--out", tmp_path / "found") == 0
    rows = {p.key: p for p in read_predictions(tmp_path / "found" / "predictions.jsonl")}
    for index in range(2):
        names = [str(tmp_path / f"talk-{index}-{clip}.flac") for clip in range(3 - index)]
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
        inputs = loaded.processor.apply_chat_template(messages_about(names), **options)
        ids = loaded.model.generate(**inputs, generation_config=loaded.settings)
        found = rows[f"talk{index}"]
        assert found.hypothesis == loaded.processor.batch_decode(ids)[0]
        assert found.meta["instruction"] == "it  is b" and found.meta["answer"] == "c"


class Hearing(Answerer):
    """A model that hears every word. The value of an audio sample is the number of the word that is spoken there."""

    def _ask(self, prompts: Any, progress: Any = None) -> list[list[int]]:
        return [sorted(set(np.round(p.clips[0]).astype(int).tolist())) for p in prompts]


@pytest.mark.parametrize("num_words", [7, 20, 61, 200])
def test_long_recording_has_no_lost_and_no_duplicated_words(loaded: Loaded, num_words: int) -> None:
    wave = np.repeat(np.arange(num_words), 8000).astype(np.float32)  # two words per second
    spoken = [f"w{i}" for i in range(num_words)]

    class Processor:
        def count_tokens_of(self, turns: Any) -> int:
            return 1

        def count_audio_tokens(self, clip_samples: int) -> int:
            return 0

        def batch_decode(self, rows: Any) -> list[str]:
            return [" ".join(spoken[i] for i in row) for row in rows]

    hearing = Hearing(replace(loaded, processor=Processor()), Windows(10.0, 2.0), Decoding(100, 1, 4, 600.0))  # type: ignore[arg-type]
    (answer,) = hearing([Question("long", (wave,), {"instruction": "Transcribe.", "answer": ""}, in_windows=True)])
    assert isinstance(answer, Prediction)
    assert answer.hypothesis.split() == spoken
    assert answer.num_windows == (1 if num_words <= 20 else -(-(num_words * 8000 - 32000) // (160000 - 32000)))


@pytest.mark.parametrize("num", ["0", "-4"])
def test_an_answer_of_no_tokens_is_refused(capsys: pytest.CaptureFixture[str], num: str) -> None:
    assert transcribe.main(["nowhere", "--max-new-tokens", num]) == 2
    assert capsys.readouterr().err == f"error: --max-new-tokens {num}: must be at least 1\n"


def test_transcribe_reports_windows(made: tuple[Path, Path], tmp_path: Path, capsys: Any) -> None:
    root, _ = made
    long = tmp_path / "long.wav"
    soundfile.write(long, 0.1 * np.random.default_rng(1).standard_normal(40000), 16000)
    capsys.readouterr()
    code = transcribe.main([str(root / "out"), str(long), "--window", "1", "--prompt", f"{INSTRUCTION} a"])
    shown = capsys.readouterr()
    assert code == 0 and shown.out.count("\n") == 1
    assert "2.5 s were transcribed in 3 overlapping windows of 1 s; no audio was cut off" in shown.err
