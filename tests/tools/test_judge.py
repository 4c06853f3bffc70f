"""Tests of `earshot judge`: its files, counts and costs."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from tools import judge
from trainer.evaluation.predictions import Prediction, read_predictions, write_predictions

PROMPTS: list[str] = []
"""The prompts that the service has received since the start of the test."""


class Handler(BaseHTTPRequestHandler):
    """A judge that gives 5 to the answer "good", no rating to "odd", and 1 to all other answers.

    Of two answers, it prefers "good". If neither is "good", it prefers the first one.
    """

    def do_POST(self) -> None:
        prompt = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][0]["content"]
        PROMPTS.append(prompt)
        if '"odd"' in prompt:
            text = "no idea"
        elif "Answer 2" in prompt:
            text = "Better: 2" if 'Answer 2: "good"' in prompt else "**Better:** 1"
        else:
            text = "Rating: 5" if '"good"' in prompt else "Rating: 1"
        usage = {"prompt_tokens": 1000, "completion_tokens": 100}
        reply = json.dumps({"choices": [{"message": {"content": text}}], "usage": usage}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    PROMPTS.clear()
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()
        thread.join(10)


def test_ratings_failures_tokens_and_cost(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    meta = {"task": "sqa", "answer": "reference", "instruction": "What?", "subset": "x"}
    said = {"a": "good", "b": "bad", "c": "odd"}
    predictions = [Prediction(key, text, True, 1.0, meta) for key, text in said.items()]
    predictions.append(Prediction("d", "good", True, 1.0, {**meta, "task": "asr"}))
    path = tmp_path / "predictions-test-step1.jsonl"
    write_predictions(path, predictions)
    command = [str(path), "--url", url, "--model", "m", "--cache", str(tmp_path / "cache"), "--prices", "2", "10"]
    assert judge.main([*command, "--json"]) == 1  # one answer could not be rated
    found = json.loads(capsys.readouterr().out)
    assert found["scores"]["sqa/judge"]["value"] == 3.0 and found["num_rated"]["sqa/judge"] == 2
    assert found["num_failures"] == {"no_rating": 1} and found["num_cached"] == 0
    assert (found["prompt_tokens"], found["completion_tokens"]) == (3000, 300)
    assert found["cost"] == pytest.approx(0.009)
    lines = [json.loads(line) for line in Path(found["verdicts"]).read_text().splitlines()]
    assert [(d["key"], d["rating"], d["failure"]) for d in lines] == [
        ("a", 5.0, ""),
        ("b", 1.0, ""),
        ("c", None, "no_rating"),
    ]
    assert found["verdicts"] == str(tmp_path / "predictions-test-step1.judged-m.jsonl")
    assert {d["judge"] for d in lines} == {"m"}
    assert judge.main(command) == 1
    text = capsys.readouterr().out
    assert "2 ratings from the cache; 1000 tokens sent and 100 received" in text and "1 no_rating" in text


def test_judges_do_not_replace_each_others_ratings(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.jsonl"
    meta = {"task": "sqa", "answer": "reference", "instruction": "What?"}
    write_predictions(path, [Prediction("a", "good", True, 1.0, meta)])
    command = [str(path), "--cache", str(tmp_path / "cache"), "--url"]
    for model in ("org/one 7B", "two"):
        assert judge.main([*command, url, "--model", model]) == 0
    kept = {p.name: json.loads(p.read_text())["judge"] for p in tmp_path.glob("*.judged-*")}
    assert kept == {"p.judged-org-one-7B.jsonl": "org/one 7B", "p.judged-two.jsonl": "two"}
    before = (tmp_path / "p.judged-two.jsonl").read_bytes()
    capsys.readouterr()
    dead = [*command, "http://localhost:1/v1", "--model", "two", "--attempts", "1", "--cache", str(tmp_path / "other")]
    assert judge.main(dead) == 1
    assert "no answer could be rated" in (text := capsys.readouterr().out) and "no verdicts were written" in text
    assert judge.main([*dead, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["verdicts"] is None
    assert (tmp_path / "p.judged-two.jsonl").read_bytes() == before


def test_cache_that_is_a_file_is_refused_before_any_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "p.jsonl"
    write_predictions(path, [Prediction("a", "x", True, 1.0, {"task": "sqa", "answer": "y", "instruction": "What?"})])
    assert judge.main([str(path), "--url", "http://localhost:1/v1", "--model", "m", "--cache", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --cache {path}: cannot be written (Not a directory") and error.count("\n") == 1


def test_unratable_predictions_are_one_line_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "p.jsonl"
    write_predictions(path, [Prediction("a", "x", True, 1.0, {"task": "sqa", "answer": "y"})])
    for more, word in (([], "no instruction"), (["--tasks", "ac"], "no prediction of ac")):
        assert judge.main([str(path), "--url", "http://localhost:1/v1", "--model", "m", *more]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and word in error and error.count("\n") == 1


TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "audio", "audio": "a.flac"}, {"type": "text", "text": "What is this?"}]},
    {"role": "assistant", "content": "Rain."},
    {"role": "user", "content": "And <audio>?"},
    {"role": "assistant", "content": "Wind."},
]
PLAIN = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "<audio>What is this?"},
    {"role": "assistant", "content": "Rain."},
]


def chat(key: str, text: str, **fields: Any) -> Prediction:
    meta = {"task": "chat", "messages": TURNS, "instruction": "And ?", "answer": "Wind.", "subset": "x", **fields}
    return Prediction(key, text, True, 1.0, meta)


def test_judge_reads_the_conversation_before_the_question(url: str, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    alone = Prediction("b", "bad", True, 1.0, {"task": "sqa", "instruction": "What?", "answer": "reference"})
    write_predictions(path, [chat("a", "good"), alone])
    command = [str(path), "--url", url, "--model", "m", "--cache", str(tmp_path / "cache")]
    assert judge.main(command) == 0
    first, second = sorted(PROMPTS, key=lambda prompt: "Be brief" not in prompt)
    assert f'Question: "And ?"\nConversation before the question: {json.dumps(PLAIN)}\nReference' in first
    assert "Conversation" not in second
    # Reading predictions and writing them again, as a resumed evaluation does, changes nothing.
    write_predictions(tmp_path / "again.jsonl", read_predictions(path))
    assert (tmp_path / "again.jsonl").read_bytes() == path.read_bytes()


def test_two_evaluations_are_compared_in_both_orders(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, other = tmp_path / "b" / "p.jsonl", tmp_path / "a" / "p.jsonl"
    said = {"won": ("good", "x"), "lost": ("x", "good"), "order": ("x", "y"), "same": ("x", "x"), "odd": ("x", "odd")}
    for path, place in ((ours, 0), (other, 1)):
        path.parent.mkdir()
        more = [chat(f"only{place}", "x")]
        write_predictions(path, [*(chat(key, texts[place]) for key, texts in said.items()), *more])
    command = [str(ours), "--against", str(other), "--url", url, "--model", "m", "--cache", str(tmp_path / "cache")]
    assert judge.main([*command, "--json"]) == 1  # one pair could not be compared
    found = json.loads(capsys.readouterr().out)
    assert len(PROMPTS) == 6 and all(json.dumps(PLAIN) in prompt for prompt in PROMPTS)
    score = found["scores"]["chat/preference"]
    assert (score["value"], found["num_rated"]["chat/preference"]) == (0.5, 4)
    assert score["low"] < 0.5 < score["high"]
    counts = {name: found[name] for name in ("num_won", "num_tied", "num_lost", "num_equal", "num_order_dependent")}
    assert list(counts.values()) == [1, 2, 1, 1, 1]
    assert (found["num_ignored"], found["num_failures"], found["prompt_tokens"]) == ([1, 1], {"no_rating": 2}, 6000)
    out = Path(found["verdicts"])
    assert out.parent == ours.parent and out.name == "p.against-a-p.judged-m.jsonl"
    lines = {d["key"]: d["preference"] for d in map(json.loads, out.read_text().splitlines())}
    assert lines == {"won": 1.0, "lost": 0.0, "order": 0.5, "same": 0.5, "odd": None}
    assert judge.main(command) == 1
    text = capsys.readouterr().out
    assert "1 better, 2 tied, 1 worse; 1 pairs of answers are equal; in 1 pairs" in text
    assert len(PROMPTS) == 8  # only the failed pair was asked again, twice


def test_evaluations_of_other_questions_are_not_compared(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, other = tmp_path / "b.jsonl", tmp_path / "a.jsonl"
    write_predictions(ours, [chat("a", "x")])
    write_predictions(other, [chat("a", "y", instruction="What else?")])
    command = [str(ours), "--against", str(other), "--url", url, "--model", "m", "--cache", str(tmp_path / "cache")]
    assert judge.main(command) == 2
    error = capsys.readouterr().err
    assert f"{other}: instruction of 'a' is not that of {ours}" in error and error.count("\n") == 1
    assert PROMPTS == []
