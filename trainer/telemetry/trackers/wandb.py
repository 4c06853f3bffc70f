"""The tracker that logs to Weights & Biases."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.telemetry.jsonl import write_atomically
from trainer.telemetry.trackers.background import BackgroundTracker, Record
from trainer.telemetry.trackers.base import TrackedRun, flatten_params


class WandbTracker(BackgroundTracker):
    """A tracker that logs to Weights & Biases, or to files in the run's folder if `WANDB_MODE=offline` is set.

    The file `wandb_run_id` contains `<project>/<id>`. The metric `step` is the step of the run and the x axis of all
    other metrics. After a resume, W&B keeps the earlier values for the steps after the checkpoint in addition to the
    new values.

    Args:
        run: The training run.
    """

    title = "W&B"
    package = "wandb"
    extra = "wandb"
    id_name = "wandb_run_id"

    def __init__(self, run: TrackedRun) -> None:
        self._run = run
        self._wandb_run: Any = None
        super().__init__()

    def open_run(self) -> None:
        run, id_file = self._run, self._run.folder / self.id_name
        resumes = (run.resume_step > 0 or run.again) and id_file.exists()
        text = id_file.read_text(encoding="utf-8").strip() if resumes else f"{run.experiment}/{uuid.uuid4().hex}"
        project, _, run_id = text.rpartition("/")
        # The id is written before the slow import, so that the first checkpoint contains it.
        write_atomically(id_file, text + "\n")
        import wandb

        self._wandb_run = wandb.init(
            project=project,
            name=run.name,
            id=run_id,
            resume="allow",
            dir=str(run.folder),
            config={**flatten_params(run.params), **{f"origin/{name}": value for name, value in run.tags.items()}},
            # W&B must not capture the code, files or terminal output of the run.
            settings=wandb.Settings(console="off", silent=True, disable_git=True, save_code=False),
        )
        for file in run.files:
            if file.is_file():
                self._wandb_run.save(str(file), base_path=str(run.folder), policy="now")
        self._wandb_run.define_metric("step", hidden=True)
        self._wandb_run.define_metric("*", step_metric="step")

    def write(self, records: Sequence[Record]) -> None:
        # W&B's own step must increase, but an evaluation has the step of the training record before it.
        for record in records:
            self._wandb_run.log({**record.metrics, "step": record.step})

    def close_run(self) -> None:
        self._wandb_run.finish()

    @classmethod
    def add_files(cls, run_id: str, run_dir: Path, files: Sequence[Path], folder: str) -> None:
        import wandb

        project, _, own_id = run_id.rpartition("/")
        settings = wandb.Settings(console="off", silent=True, disable_git=True, save_code=False)
        with wandb.init(project=project, id=own_id, resume="allow", dir=str(run_dir), settings=settings) as run:
            artifact = wandb.Artifact(f"{folder}-{own_id}", type="evaluation")
            for file in files:
                artifact.add_file(str(file), name=f"{folder}/{file.name}")
            run.log_artifact(artifact)
