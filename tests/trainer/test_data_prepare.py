"""Tests of preparing data: shards that are built from manifests, evaluation splits, and tokenizers."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from model.errors import UserError
from model.lengths import TokenRate
from tests.trainer.data_corpus import clip_rows, data_config, row, write_manifest
from trainer.data.config import DatasetConfig, TokenizerConfig
from trainer.data.eval_set import eval_samples
from trainer.data.loader import Loader
from trainer.data.prepare import check_stored, prepare
from trainer.data.shard_build import BuildReport
from trainer.data.stream import SampleStream

KIT = Path(os.environ.get("KIT_DIR", Path(__file__).parents[2] / ".." / "shared" / "kit"))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    rows = clip_rows(tmp_path, 6)
    rows += clip_rows(tmp_path, 7, prefix="heldout", split="test", subset="far")
    rows += [row(f"text-{i}", task="text", subset="prose") for i in range(4)]
    write_manifest(tmp_path, rows)
    return tmp_path


SET = DatasetConfig(name="all", manifest="set.jsonl")


def test_prepare_is_idempotent_and_follows_changes(corpus: Path) -> None:
    reports: list[BuildReport] = []
    config = data_config(corpus, SET, eval_splits=("test",))
    first = prepare(config, TokenRate((2,)), on_built=reports.append)
    assert sorted(r.num_samples for r in reports) == [7, 10]
    again = prepare(config, TokenRate((2,)), on_built=reports.append)
    assert len(reports) == 2
    assert (again.datasets, again.tokenizer_path) == (first.datasets, first.tokenizer_path)
    (corpus / "clip-0.flac").write_bytes((corpus / "clip-1.flac").read_bytes())
    changed = prepare(config, TokenRate((2,)), on_built=reports.append)
    assert len(reports) == 3  # only the training split was built again
    assert changed.datasets[0].shards["test"] == first.datasets[0].shards["test"]


def test_processes_may_prepare_at_once(corpus: Path) -> None:
    config = data_config(corpus, SET, eval_splits=("test",))
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: prepare(config, TokenRate((2,))), range(4)))
    assert all(m.datasets == made[0].datasets and m.tokenizer_path == made[0].tokenizer_path for m in made)
    assert [p.name for p in (corpus / "cache" / "shards").iterdir() if p.name.startswith(".")] == []
    with Loader(SampleStream(made[3], seed=0, num_batches=2)) as loader:
        assert sum(len(b.samples) for b, _ in loader) == 4


def test_filters_choose_tasks_and_subsets(corpus: Path) -> None:
    config = data_config(
        corpus, DatasetConfig(name="prose", manifest="set.jsonl", subsets=("prose",)), global_batch_samples=4
    )
    with Loader(SampleStream(prepare(config, TokenRate((2,))), seed=0, num_batches=3)) as loader:
        assert {s.key for b, _ in loader for s in b.samples} == {f"text-{i}" for i in range(4)}
    nothing = DatasetConfig(name="none", manifest="set.jsonl", tasks=("er",))
    with pytest.raises(UserError, match=r"data.datasets 'none': .* select nothing; the dataset has: train/asr/noise"):
        prepare(data_config(corpus, nothing), TokenRate((2,)))


@pytest.mark.parametrize("world", [1, 2, 4, 9])
@pytest.mark.parametrize("max_samples", [None, 5])
def test_every_eval_sample_is_on_exactly_one_rank(corpus: Path, world: int, max_samples: int | None) -> None:
    twice = (SET, DatasetConfig(name="far", manifest="set.jsonl", tasks=("asr",)))
    prepared = prepare(data_config(corpus, *twice, eval_splits=("test",)), TokenRate((2,)))
    parts = [eval_samples(prepared, "test", r, world, max_samples) for r in range(world)]
    keys = [s.key for p in parts for s in p]
    assert len(keys) == len(set(keys)) == (max_samples or 7)
    assert set(keys) == {s.key for s in eval_samples(prepared, "test", max_samples=max_samples)}
    for sample in (s for p in parts for s in p):
        assert sample.num_targets == 0
        assert sample.meta["answer"] == f"word {sample.key}"
        assert int(sample.audio_mask.sum()) == TokenRate((2,)).tokens_of_samples(len(sample.clips[0]))


def test_skipped_eval_samples_are_reported(corpus: Path) -> None:
    config = data_config(corpus, SET, eval_splits=("test",), max_audio_sec=0.155, max_skipped_fraction=0.1)
    skips: list = []
    found = eval_samples(prepare(config, TokenRate((2,))), "test", on_skip=skips.append)
    assert [(s.key, s.reason) for s in skips] == [("heldout-6", "too_long")]
    assert len(found) == 6


def test_user_errors_are_named(corpus: Path) -> None:
    for config, message in (
        (data_config(corpus), "data.datasets is empty"),
        (data_config(corpus, SET, eval_splits=("dev",)), r"no dataset has samples of split 'dev'.*\['test', 'train'\]"),
        (data_config(corpus, DatasetConfig(name="s", manifest="set.jsonl", split="trian")), r"has no split 'trian'"),
        (data_config(corpus, DatasetConfig(name="s", manifest="other.jsonl")), r"other.jsonl: manifest cannot be read"),
        (data_config(corpus, DatasetConfig(name="s", shards="nowhere")), r"no .*shards.json; make shards with"),
    ):
        with pytest.raises(UserError, match=message):
            prepare(config, TokenRate((2,)))
    (corpus / "clip-2.flac").unlink()
    with pytest.raises(UserError, match=r"\(id clip-2\): no audio file .*clip-2.flac; restore it"):
        prepare(data_config(corpus, SET), TokenRate((2,)))


def test_the_check_without_building_finds_missing_splits_of_manifests(corpus: Path) -> None:
    check_stored(data_config(corpus, SET))
    for config, message in (
        (data_config(corpus, SET, eval_splits=("dev",)), r"no dataset has samples of split 'dev'.*\['test', 'train'\]"),
        (data_config(corpus, DatasetConfig(name="s", manifest="set.jsonl", split="trian")), r"has no split 'trian'"),
        (
            data_config(corpus / "nowhere", SET),
            r"no such file; check data.root = .*/nowhere, which is not a",
        ),
    ):
        with pytest.raises(UserError, match=message):
            check_stored(config)
    assert not list(corpus.glob("**/shards.json"))


def test_the_check_without_building_finds_rows_that_cannot_be_used(corpus: Path) -> None:
    manifest = corpus / "set.jsonl"
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    number = next(i for i, row in enumerate(rows) if row["split"] == "train")
    of_split = sum(row["split"] == "train" for row in rows)
    rows[number]["task"] = "command"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    message = rf"1 of {of_split} samples cannot be used \(1 unknown_task\).* line {number + 1} id .*task = 'command'"
    with pytest.raises(UserError, match=message):
        check_stored(data_config(corpus, SET))
    check_stored(data_config(corpus, SET, max_skipped_fraction=1 / of_split))


def test_a_wrong_path_is_reported_before_ranks_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from trainer.__main__ import main

    monkeypatch.setattr("trainer.run.launch.start_ranks", None)  # a start of ranks would raise a TypeError
    assert main(["debug", f"data.root={tmp_path}", f"train.run_dir={tmp_path}", "--verbose"]) == 2
    assert capsys.readouterr().err.startswith(
        f"error: data.datasets 'demo': {tmp_path}/demo.jsonl: no such file; check"
    )


def test_cached_shards_are_checked_against_a_lower_limit(corpus: Path) -> None:
    with open(corpus / "set.jsonl", "a") as file:
        file.write(json.dumps(row("mute", answer="")) + "\n")
    lenient = prepare(data_config(corpus, SET, max_skipped_fraction=0.5), TokenRate((2,)))
    assert lenient.datasets[0].skipped_samples == {"empty_answer": 1}
    with pytest.raises(UserError, match=r"1 of 11 samples of .*set.jsonl cannot be used"):
        prepare(data_config(corpus, SET), TokenRate((2,)))


@pytest.mark.slow
@pytest.mark.skipif(not KIT.is_dir(), reason=f"there are no real recordings in {KIT}; set KIT_DIR")
def test_the_kit_trains_and_evaluates(tmp_path: Path) -> None:
    datasets = (
        DatasetConfig(name="asr", manifest="asr.jsonl", subsets=("digits", "wake_words", "ljspeech", "nemo")),
        DatasetConfig(name="aqa", manifest="aqa.jsonl", weight=0.5),
    )
    fields = {"eval_splits": ("dev",), "cache_dir": str(tmp_path), "num_lanes": 16, "global_batch_samples": 32}
    fields["tokenizer"] = TokenizerConfig()
    lines = [line for s in datasets for line in (KIT / str(s.manifest)).read_text().splitlines()]
    duration_sec = {(row := json.loads(line))["id"]: row["duration"] for line in lines}
    prepared = prepare(data_config(KIT, *datasets, **fields), TokenRate((2, 2, 2)))
    assert all(s.skipped_samples == {} for s in prepared.datasets)
    with Loader(SampleStream(prepared, seed=0, num_batches=6)) as loader:
        samples = [s for b, _ in loader for s in b.samples]
        assert loader.num_skipped == {}
    tasks = [s.task for s in samples]
    assert abs(tasks.count("aqa") / len(tasks) - 1 / 3) < 0.03
    tokenizer = prepared.tokenizer
    for sample in samples:
        answer = [t for t in sample.labels.tolist() if t >= 0]
        assert answer[-1] == tokenizer.eos_id
        assert tokenizer.decode(answer) == " ".join(sample.meta["answer"].split())
        assert len(sample.clips[0]) / 16_000 == pytest.approx(duration_sec[sample.key], abs=0.01)
        assert int(sample.audio_mask.sum()) == TokenRate((2, 2, 2)).tokens_of_samples(len(sample.clips[0]))
    assert len(eval_samples(prepared, "dev", max_samples=20)) == 20
