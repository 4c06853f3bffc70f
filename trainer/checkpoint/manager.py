"""The manager that saves, finds and loads checkpoints of the audio engine and the LLM's engine."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.distributed as dist

from model.config import LoraConfig
from model.errors import UserError
from trainer.checkpoint import engine_state, generators
from trainer.checkpoint.attempt import Attempt, FencedRunError
from trainer.checkpoint.background import Content, Frozen, Outcome, Place, Save
from trainer.checkpoint.bucket import BucketCheckpoints
from trainer.checkpoint.catalog import find_checkpoint, open_checkpoints, read_extra
from trainer.checkpoint.config import CheckpointConfig, evaluations_since_best
from trainer.checkpoint.damage import find_damage
from trainer.checkpoint.engine_state import ENGINE_STATE, Engines, EngineState
from trainer.checkpoint.folder import Folder
from trainer.checkpoint.layout import Shard, file_of
from trainer.checkpoint.origin import is_export, open_origin
from trainer.checkpoint.reader import Reader, manifest_text, parse_manifest
from trainer.checkpoint.signing import signing_key
from trainer.checkpoint.snapshot import HostBuffer
from trainer.checkpoint.start import check_adapters, fill_moments, fill_weights
from trainer.checkpoint.together import from_rank0, gather, together
from trainer.parallel.exchange import gather_distinct
from trainer.parallel.groups import Groups
from trainer.parallel.nodes import nodes_of_ranks

log = logging.getLogger(__name__)

_NOTICEABLE_SEC = 0.1


class CheckpointManager:
    """A manager that saves, finds and loads the checkpoints of a run, for one attempt of the run.

    Collective: every rank of the world must create this object, and must call its methods unless their docstrings say
    otherwise.

    Creating the object starts a new attempt. From then on, earlier attempts cannot commit checkpoints.

    Args:
        url: The location of the checkpoints, `<run>/checkpoints`: a folder that all ranks share, or `s3://…`.
        config: The recipe's `checkpoint` section.
        groups: This rank's process groups.
        heartbeat: A function that is called with a description of every file before it is written or verified, and of
            every tensor before it is read.
        state: The access to the engines' state.

    Raises:
        UserError: If the location cannot be written to.
    """

    def __init__(
        self,
        url: str,
        config: CheckpointConfig,
        groups: Groups,
        heartbeat: Callable[[str], None] = lambda what: None,
        state: EngineState = ENGINE_STATE,
    ) -> None:
        self.config, self.groups, self.state = config, groups, state
        signing_key()  # A key that cannot be used is reported before the first step.
        self.checkpoints = together(self.groups, url, lambda: open_checkpoints(url, config.retry_sec))
        attempt = from_rank0(groups, url, self.checkpoints.begin_attempt, (Attempt,))
        writers = dist.new_group(backend="gloo")
        nodes = None if isinstance(self.checkpoints, BucketCheckpoints) else nodes_of_ranks(groups)
        self._place = Place(self.checkpoints, config, attempt, writers, groups.rank, self._topology(), heartbeat, nodes)
        self._buffer = HostBuffer(groups.device)
        self._verified: set[str] = set()
        self._current: int | None = None
        self._frozen = Frozen({}, {})
        self._save: Save | None = None
        self._noted: Save | None = None
        self._unread: list[str] = []
        self._failures: list[Outcome] = []

    def save(self, step: int, engines: Engines, extra: dict[str, Any]) -> None:
        """Start to save the state after `step` steps. The save continues in the background.

        Collective: every rank of the world must call it.

        This method returns when the state has been copied to host memory. It first waits for a previous save that is
        still running, and logs a warning if that takes a while. If `step` is the step that was saved or loaded last,
        the method does nothing. If a save fails, the failure is logged and reported by `failed`, and training
        continues.

        Args:
            step: The number of steps completed.
            engines: The engines to save.
            extra: Additional values to store as JSON, which `load` returns. Only the values of rank 0 are saved.

        Raises:
            FencedRunError: If a newer attempt of this run has started.
        """
        if step == self._current:
            return
        self._settle(step)
        content = together(self.groups, f"step {step}: not saved", lambda: self._content(step, engines, extra))
        self._save, self._current = Save(self._place, content), step

    def finished(self) -> list[str]:
        """Return the URLs of the checkpoints that were committed since the last call. This is not collective."""
        if self._save is not None and not self._save.running:
            self._note(self._save)
        urls, self._unread = self._unread, []
        return urls

    def failed(self) -> list[Outcome]:
        """Return the saves that failed since the last call. This is not collective.

        A save that has just ended is included only after `finished` has been called.
        """
        failures, self._failures = self._failures, []
        return failures

    def rewind(self, engines: Engines) -> int | None:
        """Load the newest checkpoint into the engines.

        Collective: every rank of the world must call it.

        Returns:
            The step of the checkpoint, or None if there is none.
        """
        self._settle(None)
        latest = self.latest()
        if latest is None:
            return None
        self.load(latest, engines)
        return self._current

    def close(self) -> None:
        """Wait for the last save, and retry it once if it failed.

        Collective: every rank of the world must call it.

        Raises:
            UserError: If the save failed again. The newest state is then lost when this process ends.
        """
        if self._save is None:
            return
        outcome = self._settle(None)
        if outcome is not None and outcome.failure is not None:
            self._save = Save(self._place, self._save.content)
            outcome = self._settle(None)
            if outcome is not None and outcome.failure is not None:
                raise UserError(f"{outcome.url}: could not be saved in two attempts: {outcome.failure}")

    def note_scores(self, step: int, values: Mapping[str, float]) -> None:
        """Store the score of a step if `values` contains `checkpoint.best_metric`. Only rank 0 calls this method.

        Args:
            step: The number of steps completed.
            values: Metrics of the step by name.
        """
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
                log.warning("%s of step %d could not be stored: %s", metric, step, error)

    def since_best(self, step: int) -> int | None:
        """Return the number of evaluations since the best one, or None if no evaluation has had `best_metric`.

        Collective: every rank of the world must call it.
        """
        scores = from_rank0(self.groups, self.checkpoints.url, self.checkpoints.scores)
        return evaluations_since_best(self.config, step, scores) if any(s <= step for s in scores) else None

    def steps(self) -> list[int]:
        """Return the steps of all committed checkpoints in ascending order. This is not collective."""
        return self.checkpoints.steps()

    def settled_steps(self) -> list[int]:
        """Wait for the running save, and return the steps of all committed checkpoints in ascending order.

        Collective: every rank of the world must call it.
        """
        self._settle(None)
        return from_rank0(self.groups, self.checkpoints.url, self.checkpoints.steps)

    def latest(self) -> Folder | None:
        """Return the newest undamaged checkpoint, or None if the run has no checkpoint.

        A warning is logged for each newer checkpoint that is damaged.

        Collective: every rank of the world must call it.

        Raises:
            UserError: If there are checkpoints and all of them are damaged.
        """
        steps = from_rank0(self.groups, self.checkpoints.url, self.checkpoints.steps)
        for step in reversed(steps):
            folder = self.checkpoints.folder(step)
            damage = self._damage(folder)
            if damage is None:
                return folder
            if self.groups.rank == 0:
                log.warning("checkpoint %s is damaged and not used: %s", folder.url, damage)
        if steps:
            raise UserError(
                f"{self.checkpoints.url}: no undamaged checkpoint among {len(steps)}; "
                "restore one, or move the folder away to start from the beginning"
            )
        return None

    def load(self, folder: Folder, engines: Engines) -> dict[str, Any]:
        """Load a checkpoint into the engines, optimizers and random generators.

        The checkpoint may have been written by a different topology.

        Collective: every rank of the world must call it.

        Returns:
            The `extra` values that were passed to `save`.

        Raises:
            UserError: If the checkpoint is damaged or belongs to a different model. In this case, nothing is changed.
        """
        if folder.url not in self._verified and (damage := self._damage(folder)) is not None:
            raise UserError(f"checkpoint {folder.url} is damaged: {damage}; use another one")
        text = from_rank0(self.groups, folder.url, lambda: manifest_text(folder))
        reader = Reader(folder, together(self.groups, folder.url, lambda: parse_manifest(folder, text)))
        names = self._names(engines)
        shards = self._own_shards(engines)
        together(self.groups, folder.url, lambda: engine_state.check(reader, shards, names))
        together(self.groups, folder.url, lambda: engine_state.fill(shards, reader, self._place.heartbeat))
        self.state.set_steps(engines, reader.learned())
        self.state.refresh(engines)
        self._restore_generators(reader)
        self._current, self._frozen = reader.manifest.step, Frozen.of(reader.manifest)
        return together(self.groups, folder.url, lambda: read_extra(folder))

    def start(self, url: str, engines: Engines, lora: Sequence[LoraConfig]) -> None:
        """Fill the engines with the weights of a run, a checkpoint or an export (see `trainer.checkpoint.start`).

        Collective: every rank of the world must call it.

        Args:
            url: The run, checkpoint or export.
            engines: The engines of a new run.
            lora: The settings for the new run's adapters.

        Raises:
            UserError: If `url` contains no weights, or its weights do not fit the model.
        """
        # Other ranks may not see a run's newest checkpoint yet, so rank 0 names it.
        doing = f"checkpoint.start_from = {url}"
        found, exported = from_rank0(
            self.groups, doing, lambda: (url, True) if is_export(url) else (find_checkpoint(url).url, False)
        )
        if not exported and (damage := self._damage(find_checkpoint(found))) is not None:
            raise UserError(f"{doing}: {found} is damaged: {damage}; name another checkpoint")
        origin = together(self.groups, doing, lambda: open_origin(found, exported))
        shards = self._own_shards(engines)
        model, names = engines.audio.tower.config, self._names(engines)
        together(self.groups, doing, lambda: check_adapters(origin, names, model, lora))
        new = together(self.groups, doing, lambda: fill_weights(origin, shards, model, self._place.heartbeat))
        if self.config.start_optimizer:
            updates = together(self.groups, doing, lambda: fill_moments(origin, shards))
            self.state.set_steps(engines, dict.fromkeys(names, updates))
        self.state.refresh(engines)
        everyones = gather(self.groups, new)
        if self.groups.rank == 0:
            listed = ", ".join(dict.fromkeys(what for own in everyones for what in own))
            log.warning("starting with the weights of %s; new: %s", found, listed or "nothing")

    # ---- engines

    def _own_shards(self, engines: Engines) -> list[Shard]:
        return [shard for family in self.state.shards(engines).values() for shard in family]

    def _names(self, engines: Engines) -> set[str]:
        """Return the names of all tensors of the model.

        Collective: every rank of the world must call it.
        """
        return set().union(*gather_distinct(sorted(self.state.tensor_names(engines)), self.groups.world))

    # ---- saving

    def _content(self, step: int, engines: Engines, extra: dict[str, Any]) -> Content:
        """Copy the state that this rank saves to host memory, so that training can continue."""
        # Tensors that were saved as frozen are still frozen, because `Reader.check` rejects a run that trains them.
        wanted = {
            family: [s for s in shards if s.saved_here and not (s.frozen and s.name in self._frozen.tensors)]
            for family, shards in self.state.shards(engines).items()
        }
        copies = iter(self._buffer.copy([s for shards in wanted.values() for s in shards]))
        shards = {family: [next(copies) for _ in own] for family, own in wanted.items()}
        states = {name: state.clone() for name, state in generators.get_states(self.groups.device).items()}
        return Content(step, shards, states, extra, self._frozen)

    def _settle(self, next_step: int | None) -> Outcome | None:
        """Wait for the running save, if there is one, and return its outcome.

        Args:
            next_step: The step to be saved next, which the warning about a long wait names; None disables the warning.

        Raises:
            FencedRunError: If a newer attempt of this run has started.
        """
        if self._save is None:
            return None
        started = time.perf_counter()
        outcome = self._save.wait()
        waited_sec = time.perf_counter() - started
        if next_step is not None and waited_sec > _NOTICEABLE_SEC and self.groups.rank == 0:
            log.warning(
                "training waited %.1f s at step %d until %s was saved; increase checkpoint.every_steps",
                waited_sec,
                next_step,
                outcome.url.rpartition("/")[2],
            )
        self._note(self._save)
        if outcome.fenced:
            raise FencedRunError(str(outcome.failure))
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
        """Verify a checkpoint, and remember it if it is undamaged; see `find_damage`.

        Collective: every rank of the world must call it.
        """
        damage = find_damage(self.groups, folder, self._place.heartbeat)
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
        sizes = {"world": topology.world, "tp": topology.tp, "pp": topology.pp, "ep": topology.ep}
        return sizes | ({"cp": topology.cp} if topology.cp > 1 else {})
