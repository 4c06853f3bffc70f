"""Tests of the model FLOPs utilization (MFU) of a running step, compared with the plan's MFU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from trainer.config.load import load_recipe
from trainer.parallel.topology import build_topology
from trainer.plan.accelerator import KNOWN
from trainer.plan.planner import Planner
from trainer.plan.workload import typical_workload
from trainer.telemetry.metrics import StepReport, flatten
from trainer.training.utilization import kept_generators, measure, utilization_of


@pytest.mark.slow
def test_a_step_like_the_plans_has_the_plans_utilization() -> None:
    recipe = load_recipe("debug")
    topology = build_topology(recipe.parallel, recipe.parallel.num_ranks)
    workload = typical_workload(recipe, topology)
    plan = Planner(recipe, KNOWN["h100"]).plan(recipe, workload)
    peak = KNOWN["h100"].fp32_tflops * 1e12 * topology.world  # the recipe's precision is fp32
    found = measure(recipe, topology, peak, "cuda")
    step = StepReport(1, 2.0, num_tokens=workload.tokens, audio_sec=workload.audio_sec)
    step = replace(step, phase_sec={"llm": plan.time.total})
    assert found.mfu(step) == pytest.approx(plan.time.mfu, rel=1e-6)
    half = replace(step, num_tokens=workload.tokens // 2, audio_sec=workload.audio_sec / 2)
    assert found.mfu(half) == pytest.approx(plan.time.mfu / 2, rel=1e-2)
    assert found.mfu(replace(step, phase_sec={})) is None
    assert flatten([replace(step, mfu=0.25, memory_bytes=7)])["throughput/mfu"] == 0.25


def test_it_is_unknown_on_cpus_and_strange_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("debug")
    topology = build_topology(recipe.parallel, recipe.parallel.num_ranks)
    assert utilization_of(recipe, topology, torch.device("cpu")) is None
    names = iter(["NVIDIA H100 80GB HBM3", "Toaster", "NVIDIA H200"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: next(names))
    found = utilization_of(recipe, topology, torch.device("cuda"))
    assert found is not None and found.peak_flops_per_sec == pytest.approx(67e12 * topology.world)
    assert utilization_of(recipe, topology, torch.device("cuda")) is None
    hub = replace(recipe, model=replace(recipe.model, llm=replace(recipe.model.llm, weights="a/b", config={})))
    assert utilization_of(hub, topology, torch.device("cuda")) is None


def test_random_numbers_do_not_change() -> None:
    recipe = load_recipe("debug")
    topology = build_topology(recipe.parallel, recipe.parallel.num_ranks)
    before = torch.get_rng_state()
    with kept_generators(torch.device("cpu")):
        measure(recipe, topology, 1e12, "cuda")
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
