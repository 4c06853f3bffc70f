"""Trackers, which store metrics: a JSONL file always, and MLflow by default.

A tracker that fails logs one warning and never stops a run.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from model.errors import UserError, check_least
from trainer.telemetry.jsonl import Backlog, StepLog, write_atomically

log = logging.getLogger(__name__)

ID_NAME = "mlflow_run_id"
"""The name of the file in the run's folder that contains the id of its MLflow run."""


@dataclass(frozen=True)
class TelemetryConfig:
    """The recipe's `telemetry` section: what is logged, how often and where."""

    log_every_steps: int = 1
    """The number of steps per logging interval. Metrics are means, sums or rates over the interval."""
    progress: bool = True
    """Whether to show a progress bar or, if stderr is not a terminal, a plain line per logging interval."""
    straggler_ratio: float = 1.3
    """How many times as long as the median of the others a rank must work to be reported as slow.

    It must do so in three consecutive spans of `straggler_stretch_sec`. The value must be above 1; raise it if healthy
    ranks are reported.
    """
    straggler_stretch_sec: float = 30.0
    """The seconds of training in each span over which the work of ranks is compared; at least one logging interval."""
    mlflow: bool = True
    """Whether to log to MLflow, too: to `MLFLOW_TRACKING_URI` if set, else to `<train.run_dir>/mlflow.db` (SQLite)."""
    mlflow_experiment: str = "mowe"
    """The name of the MLflow experiment that groups the runs. It is created if it does not exist."""

    def __post_init__(self) -> None:
        check_least("telemetry", self, log_every_steps=1, straggler_stretch_sec=0)
        if self.straggler_ratio <= 1:
            raise UserError(f"telemetry.straggler_ratio = {self.straggler_ratio}: must be above 1")
        if self.mlflow and not self.mlflow_experiment:
            raise UserError("telemetry.mlflow_experiment is empty: name an experiment, or set telemetry.mlflow=false")


class Tracker(Protocol):
    """A store of metrics. Its methods do not wait and do not raise; records that could not be stored are counted."""

    @property
    def num_lost(self) -> int:
        """The number of records that were logged but could not be stored."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record the metrics of a step. Steps must not decrease between calls."""

    def close(self) -> None:
        """Store all outstanding records. `log` must not be called afterwards."""


