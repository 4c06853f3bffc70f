"""Tests that a plan that reads the lengths of a recipe's data agrees with the samples that the loader returns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from model.errors import UserError
from model.lengths import SAMPLE_RATE
from tests.trainer.data_corpus import clip_rows, row, write_manifest
from tools.make_shards import main as make_shards
from trainer.__main__ import main as train
from trainer.config.load import load_recipe
from trainer.config.schema import Recipe
from trainer.data.loader import Loader
from trainer.data.prepare import prepare
from trainer.data.stream import SampleStream
from trainer.parallel.topology import build_topology
from trainer.plan.accelerator import KNOWN
from trainer.plan.data import is_local, is_present, summarize
from trainer.plan.plan_json import as_json
from trainer.plan.planner import Planner
from trainer.plan.report import WIDTH, report
from trainer.plan.workload import data_workload


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a manifest of short clips, shards of longer clips, and a manifest of text, and return their folder."""
    folder = tmp_path_factory.mktemp("corpus")
    short = clip_rows(folder, 40, prefix="short", seconds=0.2)
    long = [r for n in range(6) for r in clip_rows(folder, 5, prefix=f"long{n}", seconds=0.5 * (n + 1))]
    write_manifest(folder, [*short, *clip_rows(folder, 3, prefix="test", split="test")], "short.jsonl")
    write_manifest(folder, long, "long.jsonl")
    write_manifest(folder, [row(f"t{i}", task="text", duration=0.0) for i in range(7)], "text.jsonl")
    assert make_shards([str(folder / "long.jsonl"), str(folder / "long")]) == 0
    return folder


def recipe_of(corpus: Path, *overrides: str) -> Recipe:
    sets = (
        "[{name: short, manifest: short.jsonl, weight: [[0, 3], [0.5, 1]]}, {name: long, shards: long, weight: 1},"
        " {name: text, manifest: text.jsonl, weight: [[0, 0], [0.75, 2]]}]"
    )
    keys = [f"data.root={corpus}", f"data.cache_dir={corpus}/cache", f"data.datasets={sets}", "data.max_audio_sec=2.7"]
    return load_recipe("debug", [*keys, "data.max_skipped_fraction=0.5", "train.steps=200", *overrides])


def test_datasets_are_summarized(corpus: Path) -> None:
    recipe = recipe_of(corpus)
    short, long, text = summarize(recipe).datasets
    assert (short.lengths.num_samples, long.lengths.num_samples, text.lengths.num_samples) == (40, 30, 7)
    # Clips of clip_rows are up to 60 ms longer than `seconds`. Those of 3.0 s are too long.
    assert short.lengths.hours * 3600 == pytest.approx(sum(0.2 + 0.01 * (i % 7) for i in range(40)), rel=1e-3)
    assert long.lengths.num_too_long == 5 and short.lengths.num_too_long == 0 == text.lengths.num_too_long
    assert long.lengths.seconds.max() == pytest.approx(2.54, abs=0.001)
    # The weights are 3, 1, 0 in the first half of the run, then 1, 1, 0 for a quarter, and 1, 1, 2 in the last quarter.
    assert short.share == pytest.approx(0.5 * 3 / 4 + 0.25 * 1 / 2 + 0.25 * 1 / 4)
    assert long.share == pytest.approx(0.5 * 1 / 4 + 0.25 * 1 / 2 + 0.25 * 1 / 4)
    assert text.share == pytest.approx(0.25 * 2 / 4)
    assert long.epochs == pytest.approx(long.share * 200 * 8 / 25)
    assert summarize(recipe).skipped_fraction == pytest.approx(long.share * 5 / 30)


def test_the_batch_is_like_those_of_the_training(corpus: Path) -> None:
    recipe = recipe_of(corpus)
    topology = build_topology(recipe.parallel, recipe.parallel.num_ranks)
    planned = data_workload(recipe, topology, summarize(recipe))
    prepared = prepare(recipe.data, recipe.model.adapter.rate)
    with Loader(SampleStream(prepared, seed=0, num_batches=200, rank=0, world=1, state=None)) as loader:
        batches = [batch for batch, _ in loader]
        epochs = loader.epochs
    seconds = [sum(c.shape[0] for s in batch.samples for c in s.clips) / SAMPLE_RATE for batch in batches]
    assert len(batches) == 200
    # In the planned batch of 8 samples, the share of each dataset is rounded to a whole number.
    assert planned.audio_sec == pytest.approx(float(np.mean(seconds)), rel=0.15)
    big = recipe_of(corpus, "data.global_batch_samples=800")
    large = data_workload(big, topology, summarize(big))
    assert large.audio_sec / 100 == pytest.approx(float(np.mean(seconds)), rel=0.04)
    for one in summarize(recipe).datasets:
        # A skipped sample is replaced by the next one of its dataset, so each usable sample is read equally often.
        assert epochs[one.name] == pytest.approx(one.epochs, rel=0.03)


