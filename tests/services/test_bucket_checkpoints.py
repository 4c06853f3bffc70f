"""Tests of checkpoints on a real S3 server: commits, verification, fencing, retention, and failures of the server."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from model.errors import UserError
from tests.services.swift import Swift
from tests.tools.exportable import write_manifest, write_run
from tests.trainer.plain_engines import FROZEN, LEARNED, PlainManager, engines, make_groups
from tools import checkpoints as checkpoints_tool
from tools import export
from trainer.checkpoint import background, bucket
from trainer.checkpoint import manager as manager_module
from trainer.checkpoint.bucket import BucketCheckpoints, Catalogue
from trainer.checkpoint.catalog import damage_of, find_checkpoint, open_checkpoints
from trainer.checkpoint.config import CheckpointConfig
from trainer.checkpoint.local import LocalCheckpoints
from trainer.parallel.groups import Groups
from trainer.storage.open import open_store
from trainer.storage.store import LocalStore, Store

ROOT = Path(__file__).resolve().parents[2]
Start = Callable[..., PlainManager]


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield make_groups()
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def no_megatron(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager_module.generators, "get_states", lambda device: {"host": torch.get_rng_state()})


@pytest.fixture
def url(swift: Swift, request: pytest.FixtureRequest) -> str:
    return f"s3://bucket/{request.node.name.replace('[', '-').replace(']', '').replace(' ', '_')}/checkpoints"


@pytest.fixture(params=["s3", "simulated"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the URL of a bucket or, for tests that need no server, the path to a folder that is used like a bucket."""
    if request.param == "s3":
        found: str = request.getfixturevalue("url")
        return found
    monkeypatch.setattr(manager_module, "open_checkpoints", lambda url, _: BucketCheckpoints(LocalStore(Path(url))))
    return str(tmp_path / "bucket")


simulated = pytest.mark.parametrize("place", ["simulated"], indirect=True)
s3 = pytest.mark.parametrize("place", ["s3"], indirect=True)


def opened(place: str) -> BucketCheckpoints:
    return BucketCheckpoints(open_store(place))


@pytest.fixture
def start(place: str, groups: Groups) -> Start:
    """Return a function that begins a new attempt of the run."""
    return lambda **config: PlainManager(place, CheckpointConfig(**{"keep_last": 3, **config}), groups)


def save(manager: PlainManager, step: int) -> str:
    """Save a checkpoint, and wait until it is committed."""
    manager.save(step, engines(float(step)), {"value": float(step)})
    manager.close()
    (url,) = manager.finished()
    return url


def newest(manager: PlainManager) -> tuple[str, float]:
    """Load the checkpoint from which a restart would resume, and return its URL and the value of its tensors."""
    folder = manager.latest()
    assert folder is not None
    into = engines(-1.0)
    into[FROZEN].fill_(-1)
    extra = manager.load(folder, into)
    assert {float(x) for x in into[LEARNED].unique()} == {extra["value"]} and (into[FROZEN] == 7.0).all()
    return folder.url, float(extra["value"])


def objects(url: str) -> list[str]:
    return list(open_store(url).list())


def folders(url: str, kind: str = "step") -> set[str]:
    return {name.partition("/")[0] for name in objects(url) if name.startswith(kind)}


def test_saved_found_verified_and_loaded(start: Start, place: str) -> None:
    assert start().latest() is None
    manager = start()
    assert save(manager, 1) == f"{place}/step-00000001"
    assert newest(start()) == (f"{place}/step-00000001", 1.0)
    assert save(manager := start(), 2) == f"{place}/step-00000002" and newest(manager)[1] == 2.0
    assert opened(place).steps() == [1, 2]


def alter(change: Callable[[bytes], bytes] | None) -> Callable[[Store, str], None]:
    def do(store: Store, name: str) -> None:
        if change is None:
            store.delete(name)
        else:
            store.put(name, [change(store.get(name))])

    return do


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGES: dict[str, tuple[str, Callable[[bytes], bytes] | None, str]] = {
    "flipped weight": ("audio-00000.safetensors", flipped, "audio-00000.safetensors has a different checksum"),
    "truncated": ("moments-00000.safetensors", lambda c: c[:100], "moments-00000.safetensors has 100 bytes"),
    "missing": ("rng-00000.safetensors", None, "rng-00000.safetensors is missing"),
    "half a manifest": ("manifest.json", lambda c: c[:100], "manifest.json cannot be read"),
    "no manifest": ("manifest.json", None, "manifest.json is missing"),
}


