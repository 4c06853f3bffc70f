"""Tests of `earshot finetune` with a stub in place of the trainer."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tools import finetune
from trainer.config.load import load_recipe

TRAINER = """
import json, os, pathlib, sys
assert sys.argv[1] == "finetune_kit" and sys.argv[4:6] == ["eval.final_split=test", "eval.before=true"], sys.argv
name, seed, spoken = sys.argv[2].partition("=")[2], int(sys.argv[3].partition("=")[2]), sys.argv[-1]
assert spoken == f"data.datasets.2.manifest={pathlib.Path('runs/spoken/spoken.jsonl').absolute()}", spoken
assert int(os.environ["MALLOC_TRIM_THRESHOLD_"]) > 2**30
run = pathlib.Path("runs") / name
run.mkdir(parents=True)
summary = {"wer_before": 1.2, "wer_after": 0.3, "loss_first": 9, "loss_last": 1, "num_ranks": 2, "seconds": 7}
(run / "summary.json").write_text(json.dumps(summary))
row = {"key": "a1", "task": "asr", "reference": "two words", "hypothesis": "two swords"}
(run / "predictions-test-step200.jsonl").write_text(json.dumps(row) + "\\n")
score = {"task": "asr", "metric": "wer", "value": 0.1 * seed}
scores = {"split": "test", "step": 200, "num_samples": 1, "scores": [score], "confusions": {}}
(run / "scores-test-step200.json").write_text(json.dumps(scores))
(run / "scores-test-step0.json").write_text("{}")
"""
SHARED = {"instruction": "What is it?", "subset": "s"}
MANIFESTS = ("asr", "er", "aqa", "sqa", "ac")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Enter a folder with data and a trainer that only writes results, but without weights, and return the folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(finetune, "module_command", lambda module, *a: [sys.executable, "trainer.py", *a])
    (tmp_path / "trainer.py").write_text(TRAINER)
    (tmp_path / "data").mkdir()
    for i, name in enumerate(MANIFESTS):
        rows = [
            {"id": f"{name[0]}{i}{split}", "task": name, "split": split, "answer": "x", **SHARED}
            for split in ("train", "test")
        ]
        rows += [{"id": "a1", "task": "asr", "split": "test", "answer": "two words", **SHARED}] if name == "asr" else []
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_it_fetches_trains_and_reports(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fetched: list[tuple[str, str]] = []
    monkeypatch.setattr(finetune, "fetch", lambda model, out: fetched.append((model.name, str(out))))
    spoken: list[tuple[str, str]] = []

    def write(kit: Path, out: Path) -> float:
        spoken.append((str(kit), str(out.relative_to(here))))
        out.mkdir(parents=True)
        (out / "spoken.jsonl").touch()
        return 1.0

    monkeypatch.setattr(finetune, "write", write)
    (here / "models" / "smollm2-135m").mkdir(parents=True)
    assert finetune.main(["data.root=data"]) == 0
    assert spoken == [("data", "runs/spoken")]
    assert fetched == [("whisper-base", "models")], "an existing model must not be fetched again"
    shown = capsys.readouterr().out
    assert "1.20 before  ->  0.30 after" in shown and "two swords" in shown
    assert "earshot evaluate runs/finetune_kit --data data/asr.jsonl --split test" in shown
    assert finetune.main(["--seed", "2", "data.root=data"]) == 0
    assert len(spoken) == 1, "speech must be made only once"
    results = [json.loads(line) for line in (here / "runs" / "finetune_kit.jsonl").read_text().splitlines()]
    assert [(line["run"], line["seed"]) for line in results] == [("finetune_kit", 1), ("finetune_kit-seed2", 2)]
    assert [line["scores"][0]["value"] for line in results] == [0.1, 0.2]
    assert all(line["step"] == 200 and line["versions"]["torch"] and line["cpu_sec"] >= 0 for line in results)


@pytest.mark.parametrize(
    ("recipe", "overrides", "cpu_flags", "keys"),
    [
        ("finetune_kit", [], "flags : fpu avx512f amx_bf16 amx_tile", []),
        ("finetune_kit", [], "flags : fpu avx512f avx512_bf16", []),
        ("finetune_kit", [], "flags : fpu avx512f", ["train.precision=fp32"]),
        ("finetune_kit", ["train.precision=bf16"], "flags : fpu avx512f", []),
        ("finetune_cpu", [], "flags : fpu avx512f", []),
    ],
)
def test_cpus_that_multiply_bf16_slowly_train_in_fp32(
    monkeypatch: pytest.MonkeyPatch, recipe: str, overrides: list[str], cpu_flags: str, keys: list[str]
) -> None:
    monkeypatch.setattr(finetune.torch.cuda, "is_available", lambda: False)
    assert finetune.precision(load_recipe(recipe, overrides), overrides, cpu_flags) == keys
    monkeypatch.setattr(finetune.torch.cuda, "is_available", lambda: True)
    assert finetune.precision(load_recipe(recipe, overrides), overrides, cpu_flags) == []


def test_a_missing_manifest_is_a_one_line_error_before_anything_is_fetched(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(finetune, "fetch", lambda model, out: pytest.fail("weights were fetched"))
    (here / "data" / "ac.jsonl").unlink()
    assert finetune.main(["data.root=data"]) == 2
    wanted = "error: data/ac.jsonl: no such manifest; set data.root=DIR to the folder of the kit\n"
    assert capsys.readouterr().err == wanted
