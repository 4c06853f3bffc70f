"""Tests of conversations in manifests, shards, tars of other programs, the loader, evaluation and the dry run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model.batch import IGNORE, Sample
from model.errors import UserError
from model.lengths import TokenRate
from tests.trainer.chat_tokenizers import chat_config, write_chat_tokenizer
from tests.trainer.data_corpus import audio_bytes, data_config, row, write_manifest, write_shards
from tools import make_shards
from trainer.config.load import load_recipe
from trainer.data.config import DatasetConfig
from trainer.data.errors import SampleError
from trainer.data.eval_set import eval_samples
from trainer.data.loader import Loader
from trainer.data.manifest import read_manifest
from trainer.data.prepare import check_loss_turns, prepare
from trainer.data.shard_check import build_index
from trainer.data.stored import open_stored
from trainer.data.stream import SampleStream
from trainer.dry_run import check_tokenizer
from trainer.storage.store import LocalStore

RATE = TokenRate((2, 2))
SYSTEM = {"role": "system", "content": "Be brief."}
ANSWERS = [{"role": "assistant", "content": text} for text in ("Rain.", "Wind.")]


def conversation_row(key: str, messages: list[Any], **fields: Any) -> dict[str, Any]:
    base = row(key, task="sqa", messages=messages, **fields)
    return {name: value for name, value in base.items() if name not in ("instruction", "answer")}


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Write a manifest with the same conversation in two forms (tags and blocks), and with three wrong rows."""
    for i in range(2):
        (tmp_path / f"{i}.flac").write_bytes(audio_bytes(0.2 + 0.1 * i, seed=i))
    tags = [{"role": "user", "content": text} for text in ("<audio>What is this?", "And <audio>?")]
    parts = [{"type": "audio", "audio": f"{i}.flac"} for i in range(2)]
    texts = [{"type": "text", "text": text} for text in ("What is this?", "And ", "?")]
    blocks = [{"role": "user", "content": c} for c in ([parts[0], texts[0]], [texts[1], parts[1], texts[2]])]

    def messages(users: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [SYSTEM, users[0], ANSWERS[0], users[1], ANSWERS[1]]

    rows = [
        conversation_row("tags", messages(tags), audio=["0.flac", "1.flac"]),
        conversation_row("blocks", messages(blocks)),
        conversation_row("few", messages(tags), audio="0.flac"),
        conversation_row("twice", messages(blocks), audio="0.flac"),
        conversation_row("order", [tags[0], tags[1], ANSWERS[0]], audio=["0.flac", "1.flac"]),
    ]
    return write_manifest(tmp_path, rows)


def same(a: Sample, b: Sample) -> bool:
    pairs = [(a.token_ids, b.token_ids), (a.audio_mask, b.audio_mask), (a.labels, b.labels)]
    assert a.clip_prompt_ids is not None and b.clip_prompt_ids is not None
    pairs += [*zip(a.clips, b.clips, strict=True), *zip(a.clip_prompt_ids, b.clip_prompt_ids, strict=True)]
    return all(torch.equal(x, y) for x, y in pairs)


def by_key(samples: Iterator[Sample] | list[Sample]) -> dict[str, Sample]:
    return {s.key: s for s in samples}


def test_manifests_shards_and_tars_give_the_same_samples(manifest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = manifest.parent
    assert make_shards.main([str(manifest), str(root / "shards"), "--max-skipped-fraction", "0.7"]) == 0
    skipped = [json.loads(line) for line in (root / "shards" / "skipped.jsonl").read_text().splitlines()]
    assert [(s["key"], s["reason"]) for s in skipped] == [
        ("few", "bad_messages"),
        ("twice", "wrong_type"),
        ("order", "bad_messages"),
    ]
    assert "2 places" in skipped[0]["detail"] and "keep one of them" in skipped[1]["detail"]
    # The same samples in a tar of another program, whose index the trainer builds.
    stored = open_stored(str(root / "shards"))
    read = [item for item in stored.read(range(2)) if not isinstance(item, SampleError)]
    foreign = root / "foreign"
    items = [(meta, [("flac", bytes(f)) for f in files]) for files, meta in read]
    write_shards(foreign, items, per_shard=2)
    for path in foreign.glob("*.json"):
        path.unlink()
    assert build_index(LocalStore(foreign), {}) == []
    tokenizer = replace(chat_config(), path=str(write_chat_tokenizer(root / "tokenizer", "chatml")))
    found = {}
    for name in ("shards", "foreign"):
        config = data_config(root, DatasetConfig("d", shards=name), tokenizer=tokenizer, eval_splits=("train",))
        prepared = prepare(config, RATE)
        with Loader(SampleStream(prepared, seed=0, num_batches=1)) as loader:
            found[name] = by_key(list(next(iter(loader))[0].samples))
        asked = by_key(eval_samples(prepared, "train"))
        for key, sample in found[name].items():
            prompt = asked[key].token_ids
            assert torch.equal(sample.token_ids[: len(prompt)], prompt) and asked[key].num_targets == 0
            assert asked[key].meta["instruction"] == "And ?" and asked[key].meta["answer"] == "Wind."
            assert not sample.is_transcription and sample.answer_text == "Wind."
    assert same(found["shards"]["tags"], found["shards"]["blocks"])
    assert all(same(found["shards"][key], found["foreign"][key]) for key in ("tags", "blocks"))
    labels = found["shards"]["tags"].labels
    spans = prepared.tokenizer.decode(labels[labels != IGNORE].tolist())
    assert spans == "Rain.Wind." and int((labels == prepared.tokenizer.turn_end_id).sum()) == 2


def test_a_manifest_is_read_with_its_paths(manifest: Path) -> None:
    rows = {r.key: r for r in read_manifest(manifest)}
    assert [p.name for p in rows["blocks"].audio] == ["0.flac", "1.flac"] == [p.name for p in rows["tags"].audio]
    assert rows["tags"].metadata["instruction"] == "And ?" and rows["tags"].metadata["answer"] == "Wind."
    assert isinstance(rows["twice"].error, SampleError)
    bad = conversation_row("k", [{"role": "user", "content": [{"type": "audio", "audio": 3}]}, ANSWERS[0]])
    (found,) = read_manifest(write_manifest(manifest.parent, [bad], "bad.jsonl"))
    assert found.error is not None and "each must be a path" in found.error.detail


def test_a_template_that_changes_answers_is_refused_before_the_training(manifest: Path) -> None:
    root = manifest.parent
    tokenizer = replace(chat_config(), path=str(write_chat_tokenizer(root / "tokenizer", "thinking")))
    config = data_config(
        root, DatasetConfig("d", manifest=manifest.name), tokenizer=tokenizer, max_skipped_fraction=0.7
    )
    with pytest.raises(UserError, match=r"data.loss_turns = all: .*tokenizer changes earlier answers"):
        prepare(config, RATE)
    prepared = prepare(replace(config, loss_turns="last"), RATE)
    with pytest.raises(UserError, match="set data.loss_turns: last"):
        check_loss_turns(config, prepared.tokenizer)
    url, _ = prepared.datasets[0].shards["train"]
    with pytest.raises(UserError, match="set data.loss_turns: last"):
        check_loss_turns(replace(config, datasets=(DatasetConfig("d", shards=url),), root="/"), prepared.tokenizer)
    keys = {
        "data.root": root,
        "data.datasets": '[{name: d, manifest: "set.jsonl"}]',
        "data.tokenizer.path": tokenizer.path,
    }
    keys |= {"data.tokenizer.template": "'{audio}{instruction}'", "model.llm.config.vocab_size": 300}
    with pytest.raises(UserError, match="set data.loss_turns: last"):
        check_tokenizer(load_recipe("debug", [f"{name}={value}" for name, value in keys.items()]))
    check_tokenizer(
        load_recipe("debug", [f"{name}={value}" for name, value in keys.items()] + ["data.loss_turns=last"])
    )
    with Loader(SampleStream(prepared, seed=0, num_batches=1)) as loader:
        for sample in next(iter(loader))[0].samples:
            assert sample.num_targets == len("Wind.") + 1
