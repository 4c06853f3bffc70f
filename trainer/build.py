"""The composition root, which builds all parts of the trainer and connects them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from model.errors import UserError
from model.hub.configuration import describe
from model.llm.reference import resolve_hf_config
from model.llm.rotary import num_positions
from model.losses.table import text_fields
from trainer.build_step import build_step
from trainer.checkpoint.attempt import FencedRunError
from trainer.checkpoint.catalog import SUBFOLDER
from trainer.checkpoint.manager import CheckpointManager
from trainer.config.changes import say_changes
from trainer.config.convert import to_tree
from trainer.config.load import dump
from trainer.config.provenance import KEY as ORIGINS
from trainer.config.schema import Recipe
from trainer.data.config import TokenizerConfig
from trainer.data.config_files import place_of
from trainer.data.prepare import PreparedData, prepare
from trainer.data.shard_build import BuildReport
from trainer.donors import find_donors, provenance
from trainer.dry_run import write_plan
from trainer.engine.determinism import deterministic_kernels
from trainer.files import sweep_leftovers
from trainer.parallel.environment import meeting_limit_sec
from trainer.parallel.groups import COLLECTIVE_TIMEOUT_SEC, Groups, build_groups, connect
from trainer.parallel.topology import build_topology
from trainer.parallel.values import broadcast_value
from trainer.run.exit_codes import ExitCode
from trainer.run.failure import Position, emit_failure, emit_fenced, emit_mistake
from trainer.run.hardware import watch_gpus
from trainer.run.launch import RankEnv
from trainer.run.watchdog import Watchdog, clear_hang
from trainer.run_tokenizer import (
    DIGEST,
    OwnedTokenizer,
    adopt,
    check_digest,
    check_named,
    find_owned,
    keep_tokenizer,
)
from trainer.scoring.tasks import task_names
from trainer.storage.open import join_url
from trainer.telemetry.alerts import Alerts
from trainer.telemetry.announce import print_timed
from trainer.telemetry.events import EventLog, begin_attempt, read_events
from trainer.telemetry.hook import HOOKS, Hook
from trainer.telemetry.jsonl import write_atomically
from trainer.telemetry.origin import PLAN_NAME, origin_of
from trainer.telemetry.token_load import SampleKinds
from trainer.telemetry.trackers.base import TrackedRun
from trainer.telemetry.trackers.table import build_trackers
from trainer.training.evaluate import Evaluator
from trainer.training.hooks import EventHook, LoadHook, ProgressHook, SummaryHook, TrackerHook
from trainer.training.loop import Loop
from trainer.training.report import closing, final_table
from trainer.training.step import Step
from trainer.training.utilization import kept_generators


def run_training(recipe: Recipe, env: RankEnv) -> int:
    """Train `recipe` as one rank and return the exit code of the process.

    Collective: every rank of the world must call it.
    """
    with deterministic_kernels(recipe.train.deterministic):  # before CUDA is initialized
        return _run(recipe, env)


def _run(recipe: Recipe, env: RankEnv) -> int:
    # The watchdog must fire before a collective times out.
    connect(max(COLLECTIVE_TIMEOUT_SEC, 2 * recipe.train.hang_timeout_sec, meeting_limit_sec(env.world_size)))
    events = begin_run(recipe, env)
    position = Position()
    try:
        return _train(recipe, env, events, position)
    except FencedRunError as error:
        return emit_fenced(error, position, events)
    except UserError as error:
        emit_mistake(error, position, events)
        raise
    except Exception as error:  # noqa: BLE001 - any failure is reported, and decides the exit code
        return emit_failure(error, position, events)


def announcer(recipe: Recipe, env: RankEnv) -> Callable[[str], None]:
    """Return a function that prints a progress message on stderr.

    The function does nothing on ranks other than 0, and if `telemetry.progress` is false.
    """
    if env.rank or not recipe.telemetry.progress:
        return lambda text: None
    return lambda text: print_timed(f"{recipe.name}: {text}", sys.stderr)


def begin_run(recipe: Recipe, env: RankEnv) -> EventLog:
    """Begin an attempt. Rank 0 records it in the run's events and writes the recipe.

    Collective: every rank of the world must call it.

    Returns:
        The event log of this rank.

    Raises:
        UserError: If the run's folder cannot be written.
    """
    run_dir = Path(recipe.train.run_dir) / recipe.name
    box: list[int | str] = [0]
    if env.rank == 0:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            sweep_leftovers(run_dir)
            say_changes(run_dir / "recipe.yaml", recipe, announcer(recipe, env))
            write_atomically(run_dir / "recipe.yaml", dump(recipe))
            log = begin_attempt(
                run_dir,
                name=recipe.name,
                num_ranks=env.world_size,
                num_steps=recipe.train.steps,
                **slurm_job(os.environ),
            )
            clear_hang(log)
            box[0] = log.attempt or 0
        except OSError as error:
            box[0] = f"train.run_dir = {recipe.train.run_dir}: {error}"
    found = broadcast_value(box[0], None)
    if isinstance(found, str):
        raise UserError(found)
    return EventLog(run_dir, env.rank, found, Alerts(run_dir, recipe.telemetry.alerts))


def slurm_job(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the fields of the event `started` that describe the Slurm job; empty outside Slurm."""
    names = {"SLURM_JOB_ID": "job", "SLURM_RESTART_COUNT": "restarts", "SLURM_JOB_NODELIST": "nodes"}
    return {key: environ[name] for name, key in names.items() if name in environ}


