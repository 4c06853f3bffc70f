"""Save, find and load checkpoints of both engines; every method is called by all ranks together."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from model.errors import UserError
from trainer.checkpoint import audio_state, generators, llm_state
from trainer.checkpoint.config import CheckpointConfig
from trainer.checkpoint.layout import FileEntry, Manifest, Shard, TensorEntry, entries_of, key_of, merge_entries
from trainer.checkpoint.reader import MANIFEST, DamagedError, Reader, check_files, read_manifest
from trainer.checkpoint.writer import commit, sync_folder, write_tensors, write_text
from trainer.parallel.groups import Groups

if TYPE_CHECKING:
    from trainer.engine.encoders import AudioEngine
    from trainer.engine.llm import LLMEngine

T = TypeVar("T")
log = logging.getLogger(__name__)

STATE = "state.json"
_COMMITTED = re.compile(r"step-(\d{8,})")
_ASIDE = ".tmp-"
_PACKAGES = ("torch", "deepspeed", "megatron-core", "transformers", "safetensors")


class Engines(Protocol):
    """What has state: `trainer.step.Step`."""

    @property
    def audio(self) -> AudioEngine: ...

    @property
    def llm(self) -> LLMEngine: ...


class CheckpointManager:
    """The checkpoints of one run.

    Args:
        folder: `<run>/checkpoints`; all ranks see the same one.
        config: how many stay.
        groups: this rank's place.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, groups: Groups) -> None:
        self.folder, self.config, self.groups = folder, config, groups
        self._verified: set[Path] = set()
        self._current: Path | None = None

    def save(self, step: int, step_engines: Engines, extra: dict[str, Any]) -> Path:
        """Write the state after `step` steps: visible to all when this returns, and not at all before.

        The step that was saved or loaded last is not written again.

        Args:
            extra: JSON that `load` returns; rank 0's is written.

        Raises:
            UserError: a rank could not write; older checkpoints are as before.
        """
        final = self.folder / f"step-{step:08d}"
        if final == self._current:
            return final
        aside = self.folder / f"{_ASIDE}{final.name}"
        doing = f"{final}: not saved"
        self._together(doing, lambda: self._make_room(aside) if self.groups.rank == 0 else None)
        try:
            snapshot = self._together(doing, lambda: self._snapshot(step_engines))
            written = self._together(doing, lambda: self._write(aside, snapshot))
            parts: list[Any] | None = [None] * self.groups.topology.world if self.groups.rank == 0 else None
            dist.gather_object(written, parts, group=self.groups.world)
            self._together(doing, lambda: None if parts is None else self._commit(aside, final, step, extra, parts))
        except UserError:
            if self.groups.rank == 0:
                shutil.rmtree(aside, ignore_errors=True)  # the save's own failure is what counts
            raise
        self._verified.add(final)
        self._current = final
        return final

    def latest(self) -> Path | None:
        """The newest checkpoint that is whole; None: there never was one. Damaged newer ones are named in the log.

        Raises:
            UserError: there are checkpoints, but none is whole.
        """
        steps = self._from_rank0(self._committed)
        for step in reversed(steps):
            folder = self.folder / f"step-{step:08d}"
            damage = self._damage(folder)
            if damage is None:
                return folder
            if self.groups.rank == 0:
                log.warning("checkpoint %s is damaged and not used: %s", folder, damage)
        if steps:
            raise UserError(
                f"{self.folder}: none of its {len(steps)} checkpoints is whole; "
                "restore one, or move the folder away to start from the beginning"
            )
        return None

    def load(self, path: Path, step_engines: Engines) -> dict[str, Any]:
        """Bring both engines, their optimizers and the random generators to the state in `path`, saved on any topology.

        Returns:
            `extra` as given to `save`.

        Raises:
            UserError: the checkpoint is damaged, or of another model; nothing was changed then.
        """
        if path not in self._verified and (damage := self._damage(path)) is not None:
            raise UserError(f"checkpoint {path} is damaged: {damage}; take another one")
        reader = Reader(path, self._together(str(path), lambda: read_manifest(path)))
        shards = self._together(str(path), lambda: self._checked_shards(step_engines, reader))
        self._together(str(path), lambda: _fill(shards, reader))
        self._finish(step_engines, reader)
        self._restore_generators(reader)
        self._current = path
        extra: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))["extra"]
        return extra

    # ---- engines

    def _shards(self, engines: Engines) -> dict[str, list[Shard]]:
        """By file family."""
        return {"audio": audio_state.shards(engines.audio), "llm": llm_state.shards(engines.llm)}

    def _tensor_names(self, engines: Engines) -> set[str]:
        """Of the whole model."""
        audio = {shard.name for shard in audio_state.shards(engines.audio)}
        return audio | {name for name, _ in engines.audio.named_parameters()} | llm_state.tensor_names(engines.llm)

    def _finish(self, engines: Engines, reader: Reader) -> None:
        steps = reader.learned()
        audio_state.set_steps(engines.audio, steps)
        llm_state.set_steps(engines.llm, steps)
        audio_state.refresh(engines.audio)
        llm_state.refresh(engines.llm)

    def _checked_shards(self, engines: Engines, reader: Reader) -> list[Shard]:
        surplus = sorted(set(reader.manifest.tensors) - self._tensor_names(engines))
        if surplus:
            raise UserError(f"holds {surplus[0]}, the model does not: it is of another model; restore the recipe")
        shards = [shard for family in self._shards(engines).values() for shard in family]
        for shard in shards:
            reader.check(shard)
        return shards

    # ---- saving

    def _make_room(self, aside: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for left_over in self.folder.glob(f"{_ASIDE}*"):
            shutil.rmtree(left_over)
        aside.mkdir()

    def _snapshot(self, engines: Engines) -> dict[str, list[Shard]]:
        """Host copies of what this rank saves: from here on the engines may go on."""
        return {
            family: [_on_host(s) for s in shards if s.saved_here] for family, shards in self._shards(engines).items()
        }

    def _write(
        self, aside: Path, snapshot: dict[str, list[Shard]]
    ) -> tuple[dict[str, FileEntry], dict[str, TensorEntry]]:
        files: dict[str, FileEntry] = {}
        tensors: dict[str, TensorEntry] = {}
        for family, shards in snapshot.items():
            if shards:
                file = _file_of(family, self.groups.rank)
                values = {key_of(s.name, kind, s.rect): value for s in shards for kind, value in s.values.items()}
                files[file] = write_tensors(aside / file, values)
                tensors |= entries_of(shards, file)
        file = _file_of("rng", self.groups.rank)
        files[file] = write_tensors(aside / file, generators.get_states(self.groups.device))
        return files, tensors

    def _commit(self, aside: Path, final: Path, step: int, extra: dict[str, Any], parts: Sequence[Any]) -> None:
        files = {name: entry for part, _ in parts for name, entry in part.items()}
        for name in files:
            if not (aside / name).exists():
                raise UserError(f"{name}, written by another rank, is not there: all ranks must share {self.folder}")
        state = {"step": step, "versions": {p: version(p) for p in _PACKAGES}, "extra": extra}
        files[STATE] = write_text(aside / STATE, json.dumps(state, indent=1))
        tensors = merge_entries([entries for _, entries in parts])
        manifest = Manifest(step, self._topology(), dict(sorted(files.items())), tensors)
        write_text(aside / MANIFEST, manifest.dumps())
        if final.exists():  # damaged, or of a future that the run went back from
            self._remove(final)
        commit(aside, final)
        self._retain(step)

    def _retain(self, newest: int) -> None:
        committed = self._committed()
        future = [step for step in committed if step > newest]
        past = [step for step in committed if step <= newest]
        for step in future:
            log.warning("checkpoint step-%08d is removed: the run went back behind it", step)
        for step in [*future, *past[: -self.config.keep_last]]:
            self._remove(self.folder / f"step-{step:08d}")

    def _remove(self, folder: Path) -> None:
        # Renamed first: a removal that is cut short leaves no damaged checkpoint.
        doomed = folder.parent / f"{_ASIDE}old-{folder.name}"
        folder.rename(doomed)
        sync_folder(folder.parent)
        shutil.rmtree(doomed)

    # ---- finding

    def _committed(self) -> list[int]:
        """Steps of all committed checkpoints, ascending."""
        if not self.folder.is_dir():
            return []
        matches = (_COMMITTED.fullmatch(entry.name) for entry in self.folder.iterdir())
        return sorted(int(m[1]) for m in matches if m)

    def _damage(self, folder: Path) -> str | None:
        """What is wrong with a checkpoint; ranks share the files between them, each preferring those it wrote."""
        rank, world = self.groups.rank, self.groups.topology.world

        def check() -> str | None:
            try:
                manifest = read_manifest(folder)
                check_files(folder, manifest, [n for n in manifest.files if _rank_of(n) % world == rank])
            except DamagedError as error:
                return str(error)
            return None

        found: list[Any] = [None] * world
        dist.all_gather_object(found, self._together(str(folder), check), group=self.groups.world)
        damage = next((d for d in found if d is not None), None)
        if damage is None:
            self._verified.add(folder)
        return damage

    def _restore_generators(self, reader: Reader) -> None:
        if reader.manifest.topology == self._topology():
            states = reader.tensors(_file_of("rng", self.groups.rank))
            generators.set_states(states, self.groups.device)
        else:
            generators.reseed(reader.tensors(_file_of("rng", 0)))

    def _topology(self) -> dict[str, int]:
        topology = self.groups.topology
        return {"world": topology.world, "tp": topology.tp, "pp": topology.pp, "ep": topology.ep}

    # ---- ranks

    def _together(self, doing: str, work: Callable[[], T]) -> T:
        """Do `work` on every rank; if it fails on one, all raise the same error instead of waiting for that one."""
        result, failure = None, None
        try:
            result = work()
        except (OSError, UserError, SafetensorError, DamagedError) as error:
            failure = str(error)
        found: list[Any] = [None] * self.groups.topology.world
        dist.all_gather_object(found, failure, group=self.groups.world)
        for rank, text in enumerate(found):
            if text is not None:
                raise UserError(f"{doing}: rank {rank}: {text}")
        return result  # type: ignore[return-value]

    def _from_rank0(self, work: Callable[[], T]) -> T:
        box = [self._together(str(self.folder), lambda: work() if self.groups.rank == 0 else None)]
        dist.broadcast_object_list(box, src=0, group=self.groups.world)
        return box[0]  # type: ignore[return-value]


def _on_host(shard: Shard) -> Shard:
    values = {kind: value.detach().to("cpu", copy=True) for kind, value in shard.values.items()}
    return Shard(shard.name, shard.shape, shard.rect, values, shard.step)


@torch.no_grad()
def _fill(shards: Sequence[Shard], reader: Reader) -> None:
    for shard in shards:
        reader.fill(shard)


def _file_of(family: str, rank: int) -> str:
    return f"{family}-{rank:05d}.safetensors"


def _rank_of(file: str) -> int:
    digits = re.search(r"-(\d+)\.", file)
    return int(digits[1]) if digits else 0
