"""Tests of the HTML report on expert usage, which Chromium renders without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.browser import WIDTHS, Page, browse, measure, need_chromium, then_run
from tests.trainer.expert_usage_run import KINDS, write_run
from tests.trainer.page_data import large_usage
from trainer.expert_usage.files import TEMPLATE
from trainer.expert_usage.history import find_run, profile_history
from trainer.page.render import render

need_chromium()

HOSTILE = KINDS[1][2]


def page_of(tree: dict[str, Any]) -> str:
    return render(TEMPLATE, tree["run"], tree)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return profile_history(find_run(write_run(tmp_path_factory.mktemp("runs")))).to_json()


@pytest.fixture(scope="module")
def report(tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page_of(tree), encoding="utf-8")
    return path


def check_numbers(page: Page, wanted: dict[str, Any]) -> None:
    """Check that the page's numbers for encoders and gates equal the JSON's numbers for a task."""
    for name, encoder in wanted["encoders"].items():
        for key in ("clip_share", "num_clips", "audio_share", "audio_sec"):
            assert page.numbers[f"encoders.{name}.{key}"] == pytest.approx(encoder[key], rel=1e-5, abs=1e-6), (
                name,
                key,
            )
        for gate, weight in encoder["weight"].items():
            assert page.numbers[f"encoders.{name}.weight.{gate}"] == pytest.approx(weight, abs=1e-5)
    for key in ("entropy", "entropy_of_mean"):
        for gate, value in wanted[key].items():
            assert page.numbers[f"gates.{gate}.{key}"] == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize("task", ["all", "asr", "er", "ac"])
def test_it_renders_and_its_numbers_are_those_of_the_json(report: Path, tree: dict[str, Any], task: str) -> None:
    page = browse(report, "" if task == "all" else f"#task={task}")
    assert (page.root["data-state"], page.root["data-errors"]) == ("ready", "")
    assert {"encoders", "tasks", "confidence", "drift", "by-language", "by-band", "time", "placement"} <= page.ids
    assert "img" not in page.tags  # HTML in names from manifests is shown as text
    check_numbers(page, tree["tasks"][task])
    for other, found in tree["tasks"].items():
        for expert in tree["experts"]:
            shown = page.numbers[f"tasks.{other}.{expert}.clip_share"]
            assert shown == pytest.approx(found["encoders"][expert]["clip_share"], rel=1e-6)
    for name, encoder in tree["time"]["encoders"].items():
        assert {k: page.numbers[f"time.{name}.{k}"] for k in encoder} == encoder


def test_eight_encoders_are_no_wider_than_any_screen(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(page_of(large_usage(tmp_path)), encoding="utf-8")
    found = measure(path)
    assert {width: (f["overflow"], f["state"]) for width, f in found.items()} == dict.fromkeys(WIDTHS, (0, "ready"))
    page = browse(path, "#task=asr&language=xx")
    assert page.root["data-errors"] == "" and "No clip matches the filter." in page.dom


def test_clicks_and_other_choices_filter(report: Path, tree: dict[str, Any]) -> None:
    clicks = "[...document.querySelectorAll('.pills a')].find((a) => a.textContent === 'er').click();"
    clicked = then_run(report, "clicked.html", clicks)
    page = browse(clicked)
    assert page.root["data-errors"] == "" and page.current == ["#task=er"]
    check_numbers(page, tree["tasks"]["er"])

    page = browse(report, f"#task=asr&language=pl&source={quote(HOSTILE)}&band=2-5+s")
    cells = [c for c in tree["cells"] if (c["task"], c["language"], c["band"]) == ("asr", "pl", "2-5 s")]
    assert page.root["data-errors"] == "" and cells and {c["source"] for c in cells} == {HOSTILE}
    assert HOSTILE in page.titles
    assert page.numbers["encoders.hubert.num_clips"] == sum(c["routed_clips"][0] for c in cells)
    assert page.numbers["encoders.whisper.audio_sec"] == pytest.approx(sum(c["audio_sec"] for c in cells))


def test_a_profile_without_history_or_experts_renders_too(tree: dict[str, Any], tmp_path: Path) -> None:
    plain = tmp_path / "report.html"
    nothing = {"windows": [], "time": None, "placement": None, "drift": {}, "imbalance": None}
    plain.write_text(page_of({**tree, **nothing}), encoding="utf-8")
    page = browse(plain)
    assert page.root["data-errors"] == "" and page.ids == {
        "encoders", "tasks", "confidence", "by-language", "by-band", "by-source"
    }  # fmt: skip
    plain.write_text(page_of({**tree, **nothing, "cells": [], "tasks": {}, "dead": []}), encoding="utf-8")
    page = browse(plain)
    assert page.root["data-errors"] == "" and page.root["data-state"] == "ready" and page.ids == set()


def test_error_in_the_page_is_detected(tree: dict[str, Any], tmp_path: Path) -> None:
    broken = tmp_path / "report.html"
    broken.write_text(page_of({**tree, "time": {}}), encoding="utf-8")
    page = browse(broken)
    assert page.root["data-state"] == "loading" and "TypeError" in str(page.root["data-errors"])


def test_the_page_loads_nothing(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    assert not [mark for mark in ('src="', "@import", "url(", "<link", "fetch(", "XMLHttp") if mark in text]
    assert text.count("</script>") == 2  # they end the data and the page's script; none is from a manifest