def _train(recipe: Recipe, env: RankEnv, events: EventLog, position: Position) -> int:
    say = announcer(recipe, env)
    topology = build_topology(recipe.parallel, env.world_size)
    rank, _, device = connect()
    groups = build_groups(topology, rank, device, recipe.seed)
    run_dir = events.run_dir
    say(f"reading {', '.join(part.name for part in recipe.data.datasets)} in {recipe.data.root}")
    # Making shards and hashing the weights that experts start from may take hours, so there is no watchdog yet.
    recipe, prepared = prepare_once(recipe, groups)
    donors = find_donors(recipe, resolve_hf_config(recipe.model.llm), groups)
    watch = (
        watch_gpus(events, lambda: position.step) if device.type == "cuda" and env.local_rank == 0 else nullcontext()
    )
    with watch, Watchdog(recipe.train.hang_timeout_sec, events, topology.world) as watchdog:
        say(f"building the encoders and the LLM on {env.world_size} ranks")
        kinds = SampleKinds.of(task_names(), prepared.num_by_language())
        step = build_step(
            recipe,
            groups,
            prepared.tokenizer.vocab_size,
            watchdog.heartbeat,
            kinds,
            donors,
            _piece_ids(recipe, prepared),
        )
        evaluator = Evaluator(recipe.eval, prepared, step, run_dir, watchdog.heartbeat)
        url = join_url(recipe.run_url, SUBFOLDER)
        checkpoints = CheckpointManager(url, recipe.checkpoint, groups, watchdog.heartbeat)
        described = describe_run(recipe, step, prepared)
        loop = Loop(recipe, step, groups, prepared, evaluator, checkpoints, run_dir, described, watchdog, position)
        say(f"looking for checkpoints in {url}")
        watchdog.heartbeat("the last checkpoint")
        start, extra = loop.restore()
        if recipe.model.llm.experts and rank == 0:  # rank 0 writes the state of checkpoints
            described[ORIGINS] = extra.get(ORIGINS) or donors.origins or provenance(recipe.model.llm, recipe.seed)
        check_digest(prepared.tokenizer, extra.get(DIGEST), recipe.run_url, prepared.tokenizer_path)
        hooks = build_hooks(recipe, run_dir, start, events) if rank == 0 else []
        if rank == 0:
            keep_tokenizer(prepared.tokenizer, recipe, run_dir, is_new=start == 0)
        if start == 0 and recipe.eval.before:
            say(f"evaluating the whole split {recipe.eval.final_split} before the first step")
        elif start < recipe.train.steps:
            say(f"step {start + 1}, which takes longer than later steps")
        finished = loop.run(hooks, start, extra.get("data"))
        if rank == 0:
            if finished and loop.last_evaluation is not None:
                scored = next(d.config for d in prepared.datasets if recipe.eval.final_split in d.splits)
                data = place_of(recipe.data, scored)
                print(final_table(loop.last_evaluation, prepared, evaluator.meteor), flush=True)
                print(closing(loop.last_evaluation, run_dir, recipe.run_url, data), flush=True)
            if not finished:
                print(f"stopped; rerun the same command to resume from the checkpoint in {recipe.run_url}", flush=True)
        dist.barrier(groups.world)
    dist.destroy_process_group()
    return ExitCode.FINISHED if finished else ExitCode.STOPPED


