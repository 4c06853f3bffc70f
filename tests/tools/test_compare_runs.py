"""Tests of `earshot compare` with runs, whose output is text or a page. The page is shown in a real browser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.browser import CHROMIUM, WIDTHS, browse, measure
from tools import compare

HOSTILE = "</script><img src=x onerror=alert(1)>"


def write(folder: Path, lr: float, wer: float, low: float | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(
        f"name: {folder.name}\noptim: {{lr: {lr}}}\nseed: 0\nnote: '{HOSTILE if lr > 1 else 'a'}'\n"
    )
    event = {"time": 100.0, "event": "started", "attempt": 1, "host": "h", "num_steps": 500, "num_ranks": 2}
    (folder / "events.jsonl").write_text(json.dumps(event) + "\n")
    records: list[dict[str, Any]] = [
        {"step": i + 1, "train/loss": 5 / (i + 1), "time/step_sec": 0.1, "throughput/tokens_per_sec": 1000 * lr}
        for i in range(500)
    ]
    bounds = {} if low is None else {"eval/test/asr/wer/low": low, "eval/test/asr/wer/high": 2 * wer}
    records.append({"step": 500, "eval/test/asr/wer": wer, **bounds})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def test_runs_are_compared_in_recipe_loss_scores_and_throughput(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [write(tmp_path / "a", 0.1, 0.5, 0.4), write(tmp_path / "b", 0.2, 0.25)]
    assert compare.main([*map(str, runs)]) == 0
    text = capsys.readouterr().out
    lines = [line.split() for line in text.splitlines()]
    assert ["optim.lr", "0.1", "0.2"] in lines and "seed" not in text and "note" not in text
    assert ["test/asr/wer", "0.500", "[0.400,", "1.000]", "0.250"] in lines
    assert ["tokens/s", "100", "200"] in lines and "a  5.000 █" in text
    assert compare.main([*map(str, runs), "--json"]) == 0
    tree = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert tree["runs"] == ["a", "b"] and len(tree["losses"][0]) <= 301 and tree["losses"][0][-1] == [500.0, 0.01]


def test_runs_and_predictions_are_not_mixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write(tmp_path / "a", 0.1, 0.5)
    assert compare.main([str(run), str(run / "metrics.jsonl")]) == 2
    assert "is not a run folder" in capsys.readouterr().err
    assert compare.main([str(run), str(tmp_path)]) == 2


@pytest.mark.slow
def test_page_is_readable_at_every_width(tmp_path: Path) -> None:
    if CHROMIUM is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    runs = [write(tmp_path / "runs" / name, lr, 0.5, 0.4) for name, lr in (("a" * 60, 0.1), ("b", 20.0))]
    page = tmp_path / "runs.html"
    assert compare.main([*map(str, runs), "--html", str(page)]) == 0
    shown = browse(page)
    assert (shown.root["data-state"], shown.root["data-errors"]) == ("ready", "") and "img" not in shown.tags
    assert {"scores", "losses", "throughput", "recipe"} <= shown.ids and "optim.lr" in shown.rows
    assert {w: f["overflow"] for w, f in measure(page).items()} == dict.fromkeys(WIDTHS, 0)
