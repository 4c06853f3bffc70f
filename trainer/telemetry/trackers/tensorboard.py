"""The tracker that writes TensorBoard's event files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trainer.telemetry.trackers.background import BackgroundTracker, Record
from trainer.telemetry.trackers.base import TrackedRun, flatten_params


class TensorboardTracker(BackgroundTracker):
    """A tracker that writes to the `tensorboard` folder in the run's folder.

    A resumed run adds a file to this folder, which tells TensorBoard to discard the values of steps after the
    checkpoint.

    Args:
        run: The training run.
    """

    title = "TensorBoard"
    package = "tensorboard"
    extra = "tensorboard"

    def __init__(self, run: TrackedRun) -> None:
        self._run = run
        self._writer: Any = None
        super().__init__()

    def open_run(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        run = self._run
        self._writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.resume_step + 1)
        if run.resume_step == 0:
            rows = (f"| {name} | {value} |" for name, value in flatten_params(run.params).items())
            self._writer.add_text("recipe", "\n".join(["| key | value |", "|---|---|", *rows]))
            tags = (f"| {name} | {value} |" for name, value in run.tags.items())
            self._writer.add_text("origin", "\n".join(["| tag | value |", "|---|---|", *tags]))
            for file in run.files:
                if file.is_file():
                    text = "".join(f"    {line}\n" for line in file.read_text(encoding="utf-8").splitlines())
                    self._writer.add_text(file.stem, text)

    def write(self, records: Sequence[Record]) -> None:
        for record in records:
            for name, value in record.metrics.items():
                self._writer.add_scalar(name, value, record.step, walltime=record.time_ms / 1000)
        self._writer.flush()

    def close_run(self) -> None:
        self._writer.close()
