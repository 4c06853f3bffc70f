"""Tests of comparing a running job with its plan."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model.errors import UserError
from tests.trainer.data_corpus import clip_rows, write_manifest
from tools import status
from tools.run_status import read_status
from trainer.config.checks import deepspeed_json
from trainer.config.load import load_recipe
from trainer.engine.clock import DeviceClock
from trainer.engine.ds_config import load_ds_json
from trainer.parallel.topology import build_topology
from trainer.plan.accelerator import KNOWN
from trainer.plan.forecast import Forecast, digest_of, read_forecast
from trainer.plan.host import disk_space
from trainer.plan.plan_json import as_json
from trainer.plan.planner import Planner
from trainer.plan.ranks import rank_states
from trainer.plan.workload import typical_workload
from trainer.telemetry.metrics import PhaseTimer, StepReport, flatten
from trainer.telemetry.origin import plan_json_name
from trainer.telemetry.straggler import RankWork, work_metrics
from trainer.training.plan_check import WARM_UP_STEPS, WINDOW_STEPS, PlanCheck, compare, plan_check_of

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
PLANNED = Forecast(1.0, 0.85, 1.18, {"encoders": 0.3, "LLM": 0.6, "update": 0.1}, 50 * GIB, 1000, 60.0)


def step(number: int, seconds: float, tokens: int = 1000, peak_bytes: int = 0) -> StepReport:
    ranks = {"ranks/slowest": 0.0} | ({"memory/max_peak_bytes": float(peak_bytes)} if peak_bytes else {})
    return StepReport(
        number, 2.0, num_tokens=tokens, audio_sec=tokens * 0.06, phase_sec={"encode": seconds}, ranks=ranks
    )


@pytest.mark.parametrize(
    ("seconds", "encoders", "peak_gib", "tokens", "planned", "words"),
    [
        (1.0, 0.3, 51, 1000, True, "a step takes 1.00 s, as planned (850 ms–1.18 s); peak memory 51.0 GiB, planned 50"),
        (1.5, 0.8, 51, 1000, False, "which is 27% longer than the plan's range of 850 ms–1.18 s; the largest differ"),
        (1.5, 0.8, 51, 1000, False, "difference is in the encoders: 800 ms, planned 300 ms; peak memory"),
        (0.5, 0.1, None, 400, False, "41% shorter than the plan's range of 850 ms–1.18 s; the largest difference is"),
        (0.5, 0.1, None, 400, False, "; a step has 0.40 times the planned tokens and 0.40 times the planned audio"),
        (1.0, 0.3, 60, 1000, False, "peak memory 60.0 GiB, planned 50.0 GiB"),
    ],
)
def test_the_sentence(
    seconds: float, encoders: float, peak_gib: int | None, tokens: int, planned: bool, words: str
) -> None:
    parts = [{"encoders": encoders, "LLM": 0.6, "update": 0.1, "loading": 0.01}] * 3
    peak = None if peak_gib is None else peak_gib * GIB
    text, as_planned, details = compare(PLANNED, [step(i, seconds, tokens) for i in range(3)], parts, peak)
    assert as_planned == planned and words in text
    assert details["parts_sec"] == {
        "encoders": [encoders, 0.3],
        "LLM": [0.6, 0.6],
        "update": [0.1, 0.1],
        "loading": [0.01, 0.0],
    }


class Clock(DeviceClock):
    """A simulated clock that raises an error if a moment is read that the device has not reached yet."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.at, self.done = 0.0, -1.0

    def now(self) -> float:
        return self.at

    def seconds(self, lap: tuple[float, float]) -> float:
        assert lap[1] <= self.done, "the device has not reached this moment, so the host would wait"
        return super().seconds(lap)


