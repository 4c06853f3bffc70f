"""Storage of a plan in the folder of its run."""

from __future__ import annotations

import json
from pathlib import Path

from model.errors import UserError
from trainer.plan.plan import Plan
from trainer.plan.plan_json import as_json
from trainer.plan.report import report
from trainer.telemetry.jsonl import write_atomically
from trainer.telemetry.origin import PLAN_JSON_NAME, PLAN_NAME


def store(plan: Plan, run_dir: Path) -> None:
    """Write a plan to the folder of its run, as text and as JSON. The run is compared with the JSON file.

    Raises:
        UserError: If the folder cannot be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(run_dir / PLAN_NAME, report(plan) + "\n")
        write_atomically(run_dir / PLAN_JSON_NAME, json.dumps(as_json(plan)) + "\n")
    except OSError as error:
        raise UserError(f"train.run_dir: {run_dir} cannot be written: {error}") from None
