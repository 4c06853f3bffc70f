"""The profile of a finished or running run, computed from the history in its folder without loading the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from model.errors import UserError
from trainer.checkpoint.catalog import SUBFOLDER, open_checkpoints, read_extra
from trainer.checkpoint.layout import step_of
from trainer.config.load import load_stored_recipe
from trainer.config.provenance import KEY as ORIGINS
from trainer.config.provenance import Provenance, read_origins
from trainer.config.schema import Recipe
from trainer.expert_usage.analysis import Profile
from trainer.expert_usage.placement import advise, current_slots, measured_time
from trainer.expert_usage.tokens import TokenProfile, until
from trainer.telemetry.expert_load import add_up
from trainer.telemetry.load_history import HISTORY_NAME, read_history
from trainer.telemetry.token_history import HISTORY_NAME as TOKEN_HISTORY_NAME
from trainer.telemetry.token_history import read_history as read_token_history


@dataclass(frozen=True)
class RunPath:
    """The folder of a run, and possibly one of its checkpoints."""

    run_dir: Path
    checkpoint: Path | None
    """The folder of the checkpoint that the user named; None if the user named the run."""

    @property
    def step(self) -> int | None:
        """The step of the checkpoint; None without one."""
        return None if self.checkpoint is None else step_of(self.checkpoint.name)


def find_run(path: Path) -> RunPath:
    """Return the run at `path`, or the run of the checkpoint at `path` together with this checkpoint.

    Raises:
        UserError: If `path` is neither the folder of a run nor the folder of a checkpoint.
    """
    path = path.resolve()
    if step_of(path.name) is not None and path.parent.name == "checkpoints" and path.is_dir():
        return RunPath(path.parent.parent, path)
    if (path / "recipe.yaml").is_file():
        return RunPath(path, None)
    raise UserError(
        f"{path}: is neither a run's folder (with recipe.yaml) nor one of its checkpoints/step-… folders; check it"
    )


def profile_history(where: RunPath) -> Profile:
    """Return the profile of a run's history, or of the part up to a checkpoint's step if `where` names a checkpoint.

    Raises:
        UserError: If there is no history, or it begins after the checkpoint.
    """
    recipe = load_stored_recipe(where.run_dir / "recipe.yaml")
    path = where.run_dir / HISTORY_NAME
    history = tuple(i for i in read_history(path) if where.step is None or i.step <= where.step)
    if not history:
        raise UserError(f"{path}: begins after step {where.step}; profile the whole run, or a dataset with --data")
    load, time = add_up(i.load for i in history), measured_time(history)
    advice = None
    if time is not None and recipe.model.experts:
        experts = [e.name for e in recipe.model.experts if e.name in time.costs.encoders]
        costs = [float(time.total_sec[time.costs.encoders.index(name)]) for name in experts]
        ep = recipe.parallel.expert
        now = current_slots(time, experts, ep) if ep > 1 else None
        advice = advise(experts, costs, ep, time.costs.num_ranks, now)
    first = history[0].step - history[0].num_steps + 1
    origin = f"steps {first} to {history[-1].step}"
    return Profile(recipe.name, origin, primary_name(recipe), load, history, time, advice)


def profile_tokens(where: RunPath) -> TokenProfile | None:
    """Return the profile of the FFN experts; None if the LLM has none, or no token was counted.

    Raises:
        UserError: If the history or the newest checkpoint cannot be read.
    """
    history = until(read_token_history(where.run_dir / TOKEN_HISTORY_NAME), where.step)
    if not history:
        return None
    origins: list[Provenance] = []
    saved = open_checkpoints(str(where.run_dir / SUBFOLDER))
    if saved.steps():
        folder = saved.folder(saved.steps()[-1])
        origins = read_origins(read_extra(folder).get(ORIGINS), folder.url)
    recipe = load_stored_recipe(where.run_dir / "recipe.yaml")
    return TokenProfile(recipe.name, history, tuple(origins))


def primary_name(recipe: Recipe) -> str | None:
    """Return the name of the primary encoder, or None if the model has none."""
    return None if recipe.model.primary is None else recipe.model.primary.name
