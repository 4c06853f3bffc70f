"""Tests of the scorecard in Chromium without a network: rendering, sorting, filtering and playing audio."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.browser import WIDTHS, browse, measure, need_chromium, then_run
from tests.trainer.page_data import large_card
from tests.trainer.scorecard_data import HOSTILE, make_tree
from trainer.evaluation.predictions import Prediction
from trainer.evaluation.scorecard.card import make_card
from trainer.evaluation.scorecard.files import TEMPLATE, write_files
from trainer.page.render import render

need_chromium()

PLAY = """
const note = (text) => { document.documentElement.dataset.heard = text; };
const sound = document.querySelector("#samples audio");
sound.muted = true;
sound.addEventListener("error", () => note("error " + sound.error.code));
sound.addEventListener("loadeddata", async () => {
  const bytes = Uint8Array.from(atob(sound.src.split(",")[1]), (c) => c.charCodeAt(0));
  const decoded = await new OfflineAudioContext(1, 16000, 16000).decodeAudioData(bytes.buffer);
  const loudest = Math.max(...decoded.getChannelData(0));
  const heard = `${sound.duration.toFixed(2)} ${decoded.length} ${loudest.toFixed(2)}`;
  sound.play().then(() => note(`${heard} ${!sound.paused}`), note);
});
sound.load();
"""


@pytest.fixture(scope="module")
def tree() -> dict[str, Any]:
    return make_tree()


@pytest.fixture(scope="module")
def report(tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render(TEMPLATE, tree["title"], tree), encoding="utf-8")
    return path


def test_it_renders_and_its_numbers_are_those_of_the_tree(report: Path, tree: dict[str, Any]) -> None:
    page = browse(report)
    assert (page.root["data-state"], page.root["data-errors"]) == ("ready", "")
    assert {"scores", "by-subset", "by-duration", "by-language", "samples", "duration-asr"} <= page.ids
    assert "img" not in page.tags  # HTML in names from manifests is shown as text
    for score in tree["scores"]:
        if score["dimension"] == "":
            assert page.numbers[f"{score['task']}.{score['metric']}"] == pytest.approx(score["value"])
        elif f"{score['dimension']}.{score['task']}.{score['group']}.{score['metric']}" in page.numbers:
            shown = page.numbers[f"{score['dimension']}.{score['task']}.{score['group']}.{score['metric']}"]
            assert shown == pytest.approx(score["value"])
    matrix = tree["confusions"]["er"]["stage"]
    assert sum(n for row in matrix.values() for n in row.values()) == 7
    for reference, row in matrix.items():
        for answer, num in row.items():
            assert page.numbers[f"confusion.er.stage.{reference}.{answer}"] == num
    assert [key for key in page.rows if key.startswith("asr-")] == [
        s["key"] for s in tree["samples"] if s["task"] == "asr"
    ]
    assert ">WER<" in page.dom and "lower is better" in page.dom and "transcripts, " in page.dom
    # Summaries come before the list of samples.
    order = [page.dom.index(f'id="{name}"') for name in ("by-language", "confusion-er-stage", "samples")]
    assert order == sorted(order)
    assert "<del>sat on</del>" in page.dom and "<ins>on a</ins>" in page.dom
    assert ">2 windows<" in page.dom and ">cut off at the maximum length<" in page.dom and "2 broken" in page.dom


def test_names_of_every_object_do_not_blank_the_page(tmp_path: Path) -> None:
    names, predictions = ("constructor", "__proto__", "toString"), []
    for i, name in enumerate(names * 2):
        meta = {"task": "er", "answer": "angry", "choices": ["angry", *names], "subset": name, "language": name}
        predictions.append(Prediction(name if i < 3 else f"{i}", name, True, 1.0, {**meta, "instruction": "Which?"}))
    tree = make_card("names", {}, predictions, [], None, lambda keys: iter(()), 0)
    tree["audio"] = {}
    write_files(tree, tmp_path)
    for address in ("", "#subset=constructor", "#subset=__proto__", "#task=toString"):
        page = browse(tmp_path / "report.html", address)
        assert page.root["data-errors"] == "", address
        samples = [key for key in page.rows if not key.startswith(("er.", "subset.", "language."))]
        # The page shows the first five samples of a task, or all samples of the chosen subset. `toString` is no task.
        assert len(samples) == {"": 5, "#task=toString": 0}.get(address, 2), address


def test_audio_plays(report: Path) -> None:
    page = browse(then_run(report, "played.html", PLAY))
    assert page.root["data-errors"] == ""
    assert page.root.get("data-heard") == "1.00 16000 0.30 true"


def test_it_filters(report: Path, tree: dict[str, Any]) -> None:
    clicks = "[...document.querySelectorAll('.pills a')].find((a) => a.textContent === 'emotion').click();"
    page = browse(then_run(report, "clicked.html", clicks))
    assert page.root["data-errors"] == "" and page.current == ["#task=er"]
    keys = {sample["key"] for sample in tree["samples"]}
    assert {key for key in page.rows if key in keys} == {f"er-{i}" for i in range(7)}
    assert "duration-asr" not in page.ids and "confusion-er-stage" in page.ids

    page = browse(report, f"#task=asr&language=pl&subset={quote(HOSTILE)}")
    assert page.root["data-errors"] == "" and [key for key in page.rows if key in keys] == ["asr-3"]
    typed = """
    const box = document.querySelector('input[type=search]');
    box.value = 'KOTA'; box.dispatchEvent(new Event('input'));
    """
    page = browse(then_run(report, "typed.html", typed))
    assert page.root["data-errors"] == "" and [key for key in page.rows if key in keys] == ["asr-3"]


def test_it_sorts(report: Path, tree: dict[str, Any]) -> None:
    keys = {sample["key"] for sample in tree["samples"]}

    def clicked(name: str, times: int) -> list[str]:
        script = f"""
        const heads = [...document.querySelectorAll('#table-samples-er th button')];
        for (let i = 0; i < {times}; i += 1) heads.find((b) => b.textContent === '{name}').click();
        """
        page = browse(then_run(report, f"sorted-{times}.html", script), "#task=er")
        assert page.root["data-errors"] == ""
        return [key for key in page.rows if key in keys and key.startswith("er-")]

    seconds = {s["key"]: s["seconds"] for s in tree["samples"] if s["task"] == "er"}
    falling, rising = clicked("length", 1), clicked("length", 2)
    assert [seconds[key] for key in falling] == sorted(seconds.values(), reverse=True)
    assert [seconds[key] for key in rising] == sorted(seconds.values())


def test_it_is_no_wider_than_any_screen(tmp_path: Path) -> None:
    card = large_card()
    path = tmp_path / "report.html"
    path.write_text(render(TEMPLATE, card["title"], card), encoding="utf-8")
    found = measure(path)
    assert {width: (f["overflow"], f["state"]) for width, f in found.items()} == dict.fromkeys(WIDTHS, (0, "ready"))
    assert found[360]["height"] < 20_000, found


def test_tasks_with_different_metrics_are_listed_separately(report: Path, tree: dict[str, Any]) -> None:
    page = browse(report)
    tables = {key.partition("-")[0] for key in page.rows if key in {s["key"] for s in tree["samples"]}}
    assert len(tables) == page.dom.count('id="table-samples-') == 4
    # If nothing matches, the page says so and offers to show everything again.
    typed = "const box = document.querySelector('input[type=search]'); box.value = 'zzz'; "
    page = browse(then_run(report, "none.html", typed + "box.dispatchEvent(new Event('input'));"))
    assert "No sample matches the filter." in page.dom and ">Show all</a>" in page.dom
    assert page.root["data-errors"] == "" and 'id="table-samples-' not in page.dom


def test_error_in_the_page_is_detected(tree: dict[str, Any], tmp_path: Path) -> None:
    broken = tmp_path / "report.html"
    broken.write_text(render(TEMPLATE, "t", {**tree, "scores": None}), encoding="utf-8")
    page = browse(broken)
    assert page.root["data-state"] == "loading" and "TypeError" in str(page.root["data-errors"])


def test_the_page_loads_nothing(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    assert not [
        mark for mark in ("@import", "url(", "<link", "fetch(", "XMLHttp", 'http-equiv="refresh') if mark in text
    ]
    assert text.count("</script>") == 2  # they end the data and the page's script; none is from a manifest
