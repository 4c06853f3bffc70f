"""Tests that the router of a checkpoint routes data like the model that was saved."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from model.audio_tower import AudioTower
from model.batch import Ragged
from model.config import RouterConfig
from model.errors import UserError
from model.lengths import SAMPLE_RATE
from tests.trainer.data_corpus import clip_rows, row, write_manifest
from trainer.checkpoint.layout import PARAM, Shard, entries_of, key_of, merge_entries
from trainer.checkpoint.local import LocalDraft
from trainer.checkpoint.manifest import FileEntry, Manifest
from trainer.checkpoint.rect import matrix_of
from trainer.checkpoint.writer import write_tensors, write_text
from trainer.config.load import dump, load_recipe
from trainer.config.schema import Recipe
from trainer.data.prepare import prepare
from trainer.data.shard_build import ShardLimits, build_shards
from trainer.expert_usage.forward import load_tower, open_checkpoint, profile_data
from trainer.expert_usage.history import RunPath, find_run
from trainer.telemetry.expert_load import ExpertLoad, Load, group_of

VOCAB_SIZE, LLM_DIM = 100, 32


def make_tower(recipe: Recipe) -> AudioTower:
    torch.manual_seed(9)
    tower = AudioTower(recipe.model, LLM_DIM, VOCAB_SIZE)
    torch.nn.init.normal_(
        tower.router.dependent.weight, std=2.0
    )  # makes decisions so clear that a wrong weight has an effect
    return tower.eval()


def write_checkpoint(run: Path, recipe: Recipe, tower: AudioTower, step: int) -> Path:
    """Write a checkpoint of the audio side alone, as one rank would save it."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    draft = LocalDraft(folder)
    run.joinpath("recipe.yaml").write_text(dump(recipe), encoding="utf-8")
    shards = []
    for name, tensor in tower.state_dict().items():
        rect = matrix_of(tuple(tensor.shape))
        values = {PARAM: tensor.reshape(rect.rows, rect.cols)}
        shards.append(Shard(f"audio.{name}", tuple(tensor.shape), rect, values, None))
    tensors = {key_of(s.name, PARAM, s.rect): s.values[PARAM].contiguous() for s in shards}
    files: dict[str, FileEntry] = {"audio-00000.safetensors": write_tensors(draft, "audio-00000.safetensors", tensors)}
    state = {"step": step, "extra": {"recipe": dump(recipe)}}
    files["state.json"] = write_text(draft, "state.json", json.dumps(state))
    entries = merge_entries([entries_of(shards, "audio", 0)], [])
    write_text(draft, "manifest.json", Manifest(step, {"world": 1}, files, entries).dumps())
    return folder


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("debug", ["train.encoder_batch_sec=1"])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> Path:
    run = tmp_path_factory.mktemp("runs") / "debug"
    write_checkpoint(run, recipe, make_tower(recipe), 7)
    return run


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows = clip_rows(folder, 9, prefix="a", seconds=0.3)
    rows += clip_rows(folder, 5, prefix="b", seconds=1.2, task="er", language=None, source="stage")
    rows += clip_rows(folder, 3, prefix="c", seconds=0.4, split="test")
    pair = row("pair", audio=["a-0.flac", "b-0.flac"], task="aqa")
    return write_manifest(folder, [*rows, pair, row("words", task="text")])


def expected(manifest: Path, tower: AudioTower, split: str | None) -> ExpertLoad:
    """Return the expert load of a manifest's clips, which the model in memory routes one by one."""
    total = ExpertLoad((), (), {})
    for line in manifest.read_text().splitlines():
        meta = json.loads(line)
        names = meta["audio"] if isinstance(meta["audio"], list) else [meta["audio"]] if meta["audio"] else []
        for name in names if split in (None, meta["split"]) else ():
            samples, _ = soundfile.read(manifest.parent / name, dtype="float32")
            clips = Ragged.of([torch.from_numpy(np.asarray(samples))])
            with torch.no_grad():
                assert tower.primary is not None
                no_prompt = Ragged(torch.zeros(0, dtype=torch.int64), (0,))
                routing = tower.router(clips, tower.primary(clips), no_prompt)
            seconds = len(samples) / SAMPLE_RATE
            group = group_of(meta["task"], meta, seconds)
            total += ExpertLoad.of(routing, [group], [seconds], ["hubert", "wavlm"])
    return total


def check_equal(found: ExpertLoad, wanted: ExpertLoad) -> None:
    def values(load: Load) -> list[float]:
        return np.concatenate([np.ravel(v) for v in load.to_json()]).tolist()

    assert found.cells.keys() == wanted.cells.keys()
    for group, load in wanted.cells.items():
        assert values(found.cells[group]) == pytest.approx(values(load), abs=2e-5), group


@pytest.mark.parametrize("split", [None, "train", "test"])
def test_manifest_is_routed_as_by_the_saved_model(run: Path, recipe: Recipe, manifest: Path, split: str | None) -> None:
    profile = profile_data(find_run(run), manifest, split)
    check_equal(profile.load, expected(manifest, make_tower(recipe), split))
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    chosen = [r for r in rows if split in (None, r["split"])]
    clips = Counter({r["task"]: 0 for r in chosen})
    for r in chosen:
        clips[r["task"]] += len(r["audio"]) if isinstance(r["audio"], list) else r["audio"] is not None
    assert {t: load.num_clips for t, load in profile.load.by_task().items() if t != "all"} == {
        task: num for task, num in clips.items() if num
    }
    assert profile.advice is not None and min(profile.advice.costs_sec) >= 0 < max(profile.advice.costs_sec)
    assert not profile.skipped and profile.origin.endswith("routed by the checkpoint of step 7")


