"""Tests of commits, verification, retention and fencing in one process, with plain tensors instead of engines."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from model.errors import UserError
from tests.trainer.plain_engines import (
    LEARNED,
    SHAPE,
    PlainManager,
    engines,
    flip,
    latest,
    loaded,
    make_groups,
    names,
    save,
)
from trainer.checkpoint import background, local
from trainer.checkpoint import manager as manager_module
from trainer.checkpoint.config import CheckpointConfig, evaluations_since_best, kept_steps
from trainer.checkpoint.folder import LocalFolder
from trainer.checkpoint.manifest import Manifest
from trainer.parallel.groups import Groups

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield make_groups()
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def no_megatron(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager_module.generators, "get_states", lambda device: {"host": torch.get_rng_state()})


Start = Callable[..., PlainManager]


@pytest.fixture
def start(tmp_path: Path, groups: Groups) -> Start:
    """Return a function that begins a new attempt of the run."""
    return lambda **config: PlainManager(
        str(tmp_path / "checkpoints"), CheckpointConfig(**{"keep_last": 3, **config}), groups
    )


def frozen_file(checkpoint: Path) -> Path:
    (file,) = checkpoint.parent.glob("frozen-*/llm-00000.safetensors")
    return file


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped weight": (
        lambda p: flip(p / "audio-00000.safetensors"),
        "audio-00000.safetensors has a different checksum",
    ),
    "flipped moment": (
        lambda p: flip(p / "moments-00000.safetensors"),
        "moments-00000.safetensors has a different checksum",
    ),
    "flipped state": (lambda p: flip(p / "state.json"), "state.json has a different checksum"),
    "flipped manifest": (lambda p: flip(p / "manifest.json"), "manifest.json cannot be read"),
    "truncated": (lambda p: os.truncate(p / "audio-00000.safetensors", 100), "audio-00000.safetensors has 100 bytes"),
    "half a manifest": (lambda p: os.truncate(p / "manifest.json", 100), "manifest.json cannot be read"),
    "missing file": (lambda p: (p / "rng-00000.safetensors").unlink(), "rng-00000.safetensors is missing"),
    "missing manifest": (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_the_newest_undamaged_checkpoint_is_used(
    damage: str, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    inflict, line = DAMAGES[damage]
    first, good, bad = (save(start(), step) for step in (1, 2, 3))
    inflict(bad)
    manager = start()
    with caplog.at_level(logging.WARNING):
        assert latest(manager) == good
    assert loaded(manager, good) == 2.0
    (message,) = [r.getMessage() for r in caplog.records]
    assert str(bad) in message and line in message and "\n" not in message
    with pytest.raises(UserError, match=line):
        start().load(LocalFolder(bad), engines(0.0))
    assert first.exists()


def test_only_damaged_checkpoints_are_an_error_and_none_are_a_new_run(start: Start) -> None:
    assert latest(start()) is None
    flip(save(start(), 1) / "audio-00000.safetensors")
    with pytest.raises(UserError, match="no undamaged checkpoint among 1"):
        start().latest()


def test_run_that_returned_to_an_earlier_checkpoint_replaces_the_damaged_one(start: Start) -> None:
    save(start(), 2)
    for step in (4, 6):
        flip(save(start(), step) / "audio-00000.safetensors")
    manager = start(keep_last=1)
    manager.load(LocalFolder(latest(manager) or Path()), engines(0.0))
    again = save(manager, 4)
    assert latest(manager) == again and loaded(start(), again) == 4.0
    assert names(again.parent) == [again.name]


def test_frozen_weights_are_written_once_and_verified_always(start: Start) -> None:
    first = start()
    for step in (1, 2):
        path = save(first, step)
    once = frozen_file(path)
    assert not (path / once.name).exists()
    again = start(keep_last=1)
    assert loaded(again, path) == 2.0
    path = save(again, 3)
    assert frozen_file(path) == once and names(path.parent) == [path.name], "one copy, even after a restart"
    flip(once)
    with pytest.raises(UserError, match=r"frozen-.*/llm-00000.safetensors has a different checksum"):
        start().load(LocalFolder(path), engines(0.0))


def test_unused_frozen_weights_are_removed(start: Start) -> None:
    old = frozen_file(save(start(), 1))
    path = save(start(keep_last=1), 2)  # an attempt that did not load a checkpoint writes its own
    assert not old.exists() and loaded(start(), path) == 2.0


def test_retention(start: Start) -> None:
    manager = start(keep_last=2, keep_every_steps=20, best_metric="eval/dev/asr/wer")
    for step, wer in ((5, 0.9), (10, 0.2), (15, 0.5), (20, 0.4), (25, 0.3), (30, 0.6), (35, 0.7)):
        path = save(manager, step)
        manager.note_scores(step, {"eval/dev/asr/wer": wer, "eval/dev/num_samples": 3})
    assert names(path.parent) == [f"step-{n:08d}" for n in (10, 20, 30, 35)]


def test_metric_that_evaluations_lack_is_logged(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    manager = start(best_metric="eval/dev/asr/werr")
    manager.note_scores(1, {"eval/test/asr/wer": 0.5})  # a score of a different split
    assert not caplog.records
    manager.note_scores(2, {"eval/dev/asr/wer": 0.5})
    assert "checkpoint.best_metric = eval/dev/asr/werr: the evaluation of step 2 has no such score" in caplog.text


def test_best_checkpoint_is_kept() -> None:
    steps, scores = [1, 2, 3, 4], {1: 0.5, 2: 0.9, 3: 0.7}
    assert kept_steps(CheckpointConfig(keep_last=1, best_metric="m"), steps, scores) == {1, 4}
    assert kept_steps(CheckpointConfig(keep_last=1, best_metric="m", best_is="highest"), steps, scores) == {2, 4}
    assert kept_steps(CheckpointConfig(keep_last=1), steps, scores) == {4}


def test_evaluations_without_progress_are_counted() -> None:
    lowest, highest = CheckpointConfig(best_metric="m"), CheckpointConfig(best_metric="m", best_is="highest")
    scores = {10: 0.5, 20: 0.3, 30: 0.4, 40: 0.3, 50: 0.1}
    assert [evaluations_since_best(lowest, step, scores) for step in (5, 10, 20, 30, 40, 50)] == [0, 0, 0, 1, 2, 0]
    assert [evaluations_since_best(highest, step, scores) for step in (10, 20, 30, 40, 50)] == [0, 1, 2, 3, 4]
    assert evaluations_since_best(lowest, 45, scores) == 2  # the run returned to an earlier checkpoint than step 50


def test_training_continues_while_a_save_is_written(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    manager, reached, go_on = start(), threading.Event(), threading.Event()
    write = background.write_tensors

    def slow(*arguments: Any) -> Any:
        reached.set()
        assert go_on.wait(30)
        return write(*arguments)

    monkeypatch.setattr(background, "write_tensors", slow)
    now = engines(1.0)
    manager.save(1, now, {"value": 1.0})
    now[LEARNED].fill_(99.0)  # the next steps change the weights
    assert reached.wait(30) and manager.finished() == [] and names(Path(manager.checkpoints.url))[0].startswith(".tmp-")
    threading.Timer(0.3, go_on.set).start()
    with caplog.at_level(logging.WARNING):
        manager.save(2, engines(2.0), {"value": 2.0})
    assert "training waited" in caplog.text and "step 2" in caplog.text
    manager.close()
    first, second = map(Path, manager.finished())
    assert loaded(start(), first) == 1.0 and loaded(start(), second) == 2.0


def test_failed_save_is_logged_and_the_next_one_succeeds(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    manager = start()
    old = save(manager, 1)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(background, "write_tensors", full)
        manager.save(2, engines(2.0), {"value": 2.0})
        with pytest.raises(UserError, match=r"step-00000002: could not be saved in two attempts: rank 0: .*No space"):
            manager.close()
    assert "CHECKPOINT NOT SAVED" in caplog.text and "No space left on device" in caplog.text
    assert names(old.parent) == [old.name]
    assert save(manager, 3).exists() and loaded(start(), old) == 1.0


def test_last_save_is_retried_once(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    write, calls = background.write_tensors, iter([OSError(5, "Input/output error")])

    def once(*arguments: Any) -> Any:
        for error in calls:
            raise error
        return write(*arguments)

    monkeypatch.setattr(background, "write_tensors", once)
    assert loaded(start(), save(start(), 1)) == 1.0


def test_a_failed_draft_is_removed_before_other_ranks_know_of_the_failure(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check the order. Other ranks retry at once, so a later removal would also remove their new files."""
    manager, seen = start(), list[list[str]]()
    write, calls = background.write_tensors, iter([None, OSError(5, "Input/output error")])
    broadcast = background.broadcast_value

    def second_fails(*arguments: Any) -> Any:
        if (error := next(calls, None)) is not None:
            raise error
        return write(*arguments)

    def noted(*arguments: Any) -> Any:
        seen.append(names(Path(manager.checkpoints.url)))
        return broadcast(*arguments)

    monkeypatch.setattr(background, "write_tensors", second_fails)
    monkeypatch.setattr(background, "broadcast_value", noted)
    path = save(manager, 1)
    assert seen == [[], [path.name]]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_disk_that_is_really_full(tmp_path: Path, groups: Groups, caplog: pytest.LogCaptureFixture) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.decode().strip()}")
    try:
        manager = PlainManager(str(disk / "checkpoints"), CheckpointConfig(keep_last=1), groups)
        good = save(manager, 1)
        manager.save(2, engines(2.0), {"value": 2.0})
        with pytest.raises(UserError, match="No space left on device"):
            manager.close()
        assert "CHECKPOINT NOT SAVED" in caplog.text
        again = PlainManager(str(disk / "checkpoints"), CheckpointConfig(keep_last=1), groups)
        assert latest(again) == good and loaded(again, good) == 1.0
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_earlier_attempt_is_fenced(start: Start) -> None:
    old = start()
    path = save(old, 1)
    new = start()
    old.save(2, engines(-2.0), {"value": -2.0})
    with pytest.raises(UserError, match=r"attempt 2 of this run has started, so attempt 1 stops"):
        old.close()
    assert latest(new) == path
    path = save(new, 2)
    assert loaded(start(), path) == 2.0