class JsonlTracker:
    """A tracker that appends one JSON object per record to a file: `{"step": ..., "time": ..., "<metric>": ...}`.

    Values that JSON cannot represent as numbers are the strings "nan", "inf" and "-inf".

    Args:
        path: The file.
        resume_step: The step from which the run resumes; see `StepLog`.
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        self._log = StepLog(path, resume_step)
        self._records: Backlog[Mapping[str, Any]] = Backlog(self._log.append, path)

    @property
    def num_lost(self) -> int:
        """The number of records that could not be written to the disk."""
        return len(self._records)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        numbers = {name: value if math.isfinite(value) else str(float(value)) for name, value in metrics.items()}
        self._records.add({"step": step, "time": round(time.time(), 3), **numbers})

    def close(self) -> None:
        try:
            self._records.flush()
            self._log.close()
        except OSError as error:
            log.warning("%s: %s; %d records were lost", self._log.path, error, self.num_lost)


class MlflowTracker:
    """A tracker that logs to MLflow from a thread of its own, so that a slow import or a slow store delays no step.

    After a resume, MLflow keeps the values logged after the checkpoint next to the new values of the same steps;
    metrics.jsonl contains only the new ones.

    Args:
        config: The recipe's `telemetry` section.
        run_name: The name of the run.
        run_root: The folder that contains the run's folder.
        id_file: The file that stores the id of the MLflow run, so that a resumed run continues it.
        params: The resolved recipe as nested mappings. It is logged when the MLflow run is created, with dotted names,
            masked secrets and at most 500 characters per value.
        resume: Whether to continue the MLflow run of `id_file`, if the file exists.
    """

    _NUM_QUEUED = 10_000
    _NUM_PER_BATCH = 1_000
    _CLOSE_SEC = 120.0

    def __init__(
        self,
        config: TelemetryConfig,
        *,
        run_name: str,
        run_root: Path,
        id_file: Path,
        params: Mapping[str, Any],
        resume: bool,
    ) -> None:
        self.num_lost = 0
        self._config, self._run_name, self._run_root = config, run_name, run_root
        self._id_file, self._params, self._resume = id_file, flatten_params(params), resume
        self._queue: queue.Queue[tuple[int, int, dict[str, float]] | None] = queue.Queue(self._NUM_QUEUED)
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        try:
            self._queue.put_nowait((step, time.time_ns() // 1_000_000, dict(metrics)))
        except queue.Full:
            self._lose(1, "its queue is full because the store is slower than training")

    def close(self) -> None:
        try:
            self._queue.put(None, timeout=self._CLOSE_SEC)
            self._thread.join(self._CLOSE_SEC)
        except queue.Full:
            pass
        if self._thread.is_alive():
            self._lose(self._queue.qsize(), f"the store did not finish within {self._CLOSE_SEC:.0f} s")
        if self.num_lost:
            log.warning("MLflow: %d records were lost; metrics.jsonl has them", self.num_lost)

    def _lose(self, num: int, reason: object) -> None:
        with self._lock:
            first = self.num_lost == 0
            self.num_lost += num
        if first and num:
            log.warning("MLFLOW RECORDS ARE BEING LOST: %s; training continues and metrics.jsonl has them", reason)

    def _work(self) -> None:
        client = run_id = None
        try:
            client, run_id = self._open()
        except Exception as error:  # noqa: BLE001 - no failure of a tracker may end training
            self._lose(1, _without_credentials(f"{type(error).__name__}: {error}"))
        done = False
        while not done:
            records = [self._queue.get()]
            while len(records) < self._NUM_PER_BATCH and not self._queue.empty():
                records.append(self._queue.get_nowait())
            done = records[-1] is None
            steps = [record for record in records if record is not None]
            if client is None:
                self._lose(len(steps), "no connection")
            elif steps:
                self._send(client, run_id, steps)
        if client is not None:
            try:
                client.set_terminated(run_id)
            except Exception as error:  # noqa: BLE001
                self._lose(1, _without_credentials(f"{type(error).__name__}: {error}"))

    def _open(self) -> tuple[Any, str]:
        client = _client(self._run_root)
        from mlflow.entities import Param

        if self._resume and self._id_file.exists():
            run_id = self._id_file.read_text().strip()
            client.update_run(run_id, status="RUNNING")
            return client, run_id
        experiment = client.get_experiment_by_name(self._config.mlflow_experiment)
        experiment_id = (
            experiment.experiment_id
            if experiment is not None
            else client.create_experiment(
                self._config.mlflow_experiment,
                artifact_location=str((self._run_root / "mlflow-artifacts").resolve())
                if "MLFLOW_TRACKING_URI" not in os.environ
                else None,
            )
        )
        run_id = client.create_run(experiment_id, run_name=self._run_name).info.run_id
        params = [Param(name, value[:500]) for name, value in self._params.items()]
        for i in range(0, len(params), 100):
            client.log_batch(run_id, params=params[i : i + 100])
        write_atomically(self._id_file, run_id + "\n")
        return client, run_id

    def _send(self, client: Any, run_id: str | None, records: Sequence[tuple[int, int, dict[str, float]]]) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(name, value, ms, step) for step, ms, values in records for name, value in values.items()]
        try:
            for i in range(0, len(metrics), self._NUM_PER_BATCH):
                client.log_batch(run_id, metrics=metrics[i : i + self._NUM_PER_BATCH])
        except Exception as error:  # noqa: BLE001
            self._lose(len(records), _without_credentials(f"{type(error).__name__}: {error}"))


class CompositeTracker:
    """Several trackers that get the same records."""

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


def build_tracker(
    config: TelemetryConfig,
    *,
    run_name: str,
    run_root: Path,
    params: Mapping[str, Any],
    resume_step: int = 0,
    again: bool = False,
) -> CompositeTracker:
    """Return the trackers of a run. Only rank 0 has trackers.

    Args:
        config: The recipe's `telemetry` section.
        run_name: The name of the run.
        run_root: The folder that contains the run's folder.
        params: The resolved recipe as nested mappings.
        resume_step: The step from which the run resumes; 0 if it starts from the beginning.
        again: Whether this is a later attempt of the run, even if it starts from the beginning.
    """
    run_dir = run_root / run_name
    trackers: list[Tracker] = [JsonlTracker(run_dir / "metrics.jsonl", resume_step)]
    if config.mlflow:
        id_file = run_dir / ID_NAME
        trackers.append(
            MlflowTracker(
                config,
                run_name=run_name,
                run_root=run_root,
                id_file=id_file,
                params=params,
                resume=resume_step > 0 or again,
            )
        )
    return CompositeTracker(trackers)


def log_artifacts(run_dir: Path, files: Sequence[Path], folder: str) -> str | None:
    """Add files to the MLflow run of a training run.

    Args:
        run_dir: The folder of the training run.
        files: The files.
        folder: The artifact folder within the MLflow run.

    Returns:
        The reason why the files could not be added; None if they were added.
    """
    id_file = run_dir / ID_NAME
    if not id_file.is_file():
        return f"{id_file} is missing: the run was not logged to MLflow"
    try:
        client = _client(run_dir.parent)
        for file in files:
            client.log_artifact(id_file.read_text().strip(), str(file), folder)
    except Exception as error:  # noqa: BLE001 - the caller reports the failure; the files exist locally
        return _without_credentials(f"{type(error).__name__}: {error}")
    return None


def _client(run_root: Path) -> Any:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=tracking_uri(run_root))


def tracking_uri(run_root: Path) -> str:
    """Return `MLFLOW_TRACKING_URI` if set, else the URI of the SQLite store `run_root/mlflow.db`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(run_root / 'mlflow.db').resolve()}"


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
            flat[name] = "***" if _SECRET_KEY.search(str(key)) else _without_credentials(str(value))
    return flat


def _without_credentials(text: str) -> str:
    return re.sub(r"(://)[^/\s@]+@", r"\1***@", text)
