"""Tests of the commands in docs/tutorial_recordings.md.

tests/test_seam_encoder_family.py and tests/cluster run the commands in the other tutorials.
"""

from __future__ import annotations

import csv
import json
import re
import shlex
from pathlib import Path

import pytest

from tests.documented_run import run_earshot
from tools.demo_corpus import write_corpus

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
TUTORIALS = sorted(DOCS.glob("tutorial_*.md"))
TWO_SCREENS = 100
"""The number of lines on two screens. The lines of Python and TOML files in a tutorial are not counted."""


def commands(page: str) -> list[list[str]]:
    """Return the words of all commands on a page, in order."""
    text = (DOCS / page).read_text(encoding="utf-8").replace("\\\n", "")
    return [shlex.split(line, comments=True) for line in re.findall(r"^\$ (.*)$", text, flags=re.MULTILINE)]


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_a_tutorial_has_two_screens_and_is_listed(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert (
        len(re.sub(r"^```(python|toml)\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL).splitlines()) <= TWO_SCREENS
    )
    assert f"docs/{page.name}" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_recordings_are_imported_and_tried(tmp_path: Path) -> None:
    check, imports, try_out, status, *others = commands("tutorial_recordings.md")
    folder = tmp_path / "my_recordings"
    manifest = write_corpus(folder, scale=0.05)
    rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    spoken = [row for row in rows if row["task"] == "asr"]
    with (folder / "clips.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["audio", "text", "split"])
        table.writerows([row["audio"], row["answer"], row["split"]] for row in spoken)
    assert {row["split"] for row in spoken} == {"train", "dev", "test"}

    def run(words: list[str], *more: str) -> str:
        return run_earshot([*words[1:], *more], tmp_path)

    run(check)
    assert not (tmp_path / "my_data").exists()
    run(imports)
    assert len((tmp_path / "my_data" / "manifest.jsonl").read_text().splitlines()) == len(spoken)
    run(try_out, "parallel.num_ranks=1", "train.steps=2", "eval.max_samples=2", "eval.max_new_tokens=2")
    assert "finished" in run(status) and "2/2" in run(status)
    tested = commands("finetune.md")  # tests/real_weights/test_finetune.py runs these commands
    assert len(others) == 6 and all(words in tested for words in others)
