"""The measurement of single layers for `bench.gpu_check`.

A model with one layer and a model with three layers are measured in the same way. Half of the difference is the cost of
one layer, excluding embeddings, the loss and one-time allocations.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bench.gpu_models import Sizes, text_sample
from model.batch import Batch, Ragged
from model.encoders.registry import build_encoder, encoder_flops
from model.lengths import num_samples
from trainer import parity, parity_cases
from trainer.parallel.groups import Groups
from trainer.plan.measure import held_states

DEPTHS = (1, 3)


@dataclass(frozen=True)
class Layer:
    """The cost of one layer in a forward and a backward pass."""

    sec: float
    flops: float
    activation_bytes: int | None
    """The bytes of activations at the memory peak of the step; None on a CPU, where memory is not measured."""


def llm_layer(sizes: Sizes, groups: Groups, ds_config: dict[str, Any], dtype: torch.dtype) -> Layer:
    """Measure one LLM layer on one packed text sequence, in a full training step including the optimizer update."""
    found = []
    for depth in DEPTHS:
        model = sizes.model(("whisper",), depth)
        step = parity.build_step(model, groups, ds_config, 1000, dtype, batch_sec=60, pack_tokens=sizes.tokens)
        batch = Batch(tuple(text_sample(i, sizes.tokens // 4) for i in range(4)))
        sec, peak = _measured(lambda step=step, batch=batch: step(0, batch), groups.device, sizes.rounds)  # type: ignore[misc]
        states = held_states(step.audio, step.llm)
        found.append((sec, None if peak is None else peak - states.weights - states.gradients - states.optimizer))
        parameters = sum(p.numel() for name, p in step.llm.parameters() if ".layers.0." in name)
        del step
    (first_sec, first_peak), (last_sec, last_peak) = found
    between = DEPTHS[1] - DEPTHS[0]
    width = sizes.llm["hidden_size"]
    # Causal attention computes half of the score matrix. Each of the four samples has a quarter of the tokens.
    attention = 3 * 2 * 2 * (sizes.tokens // 4) ** 2 / 2 * width * 4
    memory = None if first_peak is None or last_peak is None else (last_peak - first_peak) // between
    return Layer((last_sec - first_sec) / between, 6.0 * parameters * sizes.tokens + attention, memory)


def encoder_layer(sizes: Sizes, family: str, device: torch.device, dtype: torch.dtype) -> Layer:
    """Measure one layer of an encoder on a batch of clips."""
    length = num_samples(sizes.clip_sec)
    clips = Ragged.of([0.1 * torch.randn(length, device=device) for _ in range(sizes.num_clips)])
    times, flops = [], []
    for depth in DEPTHS:
        config = sizes.encoder(family, depth)
        encoder = build_encoder(config).to(device, dtype)

        def work(encoder: Any = encoder) -> None:
            encoder(clips).values.float().sum().backward()

        times.append(_measured(work, device, sizes.rounds)[0])
        flops.append(3 * sizes.num_clips * encoder_flops(config, length))
    between = DEPTHS[1] - DEPTHS[0]
    return Layer((times[1] - times[0]) / between, (flops[1] - flops[0]) / between, None)


def _measured(work: Callable[[], Any], device: torch.device, rounds: tuple[int, int]) -> tuple[float, int | None]:
    """Return the seconds per call, and the peak number of allocated bytes (None on a CPU).

    Args:
        work: The function to measure.
        device: The device on which the function runs.
        rounds: The number of warm-up calls, and the number of measured calls.
    """
    before, count = rounds
    for _ in range(before):
        work()
    _wait(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for _ in range(count):
        work()
    _wait(device)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    return (time.perf_counter() - start) / count, peak


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def planned_bytes(sizes_name: str) -> int:
    """Return the bytes of activations that the plan predicts for a layer of the LLM.

    The planner emulates ranks on the meta device (`trainer.plan.fake_ranks`), which requires that no GPU is visible. It
    therefore runs in a separate process, from which the GPUs are hidden.
    """
    code = f"from bench.gpu_layers import print_plan; print_plan({sizes_name!r})"
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environ.pop(name, None)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environ, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"planning the memory of a layer failed: {done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def print_plan(sizes_name: str) -> None:
    """Print the bytes of activations that the plan predicts for a layer of the LLM."""
    from bench import gpu_models
    from model.llm.reference import resolve_hf_config
    from trainer.parallel.topology import Topology
    from trainer.plan.llm_memory import Kernels, stage_memory

    sizes: Sizes = getattr(gpu_models, sizes_name)
    peaks = []
    for depth in DEPTHS:
        config = resolve_hf_config(sizes.model(("whisper",), depth).llm)
        lengths = (sizes.tokens // 4,) * 4
        memory = stage_memory(
            config,
            Topology(1, 1, 1),
            0,
            lengths,
            1,
            optim=parity_cases.OPTIM,
            dtype=torch.bfloat16,
            recompute="none",
            kernels=Kernels("cuda"),
        )
        peaks.append(memory.peak(1))
    print((peaks[1] - peaks[0]) // (DEPTHS[1] - DEPTHS[0]))