@pytest.mark.parametrize("stored", ["manifest", "shards"])
def test_the_clips_of_a_sample_are_planned_one_by_one(tmp_path: Path, stored: str) -> None:
    """Check that the plan pads and encodes each clip of a sample separately, as the loader does."""
    single = clip_rows(tmp_path, 8, prefix="one", seconds=0.9)
    pairs = [
        row(f"two-{i}", audio=[one["audio"], other["audio"]])
        for i, (one, other) in enumerate(zip(single[:4], single[4:], strict=True))
    ]
    write_manifest(tmp_path, [*single, *pairs], "set.jsonl")
    assert make_shards([str(tmp_path / "set.jsonl"), str(tmp_path / "set")]) == 0
    place = "manifest: set.jsonl" if stored == "manifest" else "shards: set"
    keys = [f"data.root={tmp_path}", f"data.cache_dir={tmp_path}/cache", f"data.datasets=[{{name: x, {place}}}]"]
    batch = ["data.global_batch_samples=12", "data.num_lanes=1", "parallel.num_ranks=1", "data.eval_splits=[train]"]
    batch += ["eval.split=train", "eval.final_split=train"]
    recipe = load_recipe("debug", [*keys, *batch, "data.min_audio_sec=1.5", "data.max_audio_sec=2"])
    (found,) = summarize(recipe).datasets
    assert sorted(found.lengths.num_clips) == [1] * 8 + [2] * 4 and found.lengths.num_too_long == 0
    assert found.lengths.seconds.tolist() == pytest.approx([1.5] * 8 + [3.0] * 4)
    topology = build_topology(recipe.parallel, 1)
    planned = data_workload(recipe, topology, summarize(recipe), text_tokens=1)
    prepared = prepare(recipe.data, recipe.model.adapter.rate)
    with Loader(SampleStream(prepared, seed=0, num_batches=1, rank=0, world=1, state=None)) as loader:
        ((loaded, _),) = list(loader)
    clips = sorted(len(c) for s in loaded.samples for c in s.clips)
    assert sorted(planned.clips[0]) == clips == sorted(planned.loaded_by(0)) and len(clips) == 16
    audio_tokens = sorted(int(s.audio_mask.sum()) for s in loaded.samples)
    assert sorted(planned.num_tokens - 1) == audio_tokens
    work = Planner(recipe, KNOWN["h100"]).place(recipe, planned)[1]
    assert sorted(n for one in work[:1] for call in one.calls[0][0] for n in call) == clips


def test_the_report_shows_them_and_warns(corpus: Path) -> None:
    recipe = recipe_of(corpus, "data.max_skipped_fraction=0.001")
    topology = build_topology(recipe.parallel, recipe.parallel.num_ranks)
    plan = Planner(recipe, KNOWN["h100"]).plan(recipe, data_workload(recipe, topology, summarize(recipe)))
    text = report(plan)
    lines = {tuple(line.split()) for line in text.splitlines()}
    assert max(map(len, text.splitlines())) <= WIDTH
    assert ("long", "30", "0.0", "31.2%", "20.00", "1.5", "2.5", "2.5", "5") in lines, text
    assert "WARNING: 5.2% of the samples are longer than data.max_audio_sec" in text
    found = as_json(plan)
    assert [d["name"] for d in found["datasets"]] == ["short", "long", "text"]
    assert found["encoder_balance"] >= 1 and 0 < found["encoder_padding"] < 1


def test_missing_data_is_refused(corpus: Path, tmp_path: Path) -> None:
    assert is_present(recipe_of(corpus).data)
    gone = recipe_of(tmp_path)
    assert is_local(gone.data) and not is_present(gone.data)
    with pytest.raises(UserError, match=r"data.datasets 'short': .*short.jsonl: no such file; check data.root = "):
        summarize(gone)
    with pytest.raises(
        UserError, match="data.datasets 'x': there is no .*/shards.json; check data.root = .*earshot shards make"
    ):
        summarize(recipe_of(tmp_path, "data.datasets=[{name: x, shards: x}]"))
    with pytest.raises(UserError, match="data.max_audio_sec = 0.01: all samples of data.datasets 'short' are longer"):
        summarize(recipe_of(corpus, "data.max_audio_sec=0.01"))
    with pytest.raises(UserError, match="'short': .* no samples of split 'train' with the selected tasks"):
        summarize(recipe_of(corpus, "data.datasets.0.tasks=[er]"))
    bucket = load_recipe("debug", ["data.root=s3://b/p", "data.datasets=[{name: x, shards: x}]"])
    assert not is_local(bucket.data)


def test_a_dry_run_checks_local_data(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = "data.datasets=[{name: x, shards: long}]"
    dry = ["debug", "--dry-run", "--verbose", "data.eval_splits=[train]", "eval.final_split=train", shards]
    assert train([*dry, f"data.root={corpus}"]) == 0
    capsys.readouterr()
    assert train([*dry, f"data.root={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: data.datasets 'x': there is no {tmp_path}/long/shards.json; make shards with")
    assert error.count("\n") == 1 and "; --no-data skips this check" in error
    assert train([*dry, f"data.root={tmp_path}", "--no-data"]) == 0
    assert train([*dry, "data.root=s3://nowhere/x"]) == 0  # buckets are not read
    capsys.readouterr()
    assert train([*dry, f"data.root={corpus}", "model.llm.weights=/nowhere/llm"]) == 0
    assert "warning: model.llm.weights = /nowhere/llm: no such folder; specify an existing" in capsys.readouterr().err