def test_events_are_read_after_the_next_step_and_the_warm_up_is_ignored() -> None:
    timer, clock = PhaseTimer(), Clock()
    events: list[tuple[str, int, Mapping[str, Any]]] = []
    check = PlanCheck(PLANNED, timer, clock, lambda *event: events.append(event), 1000)
    for number in range(1, WARM_UP_STEPS + WINDOW_STEPS + 10):
        start = clock.at
        warm = number <= WARM_UP_STEPS
        for phase, seconds in {"load": 0.1, "encode": 9.0 if warm else 0.3, "llm": 0.6, "update": 0.1}.items():
            with timer(phase):
                clock.at += seconds
        timer.take()
        clock.done = start  # the update waited for all work before this step's end
        found = check.add(step(number, 9.0 if warm else 1.1, peak_bytes=50 * GIB))
        metrics = flatten([found])
        assert ("plan/step_times_planned" in metrics) == (not warm)
        if number > WARM_UP_STEPS + 1:
            assert metrics["plan/encoders_times_planned"] == pytest.approx(1.0)
            assert metrics["plan/step_times_planned"] == pytest.approx(1.1)
            assert metrics["plan/peak_memory_times_planned"] == 1.0
    ((name, at, fields),) = events
    assert (name, at, fields["as_planned"]) == ("plan_checked", WARM_UP_STEPS + WINDOW_STEPS, True)
    assert fields["compared"]["parts_sec"]["loading"] == pytest.approx([0.1, 0.0])


def test_the_memory_is_that_of_the_fullest_rank() -> None:
    parts = [RankWork(r, "n", {"llm": 1.0}, {}, peak_bytes=peak) for r, peak in enumerate((5, 7, 6))]
    assert work_metrics(parts, 1)["memory/max_peak_bytes"] == 7.0
    assert "memory/max_peak_bytes" not in work_metrics([RankWork(0, "n", {"llm": 1.0}, {})], 1)


@pytest.fixture(scope="module")
def planned() -> dict[str, Any]:
    """Return the plan of the recipe `debug`."""
    recipe = load_recipe("debug")
    workload = typical_workload(recipe, build_topology(recipe.parallel, recipe.parallel.num_ranks))
    return json.loads(json.dumps(as_json(Planner(recipe, KNOWN["h100"]).plan(recipe, workload))))


def test_checkpoints_share_one_copy_of_frozen_weights() -> None:
    recipe = load_recipe("debug", ["optim.parts=[{pattern: 'llm.*', frozen: true}]", "checkpoint.keep_last=1"])
    topology = build_topology(recipe.parallel, recipe.parallel.num_ranks)
    planner = Planner(recipe, KNOWN["h100"])
    ds_json = load_ds_json(deepspeed_json(recipe))
    states = rank_states(planner.model, topology, recipe.staged_optim, "fp32", ds_json)
    disk = disk_space(recipe, states)
    frozen = 4 * sum(size.total - size.learned for size in planner.sizes.values())
    assert frozen > 4 * sum(size.total for name, size in planner.sizes.items() if name.startswith("llm.")) > 0
    assert disk.num_kept == 2 and disk.shared == frozen and disk.run == 2 * disk.checkpoint - frozen
    # Steps 6 and 12 are kept. The newest checkpoint and the one that is being written also exist.
    keys = ["train.steps=14", "checkpoint.every_steps=2", "checkpoint.keep_every_steps=3", "checkpoint.keep_last=1"]
    assert disk_space(load_recipe("debug", keys), states).num_kept == 4


def test_a_plan_is_read_only_for_its_own_layout(planned: dict[str, Any], tmp_path: Path) -> None:
    recipe, path = load_recipe("debug"), tmp_path / "plan.json"
    assert read_forecast(path, recipe) is None
    path.write_text(json.dumps(planned))
    assert planned["too_small"] and read_forecast(path, recipe) is None
    path.write_text(json.dumps({**planned, "too_small": False}))
    found = read_forecast(path, recipe)
    assert found is not None and sum(found.parts_sec.values()) == pytest.approx(found.step_sec)
    assert (found.low_sec, found.high_sec) == tuple(planned["step_sec_range"])
    other = replace(recipe, train=replace(recipe.train, llm_tokens_per_microbatch=512))
    with pytest.raises(UserError, match=r"plan.json: is the plan of another layout or model; write it again [^()]*$"):
        read_forecast(path, other)
    assert digest_of(replace(recipe, train=replace(recipe.train, steps=9, run_dir="x"))) == planned["digest"]
    changed = (
        "data.min_audio_sec=0.5",
        "stages=[{name: a, steps: 4, train: [connector]}]",
        "stages=[{name: a, steps: 4, parts: [{pattern: 'llm.*', frozen: true}]}]",
        "lora=[{pattern: 'llm.*.[qkvo]_proj', rank: 4, alpha: 8}]",
        "data.tokenizer.train_vocab_size=300",
    )
    assert len({planned["digest"], *(digest_of(load_recipe("debug", [one])) for one in changed)}) == 6
    assert digest_of(load_recipe("debug", ["stages=[{name: a, steps: 4}]"])) == digest_of(
        load_recipe("debug", ["stages=[{name: b, steps: 9, lr: 0.1}]", "train.steps=9"])
    )
    path.write_text("{}")
    with pytest.raises(UserError, match="not a plan"):
        read_forecast(path, recipe)


