"""Tests of rectangles, manifests and files of checkpoints. Rectangles that are read may differ from those written."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from model.errors import UserError
from trainer.checkpoint.folder import LocalFolder
from trainer.checkpoint.layout import (
    Shard,
    Slices,
    TensorEntry,
    entries_of,
    files_of,
    key_of,
    merge_entries,
    sliced_elements,
)
from trainer.checkpoint.local import JoinedDraft, LocalCheckpoints, LocalDraft
from trainer.checkpoint.manifest import FORMAT_VERSION, FileEntry, Manifest
from trainer.checkpoint.reader import DamagedError, Reader, check_files, hash_file
from trainer.checkpoint.rect import Rect, matrix_of, rects_of_range
from trainer.checkpoint.tensor_file import TensorFile
from trainer.checkpoint.writer import Region, num_bytes, write_tensors

SHAPES = ((7, 5), (6,), (), (3, 2, 4), (1, 9))


def cut(name: str, whole: torch.Tensor, cuts: list[int]) -> list[list[Shard]]:
    """Cut a flat tensor at `cuts`, and return the shards of each part."""
    shape, flat, bounds = tuple(whole.shape), whole.flatten(), [0, *sorted(cuts), whole.numel()]
    parts = []
    for start, stop in zip(bounds, bounds[1:], strict=False):
        shards = []
        for offset, rect in rects_of_range(matrix_of(shape), start, stop):
            values = flat[start + offset :][: rect.numel].view(rect.rows, rect.cols)
            shards.append(Shard(name, shape, rect, {"param": values}, None))
        parts.append(shards)
    return parts


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 36), st.integers(0, 36))
def test_a_range_is_at_most_three_rectangles_of_its_elements(rows: int, cols: int, a: int, b: int) -> None:
    start, stop = sorted((a % (rows * cols + 1), b % (rows * cols + 1)))
    whole = torch.arange(10 * 20).view(10, 20)
    box = Rect(2, 3, rows, cols)
    found = list(rects_of_range(box, start, stop))
    assert len(found) <= 3
    inside = whole[box.within(Rect(0, 0, 10, 20))].flatten()[start:stop]
    for offset, rect in found:
        assert whole[rect.within(Rect(0, 0, 10, 20))].flatten().equal(inside[offset : offset + rect.numel])
    assert sum(rect.numel for _, rect in found) == stop - start


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(SHAPES), st.lists(st.floats(0, 1), max_size=4), st.lists(st.floats(0, 1), max_size=4))
def test_any_partition_is_read_from_any_other(
    tmp_path_factory: pytest.TempPathFactory, shape: tuple[int, ...], saved: list[float], wanted: list[float]
) -> None:
    folder = tmp_path_factory.mktemp("checkpoint")
    numel = math.prod(shape)
    whole = torch.arange(float(numel)).view(shape)
    files, entries = {}, []
    for rank, shards in enumerate(cut("t", whole, [int(x * numel) for x in saved])):
        file = f"audio-{rank:05d}.safetensors"
        tensors = {key_of(s.name, "param", s.rect): s.values["param"] for s in shards}
        files[file] = write_tensors(LocalDraft(folder), file, tensors)
        entries.append(entries_of(shards, "audio", rank))
    manifest = Manifest(1, {}, files, merge_entries(entries, []))
    reader = Reader(LocalFolder(folder), Manifest.loads(manifest.dumps()))
    empty = torch.full(shape, -1.0)
    for shards in cut("t", empty, [int(x * numel) for x in wanted]):
        for shard in shards:
            reader.check(shard)
            reader.fill(shard)
    assert empty.equal(whole)


def test_files_are_safetensors(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(2, 2).to(torch.bfloat16),
        "c": torch.tensor(True),
        "d": torch.arange(5, dtype=torch.uint8),
        "e": torch.arange(6).view(2, 3).T,
    }
    entry = write_tensors(LocalDraft(tmp_path), "x.safetensors", tensors)
    assert entry == hash_file(LocalFolder(tmp_path), "x.safetensors")
    ours = TensorFile(LocalFolder(tmp_path), "x.safetensors")
    assert all(ours.read(k).equal(v) for k, v in tensors.items())
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    assert all(read[k].equal(v) and read[k].dtype == v.dtype for k, v in tensors.items())


def test_ranks_of_a_node_share_a_file(tmp_path: Path) -> None:
    frozen = "frozen-00000001-0001-ab"
    tensors = {
        (folder, rank): {f"t{rank}": torch.randn(300, 5 + rank)} for folder in ("", f"{frozen}/") for rank in (1, 0)
    }
    files: dict[str, FileEntry] = {}
    for rank in (1, 0):
        draft = JoinedDraft(tmp_path, Region(node=3, own_start=4096 * 4 * rank, frozen_start=4096 * 2 * rank))
        for folder in ("", f"{frozen}/"):
            name = f"{folder}audio-{rank:05d}.safetensors"
            files[name] = write_tensors(draft, name, tensors[folder, rank])
            assert files[name].size_bytes == num_bytes(tensors[folder, rank])
        files[f"rng-{rank:05d}.safetensors"] = write_tensors(
            draft, f"rng-{rank:05d}.safetensors", {"g": torch.arange(9)}
        )
    draft.sync()
    assert sorted(path.name for path in tmp_path.iterdir()) == [frozen, "node-00003.joined"]
    assert [path.name for path in (tmp_path / frozen).iterdir()] == ["node-00003.joined"]

    (tmp_path / frozen).rename(tmp_path.parent / frozen)  # a commit does this
    manifest = Manifest.loads(Manifest(1, {}, files, {}).dumps())
    assert manifest.files == files
    folder = LocalFolder(tmp_path)
    check_files(folder, manifest, files)
    reader = Reader(folder, manifest)
    for (where, rank), wanted in tensors.items():
        read = reader.tensors(f"{where}audio-{rank:05d}.safetensors")
        assert read.keys() == wanted.keys() and all(read[k].equal(v) for k, v in wanted.items())
    joined = tmp_path / "node-00003.joined"
    os.truncate(joined, joined.stat().st_size - 9)
    with pytest.raises(DamagedError, match=r"rng-00001.safetensors has \d+ bytes instead of"):
        check_files(folder, manifest, files)
    with open(joined, "r+b") as file:
        file.seek(files["audio-00000.safetensors"].offset + 500)
        file.write(b"\xff\xff")
    with pytest.raises(DamagedError, match=r"audio-00000.safetensors has a different checksum"):
        check_files(folder, manifest, ["audio-00000.safetensors"])


def test_ranks_of_a_node_that_do_not_share_a_disk_are_noticed(tmp_path: Path) -> None:
    checkpoints = LocalCheckpoints(tmp_path / "one")
    attempt, tensors = checkpoints.begin_attempt(), {"t": torch.zeros(300)}
    drafts = [checkpoints.draft(attempt, 1, Region(0, 0, 0)), JoinedDraft(tmp_path / "other", Region(0, 4096, 0))]
    names = ["audio-00000.safetensors", "audio-00001.safetensors"]
    files = {name: write_tensors(draft, name, tensors) for draft, name in zip(drafts, names, strict=True)}
    with pytest.raises(
        OSError, match=r"node-00000.joined lacks the bytes that another rank wrote: all ranks must share"
    ):
        checkpoints.commit(attempt, Manifest(1, {}, files, {}))
    assert checkpoints.steps() == []


@pytest.mark.parametrize(
    "stored_in", ["../node-00000.joined", "audio-00000.safetensors", f"frozen-1/{'node-00000'}.joined"]
)
def test_joined_files_elsewhere_are_refused(stored_in: str) -> None:
    files = {"llm-00000.safetensors": FileEntry(8, "0" * 32, stored_in, 0)}
    with pytest.raises(ValueError, match="is not the name of a joined file"):
        Manifest.loads(Manifest(1, {}, files, {}).dumps())


@pytest.mark.parametrize(("size", "offset"), [(-8, 0), (8, -1), (0, 1 << 64)])
def test_places_that_no_file_has_are_refused(size: int, offset: int) -> None:
    files = {"llm-00000.safetensors": FileEntry(size, "0" * 32, "node-00000.joined", offset)}
    with pytest.raises(ValueError, match="bytes from byte"):
        Manifest.loads(Manifest(1, {}, files, {}).dumps())


def test_pieces_must_cover_the_tensor_once() -> None:
    parts = [entries_of(shards, "audio", i) for i, shards in enumerate(cut("t", torch.zeros(4, 3), [5]))]
    merge_entries(parts, [])
    with pytest.raises(AssertionError, match="saved 5 elements"):
        merge_entries(parts[:1], [])
    with pytest.raises(AssertionError, match="saved 17 elements"):
        merge_entries([*parts, parts[0]], [])


def sliced(shape: tuple[int, ...], ranks: range, numel: int) -> list[list[Shard]]:
    """Cut a tensor into slices of `numel` elements, one for each rank of `ranks`, and return each rank's shards."""
    whole, slices = torch.arange(float(math.prod(shape))), Slices(ranks, numel)

    def part(index: int, at: int, rect: Rect) -> torch.Tensor:
        return whole[index * numel + at :][: rect.numel].view(rect.rows, rect.cols)

    return [
        [
            Shard("t", shape, rect, {"param": part(i, at, rect)}, None, slices=slices)
            for at, rect in slices.rect_of(matrix_of(shape), i)
        ]
        for i in range(len(ranks))
    ]


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(SHAPES), st.integers(1, 9), st.integers(1, 3), st.lists(st.floats(0, 1), max_size=4))
def test_slices_are_read_as_any_partition(
    tmp_path_factory: pytest.TempPathFactory, shape: tuple[int, ...], world: int, stride: int, wanted: list[float]
) -> None:
    folder, numel = tmp_path_factory.mktemp("checkpoint"), math.prod(shape)
    ranks = range(1, 1 + world * stride, stride)
    files, entries, counts = {}, [], []
    for rank, shards in zip(ranks, sliced(shape, ranks, -(-numel // world)), strict=True):
        file = f"audio-{rank:05d}.safetensors"
        tensors = {key_of(s.name, "param", s.rect): s.values["param"] for s in shards}
        files[file] = write_tensors(LocalDraft(folder), file, tensors)
        entries.append(entries_of(shards, "audio", rank))
        counts.append(sliced_elements(shards))
    manifest = Manifest(1, {}, files, merge_entries(entries, counts))
    assert files_of(manifest.tensors.values()) <= set(files)
    reader, found = Reader(LocalFolder(folder), Manifest.loads(manifest.dumps())), torch.full(shape, -1.0)
    for shards in cut("t", found, [int(x * numel) for x in wanted]):
        for shard in shards:
            reader.fill(shard)
    assert found.flatten().equal(torch.arange(float(numel)))
    if world > 1:
        with pytest.raises(AssertionError, match="slices miss elements"):
            merge_entries(entries, counts[1:])


def test_malformed_slices_are_refused() -> None:
    files = {f"audio-{rank:05d}.safetensors": FileEntry(8, "0" * 32) for rank in range(2)}

    def manifest(slices: Slices, family: str = "audio") -> str:
        return Manifest(3, {}, files, {"t": TensorEntry((2, 3), ("param",), None, (), slices, family)}).dumps()

    assert Manifest.loads(manifest(Slices(range(2), 3))).tensors["t"].num_slices == 2
    for text in (manifest(Slices(range(2), 2)), manifest(Slices(range(2), 0)), manifest(Slices(range(-1, 2), 3))):
        with pytest.raises(ValueError, match="does not describe slices"):
            Manifest.loads(text)
    for text in (manifest(Slices(range(1, 3), 3)), manifest(Slices(range(2), 3), "../audio")):
        with pytest.raises(ValueError, match="not listed"):
            Manifest.loads(text)


def test_malformed_manifests_are_refused() -> None:
    entry = TensorEntry((2, 3), ("param",), None, (("llm-00000.safetensors", Rect(0, 0, 2, 3)),))
    files = {"llm-00000.safetensors": FileEntry(8, "0" * 32)}
    good = Manifest(3, {"world": 1}, files, {"t": entry})
    assert Manifest.loads(good.dumps()) == good
    with pytest.raises(ValueError, match="checksum"):
        Manifest.loads(good.dumps().replace('"step":3', '"step":4'))
    outside = {"../llm-00000.safetensors": files["llm-00000.safetensors"]}
    with pytest.raises(ValueError, match="not a checkpoint's file name"):
        Manifest.loads(Manifest(3, {}, outside, {}).dumps())
    beyond = TensorEntry((2, 3), ("param",), None, (("llm-00000.safetensors", Rect(1, 0, 2, 3)),))
    with pytest.raises(ValueError, match="not in the tensor"):
        Manifest.loads(Manifest(3, {}, files, {"t": beyond}).dumps())
    assert "pickle" not in good.dumps() and json.loads(good.dumps())["body"]["version"] == FORMAT_VERSION


def test_another_model_is_named() -> None:
    entry = TensorEntry((2, 3), ("param",), None, ())
    reader = Reader(LocalFolder(Path("step-00000001")), Manifest(1, {}, {}, {"audio.a": entry}))
    whole = {"param": torch.zeros(2, 3)}
    reader.check(Shard("audio.a", (2, 3), Rect(0, 0, 2, 3), whole, None))
    with pytest.raises(UserError, match="holds no audio.b"):
        reader.check(Shard("audio.b", (2, 3), Rect(0, 0, 2, 3), whole, None))
    with pytest.raises(UserError, match=r"audio.a has shape \(2, 3\), but the model's is \(3, 2\)"):
        reader.check(Shard("audio.a", (3, 2), Rect(0, 0, 3, 2), whole, None))
    with pytest.raises(UserError, match="was frozen"):
        reader.check(Shard("audio.a", (2, 3), Rect(0, 0, 2, 3), whole, 0))
