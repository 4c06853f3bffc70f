"""The tracker that logs to MLflow."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.telemetry.jsonl import write_atomically
from trainer.telemetry.trackers.background import BackgroundTracker, Record
from trainer.telemetry.trackers.base import TrackedRun, flatten_params

_NUM_PARAMS_PER_REQUEST = 100
_NUM_METRICS_PER_REQUEST = 1_000
_MAX_PARAM_CHARACTERS = 500
_MAX_NAME_CHARACTERS = 250
_REFUSED = re.compile(r"[^\w\-. :/]", re.ASCII)
"""The characters that MLflow rejects in the names of metrics."""


class MlflowTracker(BackgroundTracker):
    """A tracker that logs to MLflow.

    The recipe is logged when the MLflow run is created, with dotted names, masked secrets and at most 500 characters
    per value. After a resume, MLflow keeps the values logged after the checkpoint in addition to the new values for the
    same steps. metrics.jsonl contains only the new values.

    Args:
        run: The training run.
    """

    title = "MLflow"
    package = "mlflow"
    id_name = "mlflow_run_id"
    former_id_key = "mlflow_run"

    def __init__(self, run: TrackedRun) -> None:
        self._run = run
        self._client: Any = None
        self._run_id = ""
        super().__init__()

    def open_run(self) -> None:
        run, id_file = self._run, self._run.folder / self.id_name
        self._client = _client(run.root)
        from mlflow.entities import Param

        if (run.resume_step > 0 or run.again) and id_file.exists():
            self._run_id = id_file.read_text(encoding="utf-8").strip()
            self._client.update_run(self._run_id, status="RUNNING")
            return
        started_ms = round(1000 * (run.started_sec or time.time()))
        tags = {
            **run.tags,
            "mlflow.user": run.tags.get("user", ""),
            "mlflow.source.git.commit": run.tags.get("commit", ""),
        }
        created = self._client.create_run(
            self._experiment_id(),
            start_time=started_ms,
            tags={name: value for name, value in tags.items() if value},
            run_name=run.name,
        )
        self._run_id = created.info.run_id
        params = [Param(name, value[:_MAX_PARAM_CHARACTERS]) for name, value in flatten_params(run.params).items()]
        for i in range(0, len(params), _NUM_PARAMS_PER_REQUEST):
            self._client.log_batch(self._run_id, params=params[i : i + _NUM_PARAMS_PER_REQUEST])
        write_atomically(id_file, self._run_id + "\n")
        self._add(run.files)

    def _add(self, files: Sequence[Path]) -> None:
        for file in files:
            if file.is_file():
                self._client.log_artifact(self._run_id, str(file))

    def _experiment_id(self) -> str:
        run = self._run
        experiment = self._client.get_experiment_by_name(run.experiment)
        if experiment is not None:
            return str(experiment.experiment_id)
        is_local = "MLFLOW_TRACKING_URI" not in os.environ
        place = str((run.root / "mlflow-artifacts").resolve()) if is_local else None
        created = str(self._client.create_experiment(run.experiment, artifact_location=place))
        if is_local:  # A new store contains an empty experiment `Default`, which is not needed.
            default = self._client.get_experiment_by_name("Default")
            if default is not None and not self._client.search_runs([default.experiment_id], max_results=1):
                self._client.delete_experiment(default.experiment_id)
        return created

    def write(self, records: Sequence[Record]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(metric_name(name), value, r.time_ms, r.step) for r in records for name, value in r.metrics.items()
        ]
        for i in range(0, len(metrics), _NUM_METRICS_PER_REQUEST):
            self._client.log_batch(self._run_id, metrics=metrics[i : i + _NUM_METRICS_PER_REQUEST])

    def close_run(self) -> None:
        self._add(sorted(self._run.folder.glob("scores-*.json")))  # These files contain the bounds of intervals.
        self._client.set_terminated(self._run_id)

    @classmethod
    def add_files(cls, run_id: str, run_dir: Path, files: Sequence[Path], folder: str) -> None:
        client = _client(run_dir.parent)
        for file in files:
            client.log_artifact(run_id, str(file), folder)

    @classmethod
    def server(cls, root: Path) -> str | None:
        uri = tracking_uri(root)
        return uri if uri.startswith("http") else None


def metric_name(name: str) -> str:
    """Return a name that MLflow accepts. MLflow rejects all metrics in a request if it rejects one name.

    If a name must be changed, for example because a subset has parentheses, the result ends with a hash of the original
    name, so that different metrics keep different names.
    """
    plain = _REFUSED.sub("_", name)
    parts = [part for part in plain.split("/") if part.strip(". ")]
    plain = "/".join(parts)
    if plain == name and len(name) <= _MAX_NAME_CHARACTERS:
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{plain[: _MAX_NAME_CHARACTERS - 9]}-{digest}"


def tracking_uri(root: Path) -> str:
    """Return `MLFLOW_TRACKING_URI` if it is set, and otherwise the URI of the SQLite store `root/mlflow.db`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(root / 'mlflow.db').resolve()}"


def _client(root: Path) -> Any:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=tracking_uri(root))
