"""Atomic, verified, retained: one process, plain tensors in place of the engines."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from model.errors import UserError
from trainer.checkpoint import manager as manager_module
from trainer.checkpoint.config import CheckpointConfig
from trainer.checkpoint.layout import Shard, matrix_of
from trainer.checkpoint.manager import CheckpointManager
from trainer.checkpoint.reader import Reader
from trainer.parallel.groups import Groups
from trainer.parallel.topology import Topology

ROOT = Path(__file__).resolve().parents[2]
SHAPE = (64, 32)


class PlainManager(CheckpointManager):
    """Saves and loads one tensor per family: `engines` is a dict of them."""

    def _shards(self, engines: Any) -> dict[str, list[Shard]]:
        return {
            family: [Shard(f"{family}.weight", SHAPE, matrix_of(SHAPE), {"param": tensor}, None)]
            for family, tensor in engines.items()
        }

    def _tensor_names(self, engines: Any) -> set[str]:
        return {f"{family}.weight" for family in engines}

    def _finish(self, engines: Any, reader: Reader) -> None:
        pass

    def _restore_generators(self, reader: Reader) -> None:
        pass


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    world = dist.group.WORLD
    assert world is not None
    yield Groups(Topology(1, 1, 1), 0, torch.device("cpu"), world, world)
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def no_megatron(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager_module.generators, "get_states", lambda device: {"host": torch.get_rng_state()})


@pytest.fixture
def start(tmp_path: Path, groups: Groups) -> Callable[..., PlainManager]:
    return lambda keep=3: PlainManager(tmp_path / "checkpoints", CheckpointConfig(keep_last=keep), groups)


def engines(value: float) -> Any:
    return {family: torch.full(SHAPE, value) for family in ("audio", "llm")}


def loaded(manager: PlainManager, path: Path) -> float:
    into = engines(-1.0)
    extra = manager.load(path, into)
    values = {float(x) for tensor in into.values() for x in tensor.unique()}
    assert values == {extra["value"]}
    return values.pop()


def save(manager: PlainManager, step: int) -> Path:
    return manager.save(step, engines(float(step)), {"value": float(step)})


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped tensor": (lambda p: flip(p / "llm-00000.safetensors"), "llm-00000.safetensors has another checksum"),
    "flipped state": (lambda p: flip(p / "state.json"), "state.json has another checksum"),
    "flipped manifest": (lambda p: flip(p / "manifest.json"), "manifest.json cannot be read"),
    "truncated": (lambda p: os.truncate(p / "audio-00000.safetensors", 100), "audio-00000.safetensors has 100 bytes"),
    "half a manifest": (lambda p: os.truncate(p / "manifest.json", 100), "manifest.json cannot be read"),
    "missing file": (lambda p: (p / "rng-00000.safetensors").unlink(), "rng-00000.safetensors is missing"),
    "missing manifest": (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_the_newest_good_one_taken(
    damage: str, start: Callable[..., PlainManager], caplog: pytest.LogCaptureFixture
) -> None:
    inflict, line = DAMAGES[damage]
    first, good, bad = (save(start(), step) for step in (1, 2, 3))
    inflict(bad)
    manager = start()
    with caplog.at_level(logging.WARNING):
        assert manager.latest() == good
    assert loaded(manager, good) == 2.0
    (message,) = [r.getMessage() for r in caplog.records]
    assert str(bad) in message and line in message and "\n" not in message
    with pytest.raises(UserError, match=line):
        start().load(bad, engines(0.0))
    assert first.exists()


def test_all_damaged_is_an_error_and_none_is_a_start(start: Callable[..., PlainManager]) -> None:
    assert start().latest() is None
    flip(save(start(), 1) / "llm-00000.safetensors")
    with pytest.raises(UserError, match="none of its 1 checkpoints is whole"):
        start().latest()


def test_a_run_that_went_back_replaces_what_was_damaged(start: Callable[..., PlainManager]) -> None:
    save(start(), 2)
    for step in (4, 6):
        flip(save(start(), step) / "llm-00000.safetensors")
    manager = start(keep=1)
    manager.load(manager.latest() or Path(), engines(0.0))
    again = save(manager, 4)
    assert manager.latest() == again and loaded(start(), again) == 4.0
    assert [p.name for p in again.parent.iterdir()] == [again.name]


def test_retention(start: Callable[..., PlainManager]) -> None:
    manager = start(keep=2)
    for step in (5, 10, 15):
        path = save(manager, step)
    assert sorted(p.name for p in path.parent.iterdir()) == ["step-00000010", "step-00000015"]


def test_a_full_disk_leaves_the_older_one(start: Callable[..., PlainManager], monkeypatch: pytest.MonkeyPatch) -> None:
    manager = start()
    old = save(manager, 1)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(manager_module, "write_tensors", full)
        with pytest.raises(UserError, match=r"step-00000002: not saved: rank 0: .*No space left on device"):
            save(manager, 2)
    assert [p.name for p in old.parent.iterdir()] == [old.name]
    assert save(manager, 2).exists() and loaded(start(), old) == 1.0


@pytest.mark.parametrize("moment", ["write_tensors", "write_text", "commit"])
def test_killed_in_a_save(moment: str, start: Callable[..., PlainManager]) -> None:
    old = save(start(), 1)
    call = (
        f"from tests.trainer.test_checkpoint_manager import save_and_die; save_and_die({str(old.parent)!r}, {moment!r})"
    )
    died = subprocess.run([sys.executable, "-c", call], cwd=ROOT, timeout=60, capture_output=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()[-2000:]
    left_over = [p.name for p in old.parent.iterdir() if p != old]
    assert left_over == [".tmp-step-00000002"]
    manager = start()
    assert manager.latest() == old
    new = save(manager, 2)
    assert manager.latest() == new and sorted(p.name for p in old.parent.iterdir()) == [old.name, new.name]


def save_and_die(folder: str, moment: str) -> None:
    """In a process of its own: killed when step 2's save comes to `moment`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    world = dist.group.WORLD
    assert world is not None
    manager = PlainManager(
        Path(folder), CheckpointConfig(), Groups(Topology(1, 1, 1), 0, torch.device("cpu"), world, world)
    )
    manager_module.generators.get_states = lambda device: {"host": torch.get_rng_state()}
    setattr(manager_module, moment, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    save(manager, 2)


def test_another_model_leaves_the_engines_alone(start: Callable[..., PlainManager]) -> None:
    path = save(start(), 1)
    into = {"audio": torch.zeros(SHAPE)}
    with pytest.raises(UserError, match=r"holds llm.weight, the model does not"):
        start().load(path, into)  # type: ignore[arg-type]
    assert not into["audio"].any()
