"""Where metrics go: a JSONL file always, MLflow by default. A tracker that fails says so once and never stops a run."""

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
"""File in the run's folder that holds the id of its MLflow run."""


@dataclass(frozen=True)
class TelemetryConfig:
    """What is logged, how often, and where to."""

    log_every_steps: int = 1
    """Metrics cover this many steps (means, sums and rates over all of them) and are written once per as many."""
    progress: bool = True
    """Progress bar on a terminal, a plain line per log interval elsewhere."""
    straggler_ratio: float = 1.3
    """A rank that works this many times as long as the median of the others, in three stretches in a row, is named."""
    straggler_stretch_sec: float = 30.0
    """Seconds of training per stretch; at least one logging interval."""
    mlflow: bool = True
    """Also log to MLflow: at MLFLOW_TRACKING_URI where that is set, else in `<train.run_dir>/mlflow.db` (SQLite)."""
    mlflow_experiment: str = "mowe"
    """MLflow experiment that the runs are grouped under; made where absent."""

    def __post_init__(self) -> None:
        check_least("telemetry", self, log_every_steps=1, straggler_stretch_sec=0)
        if self.straggler_ratio <= 1:
            raise UserError(f"telemetry.straggler_ratio = {self.straggler_ratio}: must be above 1")
        if self.mlflow and not self.mlflow_experiment:
            raise UserError("telemetry.mlflow_experiment is empty: name an experiment, or set telemetry.mlflow=false")


class Tracker(Protocol):
    """A sink of metrics. Calls return at once and raise nothing; what could not be stored is counted."""

    @property
    def num_lost(self) -> int:
        """Records that were given to the tracker and not stored."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record `metrics` of `step`. Steps do not decrease."""

    def close(self) -> None:
        """Store what is outstanding. No `log` follows."""


class JsonlTracker:
    """Appends one JSON object per call to a file (see `StepLog`): `{"step": …, "time": …, "<metric>": …}`.

    Values that JSON has no number for are the strings "nan", "inf", "-inf".
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        self._log = StepLog(path, resume_step)
        self._records: Backlog[Mapping[str, Any]] = Backlog(self._log.append, path)

    @property
    def num_lost(self) -> int:
        """Records that the disk has not taken."""
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
    """Logs to MLflow from a thread of its own: neither its slow import nor its store ever holds up a step.

    The run's id is kept in `id_file`, so a resumed training goes on in the same MLflow run. `params` are the resolved
    recipe, flattened to dotted names with secrets masked; they are logged when the run is created, and MLflow gets at
    most 500 characters of each (the run folder has them whole). On resume MLflow keeps what was logged after the
    checkpoint beside the new values of the same steps; metrics.jsonl is the exact record.
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
            self._lose(1, "its queue is full: the store is slower than training")

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
            log.warning("MLFLOW RECORDS ARE BEING LOST: %s; training goes on, metrics.jsonl has them", reason)

    def _work(self) -> None:
        client = run_id = None
        try:
            client, run_id = self._open()
        except Exception as error:  # noqa: BLE001 - whatever the tracker meets, training goes on
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
    """Several trackers as one."""

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
    """The trackers of a run in `run_root/run_name`; for rank 0 only.

    `params`: the resolved recipe as nested dicts; `again`: this is not the run's first attempt, even if it begins at
    step 0.
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
    """Add `files` to the MLflow run of `run_dir`, in the artifact folder `folder`.

    Returns:
        Why it was not done, in words; None: it was.
    """
    id_file = run_dir / ID_NAME
    if not id_file.is_file():
        return f"{id_file} is missing: the run was not logged to MLflow"
    try:
        client = _client(run_dir.parent)
        for file in files:
            client.log_artifact(id_file.read_text().strip(), str(file), folder)
    except Exception as error:  # noqa: BLE001 - the files are there; that the store is not must not hide them
        return _without_credentials(f"{type(error).__name__}: {error}")
    return None


def _client(run_root: Path) -> Any:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=tracking_uri(run_root))


def tracking_uri(run_root: Path) -> str:
    """MLFLOW_TRACKING_URI, else the SQLite store `run_root/mlflow.db`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(run_root / 'mlflow.db').resolve()}"


_SECRET_KEY = re.compile(r"passw|secret|credential|api_?key|access_?key|(auth|access|hf|bearer)_?token", re.IGNORECASE)


def flatten_params(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings and sequences as dotted names → text; secret-looking keys and URL credentials masked."""
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
