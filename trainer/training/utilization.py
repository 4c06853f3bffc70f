"""The model FLOPs utilization (MFU) of steps: the share of the devices' peak rate that the model itself uses."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from model.errors import UserError
from model.lengths import num_samples
from trainer.config.schema import Recipe
from trainer.parallel.topology import Topology
from trainer.plan.accelerator import KNOWN
from trainer.plan.flops import step_flops
from trainer.plan.sizes import parameter_sizes, part_sizes, sized_model
from trainer.plan.workload import encoder_work, typical_workload
from trainer.telemetry.metrics import StepReport


@dataclass(frozen=True)
class Utilization:
    """The model FLOPs of a run, from which the utilization in each step is computed."""

    flops_per_token: float
    """The FLOPs of the LLM per token, forward and backward, without recomputation."""
    flops_per_audio_sec: float
    """The FLOPs of all encoders per second of audio, if each expert runs as often as in the plan's typical batch."""
    peak_flops_per_sec: float
    """The peak rate of all devices together."""

    def mfu(self, report: StepReport) -> float | None:
        """Return the utilization in a step, from 0 to 1; None if the step took no measurable time."""
        done = self.flops_per_token * report.num_tokens + self.flops_per_audio_sec * report.audio_sec
        return done / (report.seconds * self.peak_flops_per_sec) if report.seconds > 0 else None


def utilization_of(recipe: Recipe, topology: Topology, device: torch.device) -> Utilization | None:
    """Return the model FLOPs of a run; None on a CPU, and if the device's peak rate or the sizes are not known.

    The FLOPs are those that `earshot plan` computes for its typical batch, per token and per second of audio.
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).lower()
    known = next((KNOWN[key] for key in KNOWN if key in name), None)
    if known is None:
        return None
    tflops = known.tflops if recipe.train.precision == "bf16" else known.fp32_tflops
    try:
        return measure(recipe, topology, tflops * 1e12 * topology.world, device.type)
    except UserError:  # The sizes of a model are not known if the recipe names only its hub id.
        return None


def kept_generators(device: torch.device) -> AbstractContextManager[None]:
    """Return a context manager that restores torch's random generators. Computing a model's sizes advances them."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def measure(recipe: Recipe, topology: Topology, peak_flops_per_sec: float, device: str) -> Utilization:
    """Return the model FLOPs of a run on devices whose peak rates add up to `peak_flops_per_sec`."""
    model, workload = sized_model(recipe), typical_workload(recipe, topology)
    parts = part_sizes(parameter_sizes(model, recipe.optim))
    work = encoder_work(model, workload, topology, num_samples(recipe.train.encoder_batch_sec), device)
    flops = step_flops(recipe, model, parts, workload, work)
    return Utilization(
        flops.llm / max(1, workload.tokens), flops.encoders / max(1e-9, workload.audio_sec), peak_flops_per_sec
    )
