"""Measure parity, speed and utilisation on one GPU, which CI cannot measure on its CPUs.

    python -m bench.gpu_check

Goals: the loss and gradients in fp32 equal those of the single-process model to 1e-4, since matrix products on a GPU
sum in another order, and the loss in bf16 equals it to 2e-2. Throughput, model FLOPs utilisation (MFU, relative to the
measured matmul rate), and the places in a step where the host waits for the device (docs/gpu.md) are reported without a
goal. The exit code is 1 if a goal is missed, and 3 without a GPU.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from typing import Any

import torch

from bench.gpu_waits import host_waits
from trainer.run.launch import start_ranks

FP32_LIMIT, BF16_LIMIT = 1e-4, 2e-2
WARMUP_STEPS, TIMED_STEPS = 3, 10
LLM = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}


def matmul_flops_per_sec(device: torch.device, dtype: torch.dtype, size: int = 8192) -> float:
    """Return the measured rate of a square matrix product, which counts as 100 % utilisation of this device."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(10):
        a @ b
    torch.cuda.synchronize()
    return 10 * 2 * size**3 / (time.perf_counter() - start)


def work() -> int:
    """Run all checks as the only rank."""
    from tools.parity import DS_CONFIG
    from trainer import parity
    from trainer.parallel.groups import build_groups, connect
    from trainer.parallel.topology import Topology

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    rank, _, device = connect(timeout_sec=300)
    groups = build_groups(Topology(1, 1, 1), rank, device, parity.SEED)
    model = parity.tiny_model()
    samples = parity.make_samples("mixed", 1, model.adapter.rate)
    results: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    oracle = parity.build_oracle(model)
    fp32 = parity.compare(parity.build_step(model, groups, DS_CONFIG, 1), oracle, samples)
    bf16_config = {**DS_CONFIG, "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    bf16_step = parity.build_step(model, groups, bf16_config, 1, torch.bfloat16)
    bf16 = parity.compare(bf16_step, oracle, samples)
    results |= {"fp32_loss": fp32.loss, "fp32_gradient": fp32.gradient, "bf16_loss": bf16.loss}
    results |= throughput(groups, bf16_config, device)
    results["passed"] = fp32.loss <= FP32_LIMIT and fp32.gradient <= FP32_LIMIT and bf16.loss <= BF16_LIMIT
    print(json.dumps(results))
    torch.distributed.destroy_process_group()
    return 0 if results["passed"] else 1


def throughput(groups: Any, ds_config: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return throughput, MFU and the host's waits of a model with a 0.9 B LLM and three encoders in bf16."""
    from model.batch import Batch
    from model.config import EncoderConfig, LLMConfig
    from model.encoders.registry import encoder_flops
    from trainer import parity

    encoders = tuple(EncoderConfig(f, f) for f in ("whisper", "hubert", "wavlm"))
    primary = replace(encoders[0], length_mode="trim")
    model = replace(parity.tiny_model(), primary=primary, experts=encoders[1:], expert_dim=768, ctc_weight=0.0)
    model = replace(model, llm=LLMConfig(config=LLM))
    step = parity.build_step(model, groups, ds_config, 1000, torch.bfloat16, batch_sec=480, pack_tokens=8192)
    samples = tuple(parity.make_sample(i, 1, model.adapter.rate, 7) for i in range(128))
    batch = Batch(samples)
    for number in range(WARMUP_STEPS):
        step(number, batch)
    waits = host_waits(lambda: step(WARMUP_STEPS - 1, batch))
    step.take_load(WARMUP_STEPS)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for number in range(TIMED_STEPS):
        report = step(WARMUP_STEPS + number, batch)
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / TIMED_STEPS
    llm_parameters = sum(p.numel() for _, p in step.llm.parameters())
    load = step.take_load(WARMUP_STEPS + TIMED_STEPS)
    assert load is not None, "one rank: this is rank 0"
    routed = dict(zip(load.load.experts, load.load.total().routed_clips / TIMED_STEPS, strict=True))
    mean_clip = sum(batch.clips.lengths) // len(batch.clips)
    encoder = sum(encoder_flops(primary, n) for n in batch.clips.lengths)
    encoder += sum(encoder_flops(e, mean_clip) * routed[e.name] for e in encoders[1:])
    flops = 6 * llm_parameters * report.num_tokens + 3 * encoder
    rate = matmul_flops_per_sec(device, torch.bfloat16)
    return {
        "step_sec": seconds,
        "tokens_per_sec": report.num_tokens / seconds,
        "audio_sec_per_sec": report.audio_sec / seconds,
        "matmul_tflops": rate / 1e12,
        "mfu": flops / seconds / rate,
        "host_waits": waits,
    }


def main() -> int:
    """Run the benchmark as a command; the exit code is 0 if the goals are met, 1 if not, and 3 without a GPU."""
    if not torch.cuda.is_available():
        print(json.dumps({"passed": None, "reason": "no CUDA device: run this on a machine with a GPU"}))
        return 3
    if "RANK" in os.environ:
        return work()
    return start_ranks(1, [sys.executable, "-m", "bench.gpu_check"])


if __name__ == "__main__":
    sys.exit(main())
