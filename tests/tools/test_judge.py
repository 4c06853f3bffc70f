"""The command that calls the judge: its files, counts and costs."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from tools import judge
from trainer.evaluation.predictions import Prediction, write_predictions


class Handler(BaseHTTPRequestHandler):
    """A service that rates "good" with 5 and everything else with 1, and gives no rating for "odd"."""

    def do_POST(self) -> None:
        prompt = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][0]["content"]
        text = "no idea" if '"odd"' in prompt else "Rating: 5" if '"good"' in prompt else "Rating: 1"
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


def test_unratable_predictions_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "p.jsonl"
    write_predictions(path, [Prediction("a", "x", True, 1.0, {"task": "sqa", "answer": "y"})])
    for more, word in (([], "no instruction"), (["--tasks", "ac"], "no prediction of ac")):
        assert judge.main([str(path), "--url", "http://localhost:1/v1", "--model", "m", *more]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and word in error and error.count("\n") == 1
