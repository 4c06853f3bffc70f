"""Tests of writing and reading shards and their indexes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import webdataset

from model.errors import UserError
from tests.trainer.data_corpus import audio_bytes, clip_rows, row, write_manifest, write_shards
from trainer.data.fetch import read_samples
from trainer.data.shard_build import ShardLimits, build_shards
from trainer.data.shards import FORMAT_VERSION, INDEX_NAME, RawSample, Selection, ShardSet
from trainer.storage.store import ChangedError, LocalStore


@pytest.fixture
def built(tmp_path: Path) -> tuple[list[dict], Path]:
    rows = clip_rows(tmp_path, 7)
    rows.append(row("text-0", task="text", subset="prose"))
    rows.append(row("two-clips", audio=["clip-0.flac", "clip-1.flac"], task="sqa", split="test"))
    build_shards(write_manifest(tmp_path, rows), str(tmp_path / "out"), limits=ShardLimits(max_samples=4))
    return rows, tmp_path / "out"


def test_every_sample_is_read_as_it_was_written(built: tuple[list[dict], Path], tmp_path: Path) -> None:
    rows, out = built
    shards = ShardSet(LocalStore(out))
    assert [s.num_samples for s in shards.shards] == [4, 4, 1]
    found = {}
    for shard, info in enumerate(shards.shards):
        for index, raw in read_samples(shards, shard, range(info.num_samples)).items():
            assert isinstance(raw, RawSample)
            assert raw.key == shards.table(shard)[index].key
            found[raw.key] = raw
    assert {k: r.metadata for k, r in found.items()} == {r["id"]: r for r in rows}
    assert [bytes(c) for c in found["clip-3"].clips] == [(tmp_path / "clip-3.flac").read_bytes()]
    assert found["text-0"].clips == ()
    assert [bytes(c) for c in found["two-clips"].clips] == [
        (tmp_path / f"clip-{i}.flac").read_bytes() for i in range(2)
    ]


def test_plain_webdataset_reads_our_shards(built: tuple[list[dict], Path], tmp_path: Path) -> None:
    rows, out = built
    files = sorted(str(p) for p in out.glob("*.tar"))
    samples = {s["__key__"]: s for s in webdataset.WebDataset(files, shardshuffle=False, empty_check=False)}
    assert {k: json.loads(s["json"]) for k, s in samples.items()} == {r["id"]: r for r in rows}
    assert samples["clip-2"]["flac"] == (tmp_path / "clip-2.flac").read_bytes()
    assert samples["two-clips"]["1.flac"] == (tmp_path / "clip-1.flac").read_bytes()


def test_selection_counts_come_from_the_index_and_agree_with_the_tables(built: tuple[list[dict], Path]) -> None:
    _, out = built
    shards = ShardSet(LocalStore(out))
    for selection, expected in (
        (Selection(), 9),
        (Selection(split="train"), 8),
        (Selection(split="train", tasks=("asr",)), 7),
        (Selection(subsets=("prose",)), 1),
        (Selection(tasks=("er",)), 0),
    ):
        counts = shards.num_selected(selection)
        assert sum(counts) == expected
        for shard, count in enumerate(counts):
            assert sum(selection.matches(e) for e in shards.table(shard)) == count


def test_a_foreign_table_is_refused(built: tuple[list[dict], Path]) -> None:
    _, out = built
    table = out / "shard-000001.idx.json"
    table.write_bytes((out / "shard-000000.idx.json").read_bytes())
    with pytest.raises(ChangedError, match=r"shard-000001.idx.json: belongs to another version"):
        ShardSet(LocalStore(out)).table(1)


@pytest.mark.parametrize(
    "index",
    [
        "[]",
        "{",
        '{"version": 0}',
        f'{{"version": {FORMAT_VERSION}, "shards": [{{}}]}}',
        f'{{"version": {FORMAT_VERSION}, "shards": 3}}',
    ],
)
def test_a_malformed_index_is_a_one_line_error(tmp_path: Path, index: str) -> None:
    (tmp_path / INDEX_NAME).write_text(index)
    with pytest.raises(UserError, match=r"shards.json: .*make the shards again"):
        ShardSet(LocalStore(tmp_path))


def test_a_shard_name_cannot_leave_its_folder(tmp_path: Path) -> None:
    out = write_shards(tmp_path / "out", [(row("a"), [("flac", audio_bytes(0.1))])], per_shard=1)
    index = (out / INDEX_NAME).read_text().replace("shard-000000.tar", "../shard-000000.tar")
    (out / INDEX_NAME).write_text(index)
    with pytest.raises(UserError, match="malformed"):
        ShardSet(LocalStore(out))
