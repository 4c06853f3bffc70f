"""Tests of alerts, which are sent to a real HTTP server on this machine."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from model.errors import UserError
from trainer.telemetry import alerts
from trainer.telemetry.alerts import WEBHOOK, AlertConfig, Alerts, is_due, text_of
from trainer.telemetry.events import EventLog


@contextmanager
def server(received: list[dict[str, Any]], delay_sec: float = 0.0, status: int = 200) -> Iterator[str]:
    """Run an HTTP server that appends what is posted to it to `received`, and yield its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            time.sleep(delay_sec)
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.append({"type": self.headers["Content-Type"], **json.loads(body)})
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    http = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}/services/T0/B0/secret"
    finally:
        http.shutdown()
        http.server_close()


def event_log(run_dir: Path, url: str, rank: int = 0, **config: Any) -> EventLog:
    return EventLog(run_dir, rank, 1, Alerts(run_dir, AlertConfig(**config), {WEBHOOK: url}))


def test_events_are_posted_as_slack_reads_them(tmp_path: Path) -> None:
    received: list[dict[str, Any]] = []
    with server(received) as url:
        log = event_log(tmp_path / "demo", url)
        log.add("started")
        log.add("failed", 41, error="ValueError: no", samples=["a"] * 99)
        log.add("requeued", why="a rank failed; restart 1 of 10")
        log.add("finished", 50)
    texts = [r["text"] for r in received]
    assert len(texts) == 3 and all(r["type"] == "application/json" for r in received)
    assert texts[0].startswith("demo: failed at step 41 (attempt 1, ") and "ValueError: no" in texts[0]
    assert "samples" not in texts[0] and "restart 1 of 10" in texts[1] and "finished at step 50" in texts[2]


def test_many_ranks_that_fail_send_one_alert(tmp_path: Path) -> None:
    received: list[dict[str, Any]] = []
    with server(received) as url:
        for rank in range(8):
            event_log(tmp_path / "demo", url, rank).add("failed", 3)
    assert len(received) == 1


def test_skips_are_posted_at_their_limit_and_the_rest_at_most_once_per_interval() -> None:
    def due(kinds_and_times: list[tuple[str, float]], **config: Any) -> list[bool]:
        events = [{"event": kind, "time": at, "attempt": 1} for kind, at in kinds_and_times]
        return [is_due(events[: i + 1], AlertConfig(**config)) for i in range(len(events))]

    assert due([("skip", i) for i in range(7)], skipped_updates=3) == [False, False, True, False, False, True, False]
    times = [0.0, 50.0, 61.0, 100.0, 122.0]
    assert due([("requeued", t) for t in times]) == [True, False, True, False, True]
    assert due([("requeued", 0.0), ("failed", 1.0), ("started", 2.0)]) == [True, True, False]
    assert due([("failed", 0.0)], events=()) == [False]


def test_slow_or_absent_server_neither_blocks_nor_ends_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alerts, "_TIMEOUT_SEC", 0.3)
    received: list[dict[str, Any]] = []
    with server(received, delay_sec=1.0) as url:
        start = time.perf_counter()
        event_log(tmp_path / "a", url).add("straggler", 3)  # training continues
        assert time.perf_counter() - start < 0.25
        event_log(tmp_path / "a", url).add("failed", 3)  # the process ends
        assert time.perf_counter() - start < 2.0
    with caplog.at_level(logging.WARNING):
        event_log(tmp_path / "b", "http://127.0.0.1:1/services/secret").add("failed", 3)
        event_log(tmp_path / "c", "no url").add("failed", 3)
        with server(received, status=500) as url:
            event_log(tmp_path / "d", url).add("failed", 3)
    assert "could not be sent to 127.0.0.1: " in caplog.text and "could not be sent to the URL in EAR" in caplog.text
    assert "127.0.0.1: 500" in caplog.text and "secret" not in caplog.text


def test_config_is_read_from_the_runs_recipe_and_checked(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("telemetry: {alerts: {events: [hang]}}")
    received: list[dict[str, Any]] = []
    with server(received) as url:
        log = EventLog(tmp_path, None, None, Alerts(tmp_path, None, {WEBHOOK: url}))
        log.add("failed")
        log.add("hang", silent_sec=3.0)
    assert len(received) == 1 and "hang" in received[0]["text"]
    with pytest.raises(UserError, match="telemetry.alerts.events: hung is not one of submitted, "):
        AlertConfig(events=("hung",))
    assert len(text_of({"event": "failed", "attempt": 1, "host": "h", "error": "x" * 5000}, "r")) == 1000
