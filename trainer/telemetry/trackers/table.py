"""The table of trackers that a recipe can name, and the trackers of a run."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from model.errors import UserError, without_credentials
from trainer.telemetry.jsonl import write_atomically
from trainer.telemetry.trackers.base import TrackedRun, Tracker
from trainer.telemetry.trackers.jsonl import JsonlTracker
from trainer.telemetry.trackers.mlflow import MlflowTracker
from trainer.telemetry.trackers.tensorboard import TensorboardTracker
from trainer.telemetry.trackers.wandb import WandbTracker

TRACKERS: dict[str, type[Tracker]] = {
    "mlflow": MlflowTracker,
    "tensorboard": TensorboardTracker,
    "wandb": WandbTracker,
}
"""The trackers that `telemetry.trackers` can name. Plug-ins in the group `earshot.trackers` are added to the table."""


class CompositeTracker(Tracker):
    """A tracker that passes its records to several other trackers."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = tuple(trackers)

    @property
    def num_lost(self) -> int:
        return sum(tracker.num_lost for tracker in self._trackers)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for tracker in self._trackers:
            tracker.log(metrics, step)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()


def check_trackers(names: Sequence[str]) -> None:
    """Check that the trackers of a recipe exist and that their packages are installed.

    Args:
        names: The recipe's `telemetry.trackers`.

    Raises:
        UserError: If a tracker does not exist or its package is missing.
    """
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"telemetry.trackers: {name} is not one of {', '.join(TRACKERS)}")
        kind = TRACKERS[name]
        if kind.package is not None and importlib.util.find_spec(kind.package) is None:
            wanted = kind.package if kind.extra is None else f"'earshot[{kind.extra}]'"
            raise UserError(
                f"telemetry.trackers: {name} needs the package {kind.package}, which is not installed; "
                f"run pip install {wanted}, or remove {name} from telemetry.trackers"
            )


def build_trackers(names: Sequence[str], run: TrackedRun) -> CompositeTracker:
    """Build the trackers of a run, including the tracker that writes `metrics.jsonl`. Only rank 0 has trackers.

    Args:
        names: The recipe's `telemetry.trackers`.
        run: The training run.
    """
    always = JsonlTracker(run.folder / "metrics.jsonl", run.resume_step)
    return CompositeTracker([always, *(_build(TRACKERS[name], run) for name in names)])


def _build(kind: type[Any], run: TrackedRun) -> Tracker:
    tracker: Tracker = kind(run)
    return tracker


def read_ids(run_dir: Path) -> dict[str, str]:
    """Return the ids that stores have assigned to a run, by the names of the trackers.

    Args:
        run_dir: The folder of the training run.
    """
    files = {name: run_dir / kind.id_name for name, kind in TRACKERS.items() if kind.id_name is not None}
    return {name: file.read_text(encoding="utf-8").strip() for name, file in files.items() if file.is_file()}


def restore_ids(run_dir: Path, extra: Mapping[str, Any]) -> None:
    """Write the ids that a checkpoint contains to the run's folder, unless the folder already contains them.

    Args:
        run_dir: The folder of the training run.
        extra: The contents of the checkpoint other than the engines. Its key `trackers` contains the ids that
            `read_ids` returned when the checkpoint was saved.
    """
    for name, kind in TRACKERS.items():
        former = None if kind.former_id_key is None else extra.get(kind.former_id_key)
        run_id = extra.get("trackers", {}).get(name, former)
        if run_id is not None and kind.id_name is not None and not (run_dir / kind.id_name).exists():
            write_atomically(run_dir / kind.id_name, f"{run_id}\n")


def _wants_none(run_dir: Path) -> bool:
    """Return whether the recipe in a run's folder names no trackers."""
    import yaml

    try:
        tree: Any = yaml.safe_load((run_dir / "recipe.yaml").read_text(encoding="utf-8"))
        return bool(tree["telemetry"]["trackers"] == [])
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return False


def add_files(run_dir: Path, files: Sequence[Path], folder: str) -> list[str]:
    """Add files to a training run in every store that keeps files and knows the run.

    Args:
        run_dir: The folder of the training run.
        files: The files.
        folder: The folder within the store's run.

    Returns:
        The stores to which the files could not be added, each with the reason, as text. If the run's recipe names no
        trackers, the list is empty.
    """
    ids = read_ids(run_dir)
    if not ids and _wants_none(run_dir):
        return []
    if not ids:
        names = ", ".join(kind.id_name for kind in TRACKERS.values() if kind.id_name is not None)
        return [f"a tracker: {run_dir} has none of {names}, so no tracker that keeps files knows the run"]
    failures = []
    for name, run_id in ids.items():
        try:
            TRACKERS[name].add_files(run_id, run_dir, files, folder)
        except Exception as error:  # noqa: BLE001 - the caller reports the failure; the files exist locally
            failures.append(f"{TRACKERS[name].title}: {without_credentials(f'{type(error).__name__}: {error}')}")
    return failures
