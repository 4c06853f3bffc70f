"""Engines that are plain tensors, a checkpoint manager for them, and access to the checkpoints that it saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainer.checkpoint.config import CheckpointConfig
from trainer.checkpoint.engine_state import EngineState
from trainer.checkpoint.folder import LocalFolder
from trainer.checkpoint.layout import Shard
from trainer.checkpoint.manager import CheckpointManager
from trainer.checkpoint.reader import Reader
from trainer.checkpoint.rect import matrix_of
from trainer.parallel.groups import Groups
from trainer.parallel.topology import Topology

SHAPE = (64, 32)
LEARNED, FROZEN = "audio", "llm"


class PlainState(EngineState):
    """An engine state whose engines are a dict with one tensor per family."""

    def shards(self, engines: Any) -> dict[str, list[Shard]]:
        found = {}
        for family, tensor in engines.items():
            values = (
                {"param": tensor} if family == FROZEN else {"param": tensor, "exp_avg": tensor, "exp_avg_sq": tensor}
            )
            step = None if family == FROZEN else 1
            found[family] = [Shard(f"{family}.w", SHAPE, matrix_of(SHAPE), values, step, frozen=family == FROZEN)]
        return found

    def tensor_names(self, engines: Any) -> set[str]:
        return {f"{family}.w" for family in engines}

    def set_steps(self, engines: Any, steps: dict[str, int]) -> None:
        pass

    def refresh(self, engines: Any) -> None:
        pass


class PlainManager(CheckpointManager):
    """A checkpoint manager for `PlainState` that does not restore random generators."""

    def __init__(self, url: str, config: CheckpointConfig, groups: Groups) -> None:
        super().__init__(url, config, groups, state=PlainState())

    def _restore_generators(self, reader: Reader) -> None:
        pass


def make_groups() -> Groups:
    world = dist.group.WORLD
    assert world is not None
    return Groups(Topology(1, 1, 1), 0, torch.device("cpu"), world, world)


def engines(value: float) -> Any:
    return {LEARNED: torch.full(SHAPE, value), FROZEN: torch.full(SHAPE, 7.0)}


def loaded(manager: PlainManager, path: Path) -> float:
    into = engines(-1.0)
    into[FROZEN].fill_(-1)
    extra = manager.load(LocalFolder(path), into)
    assert {float(x) for x in into[LEARNED].unique()} == {extra["value"]} and (into[FROZEN] == 7.0).all()
    return float(extra["value"])


def save(manager: PlainManager, step: int) -> Path:
    """Save a checkpoint, and wait until it is committed."""
    manager.save(step, engines(float(step)), {"value": float(step)})
    manager.close()
    (url,) = manager.finished()
    return Path(url)


def latest(manager: PlainManager) -> Path | None:
    found = manager.latest()
    return None if found is None else Path(found.url)


def names(checkpoints: Path) -> list[str]:
    """Return the names of the folders in `checkpoints`, without those of frozen weights."""
    return sorted(p.name for p in checkpoints.iterdir() if p.is_dir() and not p.name.startswith("frozen-"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
