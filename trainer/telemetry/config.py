"""The recipe's `telemetry` section."""

from __future__ import annotations

from dataclasses import dataclass

from model.errors import UserError, check_least
from trainer.telemetry.alerts import AlertConfig


@dataclass(frozen=True)
class TelemetryConfig:
    """The recipe's `telemetry` section: what is logged, how often and where."""

    log_every_steps: int = 1
    """The number of steps per logging interval. Metrics are means, sums or rates over the interval."""
    progress: bool = True
    """Whether to show a progress bar or, if stderr is not a terminal, a plain line per logging interval."""
    straggler_ratio: float = 1.3
    """The ratio of a rank's work time to the median of the other ranks above which the rank counts as slow.

    A rank is reported if it is slow in three consecutive periods of `straggler_stretch_sec`. The value must be above 1.
    Raise it if healthy ranks are reported.
    """
    straggler_stretch_sec: float = 30.0
    """The length of the periods over which the work times of ranks are compared, in seconds. A period consists of at
    least one logging interval."""
    trackers: tuple[str, ...] = ("mlflow",)
    """The trackers that receive metrics in addition to `metrics.jsonl`: mlflow, tensorboard, wandb, or trackers of
    plug-ins.

    `mlflow` logs to `MLFLOW_TRACKING_URI` if it is set, and to `<train.run_dir>/mlflow.db` (SQLite) otherwise.
    `tensorboard` writes to the `tensorboard` folder of the run. `wandb` needs an API key, or `WANDB_MODE=offline`.
    """
    experiment: str = "earshot"
    """The name under which trackers group runs. MLflow uses it as the experiment, and W&B as the project."""

    alerts: AlertConfig = AlertConfig()
    """The events that are posted to a webhook (docs/operations.md)."""

    def __post_init__(self) -> None:
        check_least("telemetry", self, log_every_steps=1, straggler_stretch_sec=0)
        if self.straggler_ratio <= 1:
            raise UserError(f"telemetry.straggler_ratio = {self.straggler_ratio}: must be above 1")
        if self.trackers and not self.experiment:
            raise UserError("telemetry.experiment is empty: name an experiment, or set telemetry.trackers=[]")
        for name in self.trackers:
            if self.trackers.count(name) > 1:
                raise UserError(f"telemetry.trackers: {name} is given twice; remove one")
