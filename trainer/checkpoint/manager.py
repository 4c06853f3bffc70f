"""Save, find and load checkpoints of both engines; all ranks call every method together, unless it says otherwise."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from model.errors import UserError
from trainer.checkpoint import audio_state, generators, llm_state
from trainer.checkpoint.background import Content, Frozen, Outcome, Place, Save
from trainer.checkpoint.catalog import find_checkpoint, open_checkpoints, read_extra
from trainer.checkpoint.config import CheckpointConfig, evaluations_since_best
from trainer.checkpoint.folder import Folder
from trainer.checkpoint.layout import Shard, file_of, rank_of
from trainer.checkpoint.origin import is_export, open_origin
from trainer.checkpoint.reader import DamagedError, Reader, check_files, read_manifest
from trainer.checkpoint.snapshot import HostBuffer
from trainer.checkpoint.start import check_adapters, fill_weights
from trainer.parallel.groups import Groups

if TYPE_CHECKING:
    from trainer.engine.encoders import AudioEngine
    from trainer.engine.llm import LLMEngine

T = TypeVar("T")
log = logging.getLogger(__name__)

_NOTICEABLE_SEC = 0.1


class Engines(Protocol):
    """What has state: `trainer.training.step.Step`."""

    @property
    def audio(self) -> AudioEngine: ...

    @property
    def llm(self) -> LLMEngine: ...


class CheckpointManager:
    """The checkpoints of one run, written by one attempt at it: making this object fences off earlier attempts.

    Args:
        url: `<run>/checkpoints`, a folder that all ranks see or `s3://…`.
        config: which of them stay.
        groups: this rank's place.
        beat: is called with every file that is written or checked, and every tensor that is read.

    Raises:
        UserError: nothing can be written there.
    """

    def __init__(
        self,
        url: str,
        config: CheckpointConfig,
        groups: Groups,
        heartbeat: Callable[[str], None] = lambda what: None,
    ) -> None:
        self.config, self.groups = config, groups
        self.checkpoints = self._together(url, lambda: open_checkpoints(url, config.retry_sec))
        attempt = self._from_rank0(self.checkpoints.begin_attempt)
        writers = dist.new_group(backend="gloo")
        self._place = Place(self.checkpoints, config, attempt, writers, groups.rank, self._topology(), heartbeat)
        self._buffer = HostBuffer(groups.device)
        self._verified: set[str] = set()
        self._current: int | None = None
        self._frozen = Frozen({}, {})
        self._save: Save | None = None
        self._noted: Save | None = None
        self._unread: list[str] = []
        self._failures: list[Outcome] = []

    def save(self, step: int, engines: Engines, extra: dict[str, Any]) -> None:
        """Begin to save the state after `step` steps. Returns when it is copied to host memory; the rest is done in the
        background. A save that is still on its way is waited for, and the log says so.

        The step that was saved or loaded last is not written again.

        Args:
            extra: JSON that `load` returns; rank 0's is written.

        Raises:
            UserError: a newer attempt at this run has begun. A save that fails is logged, not raised: the next one is
                the retry.
        """
        if step == self._current:
            return
        self._settle(step)
        content = self._together(f"step {step}: not saved", lambda: self._content(step, engines, extra))
        self._save, self._current = Save(self._place, content), step

    def finished(self) -> list[str]:
        """Checkpoints that were committed since the last call. Not collective."""
        if self._save is not None and not self._save.running:
            self._note(self._save)
        urls, self._unread = self._unread, []
        return urls

    def failed(self) -> list[Outcome]:
        """Saves that failed since the last call; ask after `finished`. Not collective."""
        failures, self._failures = self._failures, []
        return failures

    def rewind(self, engines: Engines) -> int | None:
        """Bring the engines back to the newest checkpoint; returns its step, None: there is none."""
        self._settle(None)
        latest = self.latest()
        if latest is None:
            return None
        self.load(latest, engines)
        return self._current

    def close(self) -> None:
        """Wait for the last save; if it failed, try it once more.

        Raises:
            UserError: it failed again, so the newest state is lost when this process ends.
        """
        if self._save is None:
            return
        outcome = self._settle(None)
        if outcome is not None and outcome.failure is not None:
            self._save = Save(self._place, self._save.content)
            outcome = self._settle(None)
            if outcome is not None and outcome.failure is not None:
                raise UserError(f"{outcome.url}: not saved, tried twice: {outcome.failure}")

    def note_scores(self, step: int, values: Mapping[str, float]) -> None:
        """Tell the metrics of a step, of which `checkpoint.best_metric` may be one. Rank 0 alone calls this."""
        metric = self.config.best_metric
        if metric is None:
            return
        split = "/".join(metric.split("/")[:2])
        if metric not in values and any(name.startswith(f"{split}/") for name in values):
            log.warning("checkpoint.best_metric = %s: the evaluation of step %d has no such score", metric, step)
        if metric in values:
            try:
                self.checkpoints.note_score(step, values[metric])
            except OSError as error:
                log.warning("%s of step %d is not noted: %s", metric, step, error)

    def since_best(self, step: int) -> int | None:
        """See `evaluations_since_best`; None where `best_metric` was never noted, as with a name that there is not."""
        scores = self._from_rank0(self.checkpoints.scores)
        return evaluations_since_best(self.config, step, scores) if any(s <= step for s in scores) else None

    def steps(self) -> list[int]:
        """Of all committed checkpoints, ascending. Not collective."""
        return self.checkpoints.steps()

    def latest(self) -> Folder | None:
        """The newest checkpoint that is whole; None: there never was one. Damaged newer ones are named in the log.

        Raises:
            UserError: there are checkpoints, but none is whole.
        """
        steps = self._from_rank0(self.checkpoints.steps)
        for step in reversed(steps):
            folder = self.checkpoints.folder(step)
            damage = self._damage(folder)
            if damage is None:
                return folder
            if self.groups.rank == 0:
                log.warning("checkpoint %s is damaged and not used: %s", folder.url, damage)
        if steps:
            raise UserError(
                f"{self.checkpoints.url}: none of its {len(steps)} checkpoints is whole; "
                "restore one, or move the folder away to start from the beginning"
            )
        return None

    def load(self, folder: Folder, engines: Engines) -> dict[str, Any]:
        """Bring both engines, their optimizers and the random generators to a saved state, of any topology.

        Returns:
            `extra` as given to `save`.

        Raises:
            UserError: the checkpoint is damaged, or of another model; nothing was changed then.
        """
        if folder.url not in self._verified and (damage := self._damage(folder)) is not None:
            raise UserError(f"checkpoint {folder.url} is damaged: {damage}; take another one")
        reader = Reader(folder, self._together(folder.url, lambda: read_manifest(folder)))
        names = self._everyones_names(engines)
        shards = self._together(folder.url, lambda: self._checked_shards(engines, reader, names))
        self._together(folder.url, lambda: _fill(shards, reader, self._place.heartbeat))
        self._finish(engines, reader)
        self._restore_generators(reader)
        self._current, self._frozen = reader.manifest.step, Frozen.of(reader.manifest)
        return self._together(folder.url, lambda: read_extra(folder))

    def start(self, url: str, engines: Engines) -> None:
        """Begin with the weights of a run, a checkpoint or an export (see `trainer.checkpoint.start`).

        Collective: every rank of `groups.world` must call it.

        Raises:
            UserError: no such weights there, or what is not new has other sizes; nothing was trained then.
        """
        # Other ranks may not see a run's newest checkpoint yet, so rank 0 names it.
        found, exported = self._from_rank0(lambda: (url, True) if is_export(url) else (find_checkpoint(url).url, False))
        doing = f"checkpoint.start_from = {url}"
        if not exported and (damage := self._damage(find_checkpoint(found))) is not None:
            raise UserError(f"{doing}: {found} is damaged: {damage}; name another checkpoint")
        origin = self._together(doing, lambda: open_origin(found, exported))
        shards = [shard for family in self._shards(engines).values() for shard in family]
        model, names = engines.audio.tower.config, self._everyones_names(engines)
        self._together(doing, lambda: check_adapters(origin, names, model))
        new = self._together(doing, lambda: fill_weights(origin, shards, model, self._place.heartbeat))
        audio_state.refresh(engines.audio)
        llm_state.refresh(engines.llm)
        everyones: list[Any] = [None] * self.groups.topology.world
        dist.all_gather_object(everyones, new, group=self.groups.world)
        if self.groups.rank == 0:
            listed = ", ".join(dict.fromkeys(what for own in everyones for what in own))
            log.warning("starting with the weights of %s; new: %s", found, listed or "nothing")

    # ---- engines

    def _shards(self, engines: Engines) -> dict[str, list[Shard]]:
        """By file family."""
        return {"audio": audio_state.shards(engines.audio), "llm": llm_state.shards(engines.llm)}

    def _tensor_names(self, engines: Engines) -> set[str]:
        """Of the model, as far as this rank knows it."""
        audio = {shard.name for shard in audio_state.shards(engines.audio)}
        return audio | {name for name, _ in engines.audio.named_parameters()} | llm_state.tensor_names(engines.llm)

    def _finish(self, engines: Engines, reader: Reader) -> None:
        steps = reader.learned()
        audio_state.set_steps(engines.audio, steps)
        llm_state.set_steps(engines.llm, steps)
        audio_state.refresh(engines.audio)
        llm_state.refresh(engines.llm)

    def _everyones_names(self, engines: Engines) -> set[str]:
        found: list[Any] = [None] * self.groups.topology.world
        dist.all_gather_object(found, self._tensor_names(engines), group=self.groups.world)
        return set().union(*found)

    def _checked_shards(self, engines: Engines, reader: Reader, names: set[str]) -> list[Shard]:
        surplus = sorted(set(reader.manifest.tensors) - names)
        if surplus:
            raise UserError(f"holds {surplus[0]}, the model does not: it is of another model; restore the recipe")
        shards = [shard for family in self._shards(engines).values() for shard in family]
        for shard in shards:
            reader.check(shard)
        return shards

    # ---- saving

    def _content(self, step: int, engines: Engines, extra: dict[str, Any]) -> Content:
        """Host copies of what this rank saves: from here on the engines may go on."""
        # What was frozen when it was saved is frozen still: a run that wants to learn it is refused.
        wanted = {
            family: [s for s in shards if s.saved_here and not (s.frozen and s.name in self._frozen.tensors)]
            for family, shards in self._shards(engines).items()
        }
        copies = iter(self._buffer.copy([s for shards in wanted.values() for s in shards]))
        shards = {family: [next(copies) for _ in own] for family, own in wanted.items()}
        states = {name: state.clone() for name, state in generators.get_states(self.groups.device).items()}
        return Content(step, shards, states, extra, self._frozen)

    def _settle(self, next_step: int | None) -> Outcome | None:
        """Wait for the save on its way and take note of how it ended, which is the same on all ranks."""
        if self._save is None:
            return None
        started = time.perf_counter()
        outcome = self._save.wait()
        waited_sec = time.perf_counter() - started
        if next_step is not None and waited_sec > _NOTICEABLE_SEC and self.groups.rank == 0:
            log.warning(
                "training waited %.1f s at step %d for the save of %s to end; raise checkpoint.every_steps",
                waited_sec,
                next_step,
                outcome.url.rpartition("/")[2],
            )
        self._note(self._save)
        if outcome.fenced:
            raise UserError(str(outcome.failure))
        return outcome

    def _note(self, save: Save) -> None:
        outcome = save.wait()
        if save is self._noted:
            return
        self._noted = save
        if outcome.failure is None:
            assert outcome.frozen is not None
            self._frozen = outcome.frozen
            self._unread.append(outcome.url)
            self._verified.add(outcome.url)
        else:
            self._failures.append(outcome)

    # ---- finding

    def _damage(self, folder: Folder) -> str | None:
        """What is wrong with a checkpoint; ranks share the files between them, each preferring those it wrote."""
        rank, world = self.groups.rank, self.groups.topology.world

        def check() -> str | None:
            try:
                manifest = read_manifest(folder)
                mine = [n for n in manifest.files if rank_of(n) % world == rank]
                check_files(folder, manifest, mine, self._place.heartbeat)
            except DamagedError as error:
                return str(error)
            return None

        found: list[Any] = [None] * world
        dist.all_gather_object(found, self._together(folder.url, check), group=self.groups.world)
        damage = next((d for d in found if d is not None), None)
        if damage is None:
            self._verified.add(folder.url)
        return damage

    def _restore_generators(self, reader: Reader) -> None:
        if reader.manifest.topology == self._topology():
            states = reader.tensors(file_of("rng", self.groups.rank))
            generators.set_states(states, self.groups.device)
        else:
            generators.reseed(reader.tensors(file_of("rng", 0)))

    def _topology(self) -> dict[str, int]:
        topology = self.groups.topology
        return {"world": topology.world, "tp": topology.tp, "pp": topology.pp, "ep": topology.ep}

    # ---- ranks

    def _together(self, doing: str, work: Callable[[], T]) -> T:
        """Do `work` on every rank; if it fails on one, all raise the same error instead of waiting for that one."""
        result, failure = None, None
        try:
            result = work()
        except (OSError, EOFError, UserError, DamagedError) as error:
            failure = str(error)
        found: list[Any] = [None] * self.groups.topology.world
        dist.all_gather_object(found, failure, group=self.groups.world)
        for rank, text in enumerate(found):
            if text is not None:
                raise UserError(f"{doing}: rank {rank}: {text}")
        return result  # type: ignore[return-value]

    def _from_rank0(self, work: Callable[[], T]) -> T:
        box = [self._together(self.checkpoints.url, lambda: work() if self.groups.rank == 0 else None)]
        dist.broadcast_object_list(box, src=0, group=self.groups.world)
        return box[0]  # type: ignore[return-value]


@torch.no_grad()
def _fill(shards: Sequence[Shard], reader: Reader, heartbeat: Callable[[str], None]) -> None:
    for shard in shards:
        heartbeat(f"the read of {shard.name}")
        reader.fill(shard)