def run_of(folder: Path, plan: dict[str, Any]) -> tuple[Path, str]:
    """Train `debug` for a few steps with `plan` in the run's folder; return this folder and the terminal's text."""
    rows = [r for split in ("train", "dev", "test") for r in clip_rows(folder, 8, prefix=split, split=split)]
    write_manifest(folder, rows, "demo.jsonl")
    keys = [f"data.root={folder}", f"train.run_dir={folder}/runs", "train.steps=10", "parallel.num_ranks=1"]
    recipe = load_recipe("debug", keys)
    run = folder / "runs" / "debug"
    run.mkdir(parents=True)
    (run / "plan.json").write_text(json.dumps({**plan, "digest": digest_of(recipe)}))
    command = [sys.executable, "-m", "trainer", "debug", *keys, "data.cache_dir=" + str(folder / "cache")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr
    return run, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_run_that_differs_from_its_plan_says_so(planned: dict[str, Any], tmp_path: Path) -> None:
    fast = {**planned, "too_small": False, "step_sec_range": [1e-4, 2e-4]}
    run, text = run_of(tmp_path, fast)
    assert "step 10: plan checked: a step takes " in text and "longer than the plan's range of 0.10–0.20 ms" in text
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = next(m for m in reversed(metrics) if "train/loss" in m)
    assert last["plan/step_times_planned"] > 1 and last["plan/step_sec_high"] == 2e-4
    assert "plan/llm_times_planned" in last and "plan/peak_memory_times_planned" not in last  # no GPU
    found = read_status(run, 0.0)
    assert found.plan is not None and found.plan["as_planned"] is False
    assert set(found.plan["compared"]["parts_sec"]) == {"encoders", "LLM", "update", "loading", "other"}
    saved = sum(path.stat().st_size for path in (run / "checkpoints" / "step-00000010").rglob("*"))
    # The size is larger than planned, because ranks pad their parts of buffers, and a checkpoint describes its tensors.
    assert planned["checkpoint_bytes"] == pytest.approx(saved, rel=0.15)
    shown = status.describe(found, 0.0)
    assert "  plan      a step takes" in shown and "measured (planned): " in shown
    assert max(map(len, [line for line in shown.splitlines() if line.startswith("   " * 4)])) <= 100


def test_a_toy_and_the_plan_of_another_layout_raise_no_alarm(
    planned: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe, timer = load_recipe("debug"), PhaseTimer()
    (tmp_path / "plan.json").write_text(json.dumps(planned))
    assert plan_check_of(recipe, tmp_path, timer, torch.device("cpu"), lambda *event: None) is None
    assert timer.marker is None and not caplog.records
    (tmp_path / "plan.json").write_text(json.dumps({**planned, "too_small": False, "digest": "other"}))
    assert plan_check_of(recipe, tmp_path, timer, torch.device("cpu"), lambda *event: None) is None
    assert "NOT COMPARED WITH ITS PLAN: " in caplog.text
    caplog.clear()  # a job on fewer nodes has also stored their plan
    (tmp_path / plan_json_name(recipe.parallel.num_ranks)).write_text(json.dumps({**planned, "too_small": False}))
    assert plan_check_of(recipe, tmp_path, timer, torch.device("cpu"), lambda *event: None) is not None
    assert not caplog.records
