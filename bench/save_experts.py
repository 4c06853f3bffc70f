"""Measure the duration of a save of an LLM with very many tensors, apart from writing the bytes.

    python -m bench.save_experts

One rank holds the LLM Qwen3-30B-A3B with all layers and experts, but with a hidden width of 16, so that the time is
spent on tensor names, slices and manifest entries instead of data. `save` interrupts training, and the rest of the save
runs in the background. Times are CPU seconds of the training thread, which do not include other load on the machine.

Goal: the median interruption is shorter than one second. The last line is one JSON object. The exit code is 1 if the
goal is missed.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from model.config import LLMConfig
from model.llm.reference import resolve_hf_config, weight_source
from trainer.checkpoint import llm_state
from trainer.checkpoint.catalog import open_checkpoints
from trainer.checkpoint.config import CheckpointConfig
from trainer.checkpoint.engine_state import EngineState
from trainer.checkpoint.layout import Shard
from trainer.checkpoint.manager import CheckpointManager
from trainer.checkpoint.reader import read_manifest
from trainer.engine.llm import LLMEngine
from trainer.engine.optim import OptimConfig
from trainer.run.launch import start_ranks

GOAL_SEC = 1.0
ROUNDS = 4
QWEN3_30B_A3B_NARROW: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": 256,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 8,
    "norm_topk_prob": True,
}


class LLMState(EngineState):
    """The state of an LLM without audio modules."""

    def shards(self, engines: Any) -> dict[str, list[Shard]]:
        return {"llm": llm_state.shards(engines)}


def work(folder: Path) -> int:
    """Run the benchmark's only rank."""
    from trainer.parallel.groups import build_groups, connect
    from trainer.parallel.topology import Topology

    rank, world, device = connect(timeout_sec=600)
    groups = build_groups(Topology(world, 1, 1), rank, device, seed=0)
    section = LLMConfig(config=QWEN3_30B_A3B_NARROW)
    config = resolve_hf_config(section)
    started = time.perf_counter()
    engine = LLMEngine(config, weight_source(section, config, 1), OptimConfig(), groups, torch.float32)
    built = time.perf_counter() - started
    manager: Any = CheckpointManager(
        str(folder / "checkpoints"), CheckpointConfig(keep_last=1), groups, state=LLMState()
    )
    interrupted, whole = [], []
    for step in range(1, 2 + ROUNDS):
        if step > 1:  # Every step changes the number of updates of every tensor.
            llm_state.set_steps(engine, dict.fromkeys(llm_state.tensor_names(engine), step))
        started, cpu = time.perf_counter(), time.thread_time()
        manager.save(step, engine, {})
        interrupted.append(time.thread_time() - cpu)
        manager.close()
        whole.append(time.perf_counter() - started)
    saved = open_checkpoints(str(folder / "checkpoints"))
    num_tensors = len(read_manifest(saved.folder(saved.steps()[-1])).tensors)
    result = {
        "passed": statistics.median(interrupted[1:]) < GOAL_SEC,
        "num_tensors": num_tensors,
        "build_sec": round(built, 3),
        "interrupted_cpu_sec": [round(s, 3) for s in interrupted],
        "whole_sec": [round(s, 3) for s in whole],
    }
    print(f"{num_tensors} tensors; interrupted for {statistics.median(interrupted[1:]):.3f} CPU-s (goal {GOAL_SEC:g})")
    print(json.dumps(result), flush=True)
    (folder / "passed").write_text(str(int(result["passed"])))  # type: ignore[call-overload]
    dist.destroy_process_group()
    return 0


def main() -> int:
    """Run the benchmark, and return the exit code: 0 if the goal is met, else 1."""
    if "RANK" in os.environ:
        return work(Path(sys.argv[1]))
    folder = Path(tempfile.mkdtemp(prefix="bench-save-experts-"))
    try:
        code = start_ranks(1, [sys.executable, "-m", "bench.save_experts", str(folder)])
        return code or int((folder / "passed").read_text() != "1")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
