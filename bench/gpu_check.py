"""Check parity, memory, speed and host waits on one GPU, in about five minutes. CI only has CPUs.

    python -m bench.gpu_check [--small]

The layers have the shapes of Llama-3-8B, Whisper-large-v3, HuBERT-large and WavLM-large. Clips are 30 s long. Goals:

- The loss and gradients in fp32 agree with the single-process model on the CPU to 1e-4. They differ slightly, because
  matmuls on a GPU accumulate in a different order. The loss in bf16 agrees with the fp32 loss on the CPU to 2e-2. This
  is checked with each encoder family as the primary encoder.
- The memory that a layer of the LLM uses is within 15 % of the plan's value.

The benchmark also reports the time and utilization of layers (relative to the measured rate of matmuls), the throughput
of a step, the step's kernels by time, and where the host waits for the device (docs/gpu.md). These have no goals.

Without a GPU, all parts run on the CPU with small shapes, as with `--small`. This only checks that the program works.
The last line is one JSON object. The exit code is 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict, replace
from typing import Any

import torch

from bench.gpu_waits import host_waits
from trainer.run.launch import start_ranks

FP32_LIMIT, BF16_LIMIT, MEMORY_LIMIT = 1e-4, 2e-2, 0.15
_SMALL_SHAPES = "EARSHOT_GPU_CHECK_SMALL"


def work() -> int:
    """Run all checks as the only rank."""
    from bench import gpu_models
    from bench.gpu_layers import encoder_layer, llm_layer, planned_bytes
    from trainer import parity_cases
    from trainer.parallel.groups import build_groups, connect
    from trainer.parallel.topology import Topology
    from trainer.parity_cases import DS_CONFIG

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    name = "SMALL" if os.environ[_SMALL_SHAPES] == "1" else "REAL"
    sizes: gpu_models.Sizes = getattr(gpu_models, name)
    rank, _, device = connect(timeout_sec=300)
    groups = build_groups(Topology(1, 1, 1), rank, device, parity_cases.SEED)
    bf16_config = {**DS_CONFIG, "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "shapes": name,
        "seconds": {},
    }
    goals: dict[str, bool] = {}

    def part(title: str, found: Any) -> None:
        results[title] = found
        results["seconds"][title] = round(time.perf_counter() - start, 1)
        print(f"{results['seconds'][title]:6.1f} s  {title}: {found}", flush=True)

    start = time.perf_counter()
    for family in gpu_models.FAMILIES:
        found = compare(sizes, family, groups, DS_CONFIG, bf16_config)
        goals[f"fp32 loss, {family}"] = found["fp32_loss"] <= FP32_LIMIT
        goals[f"fp32 gradient, {family}"] = found["fp32_gradient"] <= FP32_LIMIT
        goals[f"bf16 loss, {family}"] = found["bf16_loss"] <= BF16_LIMIT
        part(f"parity_{family}", found)
    dtype = torch.bfloat16
    rate = matmul_flops_per_sec(device, dtype, 8192 if name == "REAL" else 256)
    results["matmul_tflops"] = rate / 1e12
    layer = llm_layer(sizes, groups, bf16_config, dtype)
    planned = planned_bytes(name)
    if layer.activation_bytes is not None:
        goals["memory of a layer of the LLM"] = abs(layer.activation_bytes / planned - 1) <= MEMORY_LIMIT
    part("llm_layer", asdict(layer) | {"mfu": layer.flops / layer.sec / rate, "planned_bytes": planned})
    for family in gpu_models.FAMILIES:
        layer = encoder_layer(sizes, family, device, dtype)
        part(f"{family}_layer", {"sec": layer.sec, "mfu": layer.flops / layer.sec / rate})
    part("step", a_step(sizes, groups, bf16_config))
    results |= {"goals": goals, "passed": all(goals.values())}
    print(json.dumps(results))
    torch.distributed.destroy_process_group()
    return 0 if results["passed"] else 1


def compare(sizes: Any, primary: str, groups: Any, fp32: dict[str, Any], bf16: dict[str, Any]) -> dict[str, float]:
    """Return the differences between a step and the single-process model on the CPU, relative to the latter.

    The primary encoder is of the family `primary`, and the encoder experts are of the other families.
    """
    from bench.gpu_models import FAMILIES, audio_sample
    from trainer import parity

    model = sizes.model((primary, *(f for f in FAMILIES if f != primary)), llm_layers=1)
    samples = [[audio_sample(sizes, i, model.adapter.rate) for i in range(2)]]
    oracle = parity.build_oracle(model)
    build: dict[str, Any] = {"batch_sec": 120, "pack_tokens": 4096}
    single = parity.compare(parity.build_step(model, groups, fp32, 1, **build), oracle, samples)
    half = parity.compare(parity.build_step(model, groups, bf16, 1, torch.bfloat16, **build), oracle, samples)
    return {"fp32_loss": single.loss, "fp32_gradient": single.gradient, "bf16_loss": half.loss}


def matmul_flops_per_sec(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Return the measured FLOP/s of a square matmul, which counts as 100 % utilization of the device."""
    from bench.calibrate import measured_seconds

    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / measured_seconds(lambda: a @ b, device)


def a_step(sizes: Any, groups: Any, ds_config: dict[str, Any]) -> dict[str, Any]:
    """Return the throughput, the kernels and the host waits of a bf16 step with all encoders."""
    from torch.profiler import ProfilerActivity, profile

    from bench.gpu_models import FAMILIES, audio_sample, text_sample
    from model.batch import Batch
    from trainer import parity

    on_gpu = groups.device.type == "cuda"
    model = replace(sizes.model(FAMILIES, llm_layers=4, encoder_layers=4), ctc_weight=0.0)
    step = parity.build_step(
        model, groups, ds_config, 1000, torch.bfloat16, batch_sec=480, pack_tokens=max(sizes.tokens, 512)
    )
    audio = [audio_sample(sizes, i, model.adapter.rate) for i in range(2 * sizes.num_clips)]
    batch = Batch((*audio, *(text_sample(i, sizes.tokens // 8) for i in range(8))))
    before, count = sizes.rounds
    for number in range(before):
        step(number, batch)
    waits = host_waits(lambda: step(before, batch)) if on_gpu else {}
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        step(before, batch)
        if on_gpu:
            torch.cuda.synchronize()
    start = time.perf_counter()
    for number in range(count):
        report = step(number, batch)
    seconds = (time.perf_counter() - start) / count
    field = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda e: -getattr(e, field))
    return {
        "sec": seconds,
        "tokens_per_sec": report.num_tokens / seconds,
        "audio_sec_per_sec": report.audio_sec / seconds,
        "host_waits": waits,
        "num_kernels": sum(e.count for e in events),
        "kernels_ms": {e.key[:60]: round(getattr(e, field) / 1000, 3) for e in events[:15]},
    }


def main() -> int:
    """Run the benchmark, and return the exit code: 0 if the goals are met, else 1."""
    if "RANK" in os.environ:
        return work()
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="use small shapes (always used without a GPU)")
    options = parser.parse_args()
    os.environ[_SMALL_SHAPES] = str(int(options.small or not torch.cuda.is_available()))
    return start_ranks(1, [sys.executable, "-W", "ignore", "-m", "bench.gpu_check"])


if __name__ == "__main__":
    sys.exit(main())