def prepare_once(recipe: Recipe, groups: Groups) -> tuple[Recipe, PreparedData]:
    """Return the recipe with the tokenizer settings of its initial weights, and the data that it reads.

    Collective: every rank of `groups.world` must call it. Rank 0 makes the shards and the tokenizer if they are
    missing. The other ranks wait and then read them.

    Raises:
        UserError: If `prepare` raises it, or if the recipe names a tokenizer that the initial weights do not use.
    """
    prepared = None
    owned: OwnedTokenizer | str | None = None
    if groups.rank == 0:
        try:
            owned = find_owned(recipe)
            recipe, prepared = _prepare(recipe, owned, is_first=True)
        except UserError as error:
            owned = str(error)
    owned = broadcast_value(owned, groups.world, (OwnedTokenizer, TokenizerConfig))
    if isinstance(owned, str):
        raise UserError(owned)
    return _prepare(recipe, owned, is_first=False) if prepared is None else (recipe, prepared)


def _prepare(recipe: Recipe, owned: OwnedTokenizer | None, *, is_first: bool) -> tuple[Recipe, PreparedData]:
    def announce(report: BuildReport) -> None:
        print(f"made shards in {report.url}: {report.num_samples} samples", flush=True)

    path = None
    if owned is not None:  # before shards are made, which may take hours
        recipe = adopt(recipe, owned)
        path = owned.put_into(recipe.data.cache_dir)
        tokenizer = owned.load(path)
        if is_first:
            check_named(recipe, owned, tokenizer)
    model = recipe.model
    fields = text_fields(model)
    max_tokens = recipe.data.max_tokens or num_positions(resolve_hf_config(model.llm))
    return recipe, prepare(
        recipe.staged_data,
        model.adapter.rate,
        text_fields=fields,
        ctc_pieces=model.num_pieces,
        max_tokens=max_tokens,
        tokenizer_path=path,
        on_built=announce,
    )


def _piece_ids(recipe: Recipe, prepared: PreparedData) -> tuple[int, ...] | None:
    """Return the ids of the pieces whose token embeddings the LLM reads; None if it does not read pieces."""
    if not recipe.model.ctc_feedback or prepared.ctc_pieces is None:
        return None
    return prepared.tokenizer.pieces(prepared.ctc_pieces).token_ids


def describe_run(recipe: Recipe, step: Step, prepared: PreparedData) -> dict[str, Any]:
    """Return the model's config and the path and digest of the tokenizer, which an export needs besides the weights."""
    tokenizer = prepared.tokenizer
    return {
        "model": describe(recipe.model, step.llm.hf_config, tokenizer.vocab_size),
        "tokenizer": prepared.tokenizer_path,
        DIGEST: tokenizer.digest,
    }


def build_hooks(recipe: Recipe, run_dir: Path, start: int, events: EventLog) -> list[Hook]:
    """Return the hooks of a run, and write its plan if there is none yet. Only rank 0 has hooks and calls this."""
    telemetry = recipe.telemetry
    again = (events.attempt or 1) > 1
    run = TrackedRun(
        recipe.name,
        run_dir.parent,
        telemetry.experiment,
        to_tree(recipe),
        start,
        again,
        started_sec=next((e["time"] for e in reversed(read_events(run_dir)) if e["event"] == "started"), 0.0),
        tags=origin_of(dump(recipe)),
        files=(run_dir / "recipe.yaml", run_dir / PLAN_NAME),
    )
    with kept_generators(torch.device("cuda" if torch.cuda.is_initialized() else "cpu")):
        write_plan(recipe, run_dir / PLAN_NAME)
    tracker = build_trackers(telemetry.trackers, run)
    hooks: list[Hook] = [
        TrackerHook(tracker, telemetry.log_every_steps),
        LoadHook(run_dir, start),
        SummaryHook(tracker),
        EventHook(events),
        *(kind() for kind in HOOKS.values()),
    ]
    if telemetry.progress:
        hooks.append(ProgressHook(telemetry.log_every_steps))
    return hooks
