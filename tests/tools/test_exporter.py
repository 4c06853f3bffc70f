"""Tests of the exporter of run metrics, which a real Prometheus scrapes."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tools import exporter

STARTED = {"name": "demo", "num_steps": 20, "num_ranks": 2}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    run = tmp_path / "runs" / 'de"mo'
    run.mkdir(parents=True)
    events = [
        {"time": 100.0, "event": "started", "attempt": 1, "host": "n7", **STARTED},
        {"time": 101.0, "event": "skip", "attempt": 1, "host": "n7", "step": 1},
        {"time": 102.0, "event": "skip", "attempt": 1, "host": "n7", "step": 2},
    ]
    (run / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    record = {"step": 4, "time": 104.0, "train/loss": "nan", "time/step_sec": 1.0, "throughput/tokens_per_sec": 512.0}
    more = {"throughput/mfu": 0.41, "memory/rank0_peak_bytes": 1024}
    (run / "metrics.jsonl").write_text(json.dumps({**record, **more}) + "\n")
    return tmp_path / "runs"


def test_text_format(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exporter.main([str(runs), "--textfile", str(tmp_path / "earshot.prom")]) == 0
    text = (tmp_path / "earshot.prom").read_text()
    run = '{run="de\\"mo",host="n7"'
    for line in (
        f"earshot_step{run}}} 4.0",
        f"earshot_loss{run}}} NaN",
        f'earshot_events_total{run},event="skip"}} 2.0',
    ):
        assert f"\n{line}\n" in f"\n{text}", text
    assert text.count("# TYPE earshot_run_state gauge") == 1 and f'{run},state="running"}} 1.0' in text
    assert exporter.main([str(tmp_path / "nowhere")]) == 2
    assert "contains no run" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_prometheus_scrapes_it(runs: Path, tmp_path: Path) -> None:
    program = shutil.which("prometheus")
    if program is None:
        assert not os.environ.get("REQUIRE_SERVICES"), "apt-get install prometheus"
        pytest.skip("prometheus is not installed: apt-get install prometheus")
    server = exporter.make_server(runs, "127.0.0.1", 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    config = tmp_path / "prometheus.yml"
    target = f"127.0.0.1:{server.server_port}"
    config.write_text(
        "global: {scrape_interval: 1s}\n"
        f"scrape_configs: [{{job_name: earshot, static_configs: [{{targets: ['{target}']}}]}}]\n"
    )
    command = [program, f"--config.file={config}", f"--storage.tsdb.path={tmp_path}/tsdb"]
    with (tmp_path / "prometheus.log").open("w") as log:
        prometheus = subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 40
        while not (found := query(address, "earshot_tokens_per_second")):
            assert time.monotonic() < deadline and prometheus.poll() is None, (tmp_path / "prometheus.log").read_text()
            time.sleep(0.2)
        assert found[0]["metric"]["run"] == 'de"mo' and found[0]["metric"]["host"] == "n7"
        assert found[0]["value"][1] == "512" and query(address, "earshot_mfu_ratio")[0]["value"][1] == "0.41"
        assert query(address, 'sum by (event) (earshot_events_total{event="skip"})')[0]["value"][1] == "2"
        assert query(address, 'earshot_run_state{state="running"}')[0]["value"][1] == "1"
        assert query(address, "earshot_memory_peak_bytes")[0]["value"][1] == "1024"
    finally:
        prometheus.kill()
        prometheus.wait()
        server.shutdown()
        server.server_close()


def query(address: str, text: str) -> list[dict[str, Any]]:
    """Return the result of an instant query; an empty list if Prometheus does not answer yet."""
    try:
        url = f"http://{address}/api/v1/query?query={urllib.parse.quote(text)}"
        with urllib.request.urlopen(url, timeout=5) as answer:
            result: list[dict[str, Any]] = json.load(answer)["data"]["result"]
            return result
    except OSError:
        return []