def test_a_gate_that_reads_the_instruction_gets_its_tokens(manifest: Path, tmp_path: Path) -> None:
    overrides = [f"data.root={manifest.parent}", f"data.cache_dir={tmp_path / 'cache'}", "data.eval_splits=[test]"]
    overrides += [
        "data.datasets.0.manifest=set.jsonl",
        "data.tokenizer.train_vocab_size=64",
        "model.router.input=prompt",
    ]
    recipe = load_recipe("debug", overrides)
    prepared = prepare(recipe.data, recipe.model.adapter.rate)
    tokenizer = prepared.tokenizer
    torch.manual_seed(2)
    tower = AudioTower(recipe.model, LLM_DIM, tokenizer.vocab_size).eval()
    torch.nn.init.normal_(tower.router.dependent.weight, std=2.0)
    write_checkpoint(tmp_path / "debug", recipe, tower, 1)
    shutil.copy(prepared.tokenizer_path, tmp_path / "debug" / "tokenizer.model")
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    instructions = [r["instruction"] for r in rows if r["task"] == "er"]
    assert len(set(instructions)) == 5
    prompts = Ragged.of([torch.tensor(tokenizer.encode(text)) for text in instructions])
    with torch.no_grad():
        routing = tower.router(Ragged.of([torch.zeros(1)] * 5), None, prompts)
    found = profile_data(find_run(tmp_path / "debug"), manifest, None).load.by_task()["er"]
    assert found.probs == pytest.approx(routing.probs.sum(0).numpy(), abs=1e-4)
    assert found.entropy_of_mean[1] - found.mean_entropy[1] > 1e-3  # the gate distinguishes the instructions


def test_shards_are_routed_like_their_manifest(run: Path, manifest: Path, tmp_path: Path) -> None:
    build_shards(manifest, str(tmp_path / "shards"), split="train", limits=ShardLimits(max_samples=4))
    found = profile_data(find_run(run), tmp_path / "shards", None)
    check_equal(found.load, profile_data(find_run(run), manifest, "train").load)
    with pytest.raises(UserError, match=r"no samples of split 'dev'; choose one of train"):
        profile_data(find_run(run), tmp_path / "shards", "dev")


def test_unusable_samples_are_counted(run: Path, tmp_path: Path) -> None:
    rows = clip_rows(tmp_path, 2)
    (tmp_path / "cut.flac").write_bytes((tmp_path / "clip-0.flac").read_bytes()[:600])
    broken = [row("cut", audio="cut.flac"), row("other", task="singing"), row("mute", answer=" ")]
    found = profile_data(find_run(run), write_manifest(tmp_path, [*rows, *broken]), None)
    assert found.load.total().num_clips == 2
    assert found.skipped == {"broken": 1, "unknown_task": 1, "empty_answer": 1}


def test_text_alone_gives_an_empty_profile(run: Path, tmp_path: Path) -> None:
    found = profile_data(find_run(run), write_manifest(tmp_path, [row("words", task="text")]), None)
    assert not found.load.cells and found.advice is None and found.dead == ()


def test_every_tensor_comes_from_the_checkpoint(run: Path, recipe: Recipe) -> None:
    reader, saved = open_checkpoint(find_run(run))
    assert saved == recipe
    torch.manual_seed(1)
    loaded, wanted = load_tower(saved.model, reader).state_dict(), make_tower(recipe).state_dict()
    assert loaded.keys() == wanted.keys()
    assert not [name for name, tensor in wanted.items() if not torch.equal(loaded[name].cpu(), tensor)]


def test_newest_undamaged_checkpoint_is_used(recipe: Recipe, manifest: Path, tmp_path: Path) -> None:
    run = tmp_path / "debug"
    for step in (3, 5):
        write_checkpoint(run, recipe, make_tower(recipe), step)
    newest = run / "checkpoints" / "step-00000005" / "audio-00000.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    assert open_checkpoint(find_run(run))[0].manifest.step == 3
    with pytest.raises(UserError, match=r"step-00000005: audio-00000\.safetensors has .* bytes instead of"):
        open_checkpoint(find_run(newest.parent))
    with pytest.raises(UserError, match="no checkpoint"):
        open_checkpoint(RunPath(tmp_path, None))


def test_a_model_without_experts_has_nothing_to_route(recipe: Recipe, manifest: Path, tmp_path: Path) -> None:
    plain = replace(recipe, model=replace(recipe.model, experts=(), router=RouterConfig()))
    tower = AudioTower(plain.model, LLM_DIM, VOCAB_SIZE)
    write_checkpoint(tmp_path / "debug", plain, tower, 1)
    with pytest.raises(UserError, match="no encoder experts"):
        profile_data(find_run(tmp_path / "debug"), manifest, None)
    with pytest.raises(UserError, match=r"contains no shards\.json"):
        profile_data(
            find_run(write_checkpoint(tmp_path / "x", recipe, make_tower(recipe), 1).parents[1]), tmp_path, None
        )