def test_two_attempts_that_save_at_once(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check an old attempt that is saving when a new one begins, and that continues after the new one has saved."""
    old, reached, go_on = start(), threading.Event(), threading.Event()
    write, mine = background.write_tensors, old._place.attempt.token

    def slow(draft: Any, name: str, tensors: Any) -> Any:
        if mine in str(draft.path):
            reached.set()
            assert go_on.wait(30)
        return write(draft, name, tensors)

    monkeypatch.setattr(background, "write_tensors", slow)
    old.save(2, engines(-2.0), {"value": -2.0})
    assert reached.wait(30)
    new = start()
    path = save(new, 2)
    go_on.set()
    with pytest.raises(UserError):
        old.close()
    assert loaded(start(), path) == 2.0 and latest(new) == path
    assert names(path.parent) == [path.name]


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["write_tensors", "write_text", "_rename", "clean_up"])
def test_killed_during_a_save(moment: str, start: Start) -> None:
    old = save(start(), 1)
    call = (
        f"from tests.trainer.test_checkpoint_manager import save_and_die; save_and_die({str(old.parent)!r}, {moment!r})"
    )
    died = subprocess.run([sys.executable, "-c", call], cwd=ROOT, timeout=60, capture_output=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()[-2000:]
    committed = moment == "clean_up"
    left_over = [name for name in names(old.parent) if name != old.name]
    assert len(left_over) == 1 and left_over[0].startswith("step-" if committed else ".tmp-")
    manager = start()
    assert latest(manager) == (old.parent / "step-00000002" if committed else old)
    new = save(manager, 3)
    assert latest(manager) == new and not [name for name in names(old.parent) if name.startswith(".tmp")]


def save_and_die(folder: str, moment: str) -> None:
    """Save step 2, and kill this process when the save calls the function `moment`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    manager = PlainManager(folder, CheckpointConfig(), make_groups())
    manager_module.generators.get_states = lambda device: {"host": torch.get_rng_state()}
    home: Any = {"_rename": local, "clean_up": local.LocalCheckpoints}.get(moment, background)
    setattr(home, moment, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    save(manager, 2)


def test_with_a_key_signed_checkpoints_are_saved_and_only_those_are_loaded(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = "0123456789abcdef" * 2
    monkeypatch.setenv("EARSHOT_CHECKPOINT_KEY", key)
    path = save(start(), 1)
    found = Manifest.loads((path / "manifest.json").read_text(), key.encode())
    assert {len(f.checksum) for f in found.files.values()} == {64}
    again = start()
    assert latest(again) == path and loaded(again, path) == 1.0
    (path / "manifest.json").write_text(found.dumps())
    with pytest.raises(UserError, match="not signed"):
        latest(start())


def test_damaged_attempt_file_does_not_stop_a_run(start: Start) -> None:
    path = save(start(), 1)
    (path.parent / "attempt.json").write_text('{"number": 1, "to')
    assert loaded(start(), save(start(), 2)) == 2.0
    assert json.loads((path.parent / "attempt.json").read_text())["number"] >= 1


def test_checkpoint_of_another_model_does_not_change_the_engines(start: Start) -> None:
    path = save(start(), 1)
    into = {LEARNED: torch.zeros(SHAPE)}
    with pytest.raises(UserError, match=r"holds llm.w, which the model does not have; restore the recipe"):
        start().load(LocalFolder(path), into)  # type: ignore[arg-type]
    assert not into[LEARNED].any()
