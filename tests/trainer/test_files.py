"""Tests that files respect the umask, are not written through links, and can be shared by processes without loss."""

from __future__ import annotations

import json
import multiprocessing
import os
import stat
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from model.errors import UserError
from tests.tools.exportable import write_manifest
from trainer.data.sentencepiece_training import train_sentencepiece
from trainer.data.shard_build import ShardLimits, build_shards
from trainer.data.shards import INDEX_NAME, read_index
from trainer.files import locked, sweep_leftovers, write_whole
from trainer.storage.open import open_store
from trainer.telemetry.events import begin_attempt
from trainer.telemetry.jsonl import write_atomically


@pytest.fixture
def strict() -> Iterator[None]:
    before = os.umask(0o077)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_umask_is_respected(tmp_path: Path, strict: None) -> None:
    open_store(str(tmp_path / "store")).put("a", [b"x"])
    open_store(str(tmp_path / "store")).put_if_absent("b", b"x")
    train_sentencepiece(["a b c d e"] * 9, 12, tmp_path / "t.model", "<audio>")
    write_atomically(tmp_path / "c.json", "{}")
    begin_attempt(tmp_path)
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) == 5
    assert {mode(p) for p in files} == {0o600}
    os.umask(0o002)
    write_atomically(tmp_path / "c.json", "{}")
    assert mode(tmp_path / "c.json") == 0o664


def test_a_write_leaves_nothing_if_it_fails(tmp_path: Path) -> None:
    def parts() -> Iterator[bytes]:
        yield b"half"
        raise OSError("no space")

    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(OSError, match="no space"):
        write_whole(tmp_path / "a", parts())
    assert (tmp_path / "a").read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]


def test_a_link_in_the_place_of_a_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"mine")
    (tmp_path / "a").symlink_to(tmp_path / "victim")
    (tmp_path / "a.part").symlink_to(tmp_path / "victim")  # the temporary name of earlier versions
    write_atomically(tmp_path / "a", "new")
    assert (tmp_path / "victim").read_bytes() == b"mine" and (tmp_path / "a").read_text() == "new"
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"), locked(tmp_path / "lock"):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_many_writers_of_one_file_leave_one_whole_content(tmp_path: Path) -> None:
    contents = [bytes([n]) * 100_000 for n in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda c: write_whole(tmp_path / "a", [c[:50_000], c[50_000:]]), contents * 5))
    assert (tmp_path / "a").read_bytes() in contents and os.listdir(tmp_path) == ["a"]


def test_leftovers_are_swept(tmp_path: Path) -> None:
    old, young, other = (
        tmp_path / name for name in (".a.0123456789abcdef.part", ".b.0123456789abcdef.part", ".c.0123.part")
    )
    for path in (old, young, other):
        path.write_bytes(b"")
    os.utime(old, (0, 0))
    os.utime(other, (0, 0))
    sweep_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".b.0123456789abcdef.part", ".c.0123.part"]
    sweep_leftovers(tmp_path / "nothing")


def test_a_lock_is_held_by_one_and_leaves_no_file(tmp_path: Path) -> None:
    holders, most = [0], [0]

    def work(_: int) -> None:
        with locked(tmp_path / "lock") as held:
            assert held
            holders[0] += 1
            most[0] = max(most[0], holders[0])
            time.sleep(0.002)
            holders[0] -= 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(40)))
    assert most == [1] and os.listdir(tmp_path) == []
    with locked(tmp_path / "lock"), pytest.raises(BlockingIOError), locked(tmp_path / "lock", wait=False):
        pass


def build(arguments: tuple[str, str, float, int]) -> str:
    manifest, out, max_skipped, max_samples = arguments
    try:
        build_shards(Path(manifest), out, limits=ShardLimits(max_samples), max_skipped_fraction=max_skipped)
    except UserError as error:
        return str(error)
    return "built"


@pytest.mark.slow
def test_builds_with_different_limits_do_not_destroy_each_others_shards(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path, 30)
    broken = {"id": "broken", "audio": "none.flac", "task": "asr", "split": "dev", "instruction": "a", "answer": "a"}
    (tmp_path / "none.flac").write_bytes(b"not audio")
    manifest.write_text(manifest.read_text() + json.dumps(broken) + "\n")
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        for trial in range(8):
            out = tmp_path / f"out{trial}"
            # Two of the builds accept the broken sample, one does not, and one makes shards of a different size.
            jobs = [(str(manifest), str(out), *rest) for rest in ((0.5, 4), (0.0, 4), (0.5, 4), (0.5, 7))]
            found = pool.map(build, jobs, chunksize=1)
            assert "built" in found, found
            index = read_index(open_store(str(out)))
            assert index.num_samples == 30 and {s.num_samples for s in index.shards[:-1]} in ({4}, {7})
            for shard in index.shards:
                assert (out / shard.name).stat().st_size == shard.num_bytes
            assert not [p.name for p in out.iterdir() if p.name.startswith(".") or p.name == "building.json"]


def test_a_build_sweeps_what_a_killed_one_left(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / ".shard-000000.tar.0123456789abcdef.part").write_bytes(b"half")
    build_shards(write_manifest(tmp_path), str(out))
    assert (out / INDEX_NAME).is_file() and not [p for p in out.iterdir() if p.name.startswith(".")]


def test_a_build_waits_for_the_one_before_it(tmp_path: Path) -> None:
    manifest, out = write_manifest(tmp_path), tmp_path / "out"
    out.mkdir()
    found: list[str] = []
    with locked(out / ".building.lock"):
        thread = threading.Thread(target=lambda: found.append(build((str(manifest), str(out), 0.5, 4))))
        thread.start()
        time.sleep(0.2)
        assert found == [] and not (out / INDEX_NAME).exists()
    thread.join(20)
    assert found == ["built"]