@simulated
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_the_newest_undamaged_checkpoint_is_used(
    damage: str, start: Start, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    file, change, line = DAMAGES[damage]
    for step in (1, 2):
        bad = save(start(), step)
    (name,) = [n for n in objects(place) if n.startswith("step-00000002") and n.endswith(file)]
    alter(change)(open_store(place), name)
    manager = start()
    with caplog.at_level(logging.WARNING):
        assert newest(manager) == (f"{place}/step-00000001", 1.0)
    (message,) = [r.getMessage() for r in caplog.records if "damaged" in r.getMessage()]
    assert bad in message and line in message and "\n" not in message
    assert save(manager, 2) == bad and newest(start())[1] == 2.0, "the damaged checkpoint must be replaced"


@simulated
def test_retention_and_frozen_weights_in_one_copy(start: Start, place: str) -> None:
    manager = start(keep_last=1, keep_every_steps=20, best_metric="eval/dev/asr/wer")
    for step, wer in ((10, 0.2), (20, 0.4), (25, 0.3), (30, 0.6)):
        save(manager, step)
        manager.note_scores(step, {"eval/dev/asr/wer": wer})
    assert opened(place).steps() == [10, 20, 30]
    assert len(folders(place)) == 3 and len(folders(place, "frozen")) == 1
    assert len([n for n in objects(place) if n.startswith("catalogue")]) == bucket._NUM_KEPT_CATALOGUES
    again = start(keep_last=1)
    assert newest(again)[1] == 30.0
    save(again, 40)
    assert opened(place).steps() == [40] and len(folders(place)) == 1 and len(folders(place, "frozen")) == 1
    assert newest(start())[1] == 40.0


@simulated
def test_uncommitted_files_are_invisible_and_deleted(start: Start, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    save(start(), 1)

    def killed(*_: Any) -> None:
        raise OSError(5, "as if killed here")

    manager = start()
    with monkeypatch.context() as patch:
        patch.setattr(BucketCheckpoints, "commit", killed)
        manager.save(2, engines(2.0), {"value": 2.0})
        with pytest.raises(UserError, match="as if killed here"):
            manager.close()
    assert any(name.startswith("step-00000002") for name in objects(place))
    assert opened(place).steps() == [1] and newest(start())[1] == 1.0
    assert not any(name.startswith("step-00000002") for name in objects(place)), "the next attempt must remove it"


@simulated
def test_earlier_attempt_is_fenced(start: Start, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check an old attempt that is saving when a new one begins, and that continues after the new one has saved."""
    old, reached, go_on = start(), threading.Event(), threading.Event()
    write, mine = background.write_tensors, old._place.attempt.token

    def slow(draft: Any, name: str, tensors: Any) -> Any:
        if mine in draft._folder:
            reached.set()
            assert go_on.wait(30)
        return write(draft, name, tensors)

    monkeypatch.setattr(background, "write_tensors", slow)
    old.save(2, engines(-2.0), {"value": -2.0})
    assert reached.wait(30)
    new = start()
    save(new, 2)
    go_on.set()
    with pytest.raises(UserError, match="attempt 2 of this run has started, so attempt 1 stops"):
        old.close()
    assert newest(new)[1] == 2.0 and opened(place).steps() == [2]
    save(new, 3)
    assert not [name for name in objects(place) if mine in name], "the old attempt's late files must be removed"


@s3
def test_run_survives_the_death_of_the_server_in_a_save(
    server: Swift, start: Start, place: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    manager = start(retry_sec=1.0)
    good = save(manager, 1)
    write, killed = background.write_tensors, threading.Event()

    def dies(draft: Any, name: str, tensors: Any) -> Any:
        if name.startswith("moments") and not killed.is_set():
            server.kill_proxy()
            killed.set()
        return write(draft, name, tensors)

    monkeypatch.setattr(background, "write_tensors", dies)
    try:
        manager.save(2, engines(2.0), {"value": 2.0})
        started = time.monotonic()
        torch.ones(100).sum()  # training continues
        assert time.monotonic() - started < 1 and killed.wait(10)
        save_thread = manager._save
        assert save_thread is not None
        outcome = save_thread.wait()
    finally:
        server.start_proxy()
    assert outcome.failure is not None and "no usable answer within 1 s" in outcome.failure
    (message,) = [r.getMessage() for r in caplog.records if "CHECKPOINT NOT SAVED" in r.getMessage()]
    assert "step-00000002" in message and "\n" not in message and server.secret not in message
    assert newest(start())[0] == good
    manager = start()
    assert save(manager, 3).endswith("step-00000003"), "the next save must succeed"
    assert newest(start())[1] == 3.0 and not [n for n in objects(place) if n.startswith("step-00000002")]


def test_large_file_is_uploaded_in_parts_and_read_back(url: str) -> None:
    checkpoints = open_checkpoints(url)
    attempt = checkpoints.begin_attempt()
    content = os.urandom(40 << 20)
    entry = checkpoints.draft(attempt, 1).write("audio-00000.safetensors", [memoryview(content)])
    from trainer.checkpoint.bucket_folder import BucketFolder
    from trainer.checkpoint.reader import hash_file

    folder = BucketFolder(open_store(url), url, attempt.folder("step", 1))
    assert hash_file(folder, "audio-00000.safetensors") == entry
    target = bytearray(9 << 20)
    folder.read_into("audio-00000.safetensors", (7 << 20) + 3, memoryview(target))
    assert bytes(target) == content[(7 << 20) + 3 : (16 << 20) + 3]


def copy_run(run: Path, url: str) -> None:
    """Copy a local run's checkpoints and tokenizer to a bucket, as if the run had saved them there."""
    source, into = LocalCheckpoints(run / "checkpoints"), open_checkpoints(f"{url}/checkpoints")
    attempt = into.begin_attempt()
    from trainer.checkpoint.reader import read_manifest

    for step in source.steps():
        manifest = read_manifest(source.folder(step))
        draft = into.draft(attempt, step)
        for path in source.folder(step).path.iterdir():
            draft.write(path.name, [path.read_bytes()])
        into.commit(attempt, manifest)
    open_store(url).put("tokenizer.model", [(run / "tokenizer.model").read_bytes()])


def test_tools_read_a_bucket(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run")
    manifest = write_manifest(tmp_path)
    copy_run(tmp_path / "run", url)
    assert damage_of(find_checkpoint(url)) is None
    assert checkpoints_tool.main([url, "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["url"] == f"{url}/checkpoints" and report["checkpoints"][0]["step"] == 40
    assert checkpoints_tool.main([url, "verify"]) == 0
    assert checkpoints_tool.main([url, "diff", "40", "40"]) == 0
    for source, name in ((url, "ours"), (f"{url}/checkpoints/step-00000040", "named"), (tmp_path / "run", "local")):
        arguments = ["--dtype", "fp32", "--activated-only", "0.01", "--run", str(tmp_path / "run")]
        assert export.main([str(source), str(tmp_path / name), "--verify", str(manifest), *arguments]) == 0
    wanted = (tmp_path / "local" / "model.safetensors").read_bytes()
    assert all((tmp_path / name / "model.safetensors").read_bytes() == wanted for name in ("ours", "named"))
    assert export.main([f"{url}/nowhere", str(tmp_path / "out")]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err


def test_a_run_saves_to_a_bucket_and_resumes_on_another_machine(swift: Swift, url: str, tmp_path: Path) -> None:
    """Train with both engines on two ranks. The second call has a different run folder, so it only finds the bucket."""
    from tools.demo_corpus import write_corpus

    write_corpus(tmp_path / "corpus", scale=0.05)
    root = url.rpartition("/")[0]
    common = [f"data.root={tmp_path / 'corpus'}", f"data.cache_dir={tmp_path / 'cache'}", f"checkpoint.root={root}"]
    common += ["train.steps=4", "checkpoint.every_steps=2", "telemetry.log_every_steps=1"]

    def run(name: str, *more: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "trainer", "debug", *common, f"train.run_dir={tmp_path / name}", *more],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=150,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout + done.stderr

    first = run("first")
    assert f"saved {root}/debug/checkpoints/step-00000004" in first
    assert open_checkpoints(f"{root}/debug/checkpoints").steps() == [2, 4]
    assert not (tmp_path / "first" / "debug" / "checkpoints").exists()
    assert "resuming at step 4" in run("second", "train.steps=5")
    assert export.main([f"{root}/debug", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_concurrent_changes_of_the_catalogue_are_all_kept(url: str, tmp_path: Path, kind: str) -> None:
    """Check several writers that add checkpoints to the same catalogue at the same time, in either kind of store."""
    per_writer, writers = (8, 6) if kind == "local" else (3, 4)

    def opened() -> Store:
        return LocalStore(tmp_path / "store") if kind == "local" else open_store(url)

    def work(writer: int) -> None:
        own = BucketCheckpoints(opened())
        for i in range(per_writer):
            step = writer * 100 + i

            def added(now: Catalogue, step: int = step) -> Catalogue:
                return bucket.replace(
                    now, checkpoints={**now.checkpoints, step: (f"step-{step:08d}-{writer:04d}-{'ab' * 4}",)}
                )

            own._change(added)

    with ThreadPoolExecutor(writers) as pool:
        list(pool.map(work, range(1, writers + 1)))
    assert len(BucketCheckpoints(opened()).steps()) == per_writer * writers


def test_slow_writer_cannot_reuse_a_removed_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path)
    old, other = BucketCheckpoints(store), BucketCheckpoints(store)
    attempt = old.begin_attempt()
    asleep = old._newest()
    for _ in range(6):  # removes the catalogue that `old` has read, and the next number
        other.begin_attempt()
    answers = iter([asleep])
    wake = BucketCheckpoints._newest
    monkeypatch.setattr(old, "_newest", lambda: next(answers, None) or wake(old))
    with pytest.raises(Exception, match="attempt 7 of this run has started, so attempt 1 stops"):
        old._change(lambda now: (attempt.check(now.attempt, "here"), bucket.replace(now, checkpoints={1: ("x",)}))[1])
    assert other.steps() == []
