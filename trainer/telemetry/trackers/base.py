"""The interface of a tracker, which stores the metrics of a run."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from model.errors import without_credentials


@dataclass(frozen=True)
class TrackedRun:
    """The properties of a training run from which a tracker is built."""

    name: str
    """The name of the run."""
    root: Path
    """The folder that contains the run's folder."""
    experiment: str
    """The recipe's `telemetry.experiment`."""
    params: Mapping[str, Any]
    """The resolved recipe as nested mappings."""
    resume_step: int = 0
    """The step from which the run resumes; 0 if it starts from the beginning."""
    again: bool = False
    """Whether this is not the first attempt of the run, even if it starts from the beginning."""
    started_sec: float = 0.0
    """The time at which the attempt started, in seconds since the Unix epoch; 0 for the time at which the tracker
    starts."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Facts about the origin of the run, such as the commit, the host and the versions of packages."""
    files: tuple[Path, ...] = ()
    """Files that describe the run, such as its recipe. Trackers whose stores keep files upload them at the start."""

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.root / self.name


class Tracker(ABC):
    """A store of metrics.

    Its methods neither wait for a server nor raise exceptions. Records that could not be stored are counted.
    `BackgroundTracker` implements this behavior for a store that is slow or may fail. The constructor of a class in the
    table `TRACKERS` has a `TrackedRun` as its only argument. Only rank 0 has trackers.
    """

    title: ClassVar[str] = ""
    """The display name of the store."""
    package: ClassVar[str | None] = None
    """The package that the tracker imports; None if it needs none."""
    extra: ClassVar[str | None] = None
    """The optional extra of this project that installs the package; None if the project itself requires it."""
    id_name: ClassVar[str | None] = None
    """The name of the file in the run's folder that contains the id under which the store knows the run.

    Checkpoints contain the id, so that a run that resumes in a different folder continues in the store. The name is
    None if the tracker needs no id.
    """
    former_id_key: ClassVar[str | None] = None
    """The key under which checkpoints of earlier versions contain the id; None if they do not contain it."""

    @property
    @abstractmethod
    def num_lost(self) -> int:
        """The number of records that were logged but could not be stored."""

    @abstractmethod
    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record the metrics of a step. Steps must not decrease between calls."""

    @abstractmethod
    def close(self) -> None:
        """Store all outstanding records. `log` must not be called afterwards."""

    @classmethod
    def add_files(cls, run_id: str, run_dir: Path, files: Sequence[Path], folder: str) -> None:
        """Add files to a run in the store. A store that keeps no files raises NotImplementedError.

        Args:
            run_id: The content of the file `id_name`.
            run_dir: The run's folder.
            files: The files.
            folder: The folder within the store's run.
        """
        raise NotImplementedError(f"{cls.title} keeps no files")

    @classmethod
    def server(cls, root: Path) -> str | None:
        """Return the URL of the server that the job must be able to reach; None if the tracker needs no server.

        Args:
            root: The folder that contains the run's folder.
        """
        return None


def main_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics that stores show as curves; `metrics.jsonl` contains all of them.

    The bounds of intervals, the scores of the subset `default`, and the times of single phases and encoders are
    omitted. The metrics that people usually look at first come first.
    """

    def is_shown(name: str) -> bool:
        parts = name.split("/")
        if parts[0] == "eval":
            doubled = parts[-2] == "default" and "/".join([*parts[:-2], parts[-1]]) in metrics
            return parts[-1] not in ("low", "high") and not doubled
        return not name.startswith(("ranks/max_work/", "encoders/")) or name == "encoders/imbalance"

    groups = ("train", "eval", "throughput", "memory", "time", "router")
    order = {group: i for i, group in enumerate(groups)}
    shown = sorted((n for n in metrics if is_shown(n)), key=lambda n: order.get(n.split("/")[0], len(order)))
    return {name: metrics[name] for name in shown}


_SECRET_KEY = re.compile(r"passw|secret|credential|api_?key|access_?key|(auth|access|hf|bearer)_?token", re.IGNORECASE)


def flatten_params(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested mappings and sequences as one mapping from dotted names to text.

    The values of keys that look like secrets and the credentials in URLs are replaced by `***`.

    Args:
        params: The nested mappings.
        prefix: The beginning of all names.
    """
    flat: dict[str, str] = {}
    for key, value in params.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(flatten_params(value, f"{name}."))
        elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
            flat.update(flatten_params({str(i): item for i, item in enumerate(value)}, f"{name}."))
        else:
            flat[name] = "***" if _SECRET_KEY.search(str(key)) else without_credentials(str(value))
    return flat
