"""Compare our export of a ZeRO-3 checkpoint with DeepSpeed's `zero_to_fp32`.

    python -m bench.export

Two ranks train a model with 1 GiB of fp32 weights for one step, and save one checkpoint in our format and one in
DeepSpeed's. Our export and `zero_to_fp32` then take turns converting their checkpoint to safetensors, each time in a
new process. The time of imports is not counted. The additional work of our export (checksums of all files, the
tokenizer and code) is counted. Neither of them syncs its files to disk.

Goals: our export is at least 5 times as fast, its peak memory is at most the size of the largest tensor plus 400 MiB,
and all tensors are bit-identical. The exit code is 1 if a goal is missed.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer.run.launch import start_ranks

SPEED_GOAL, MEMORY_GOAL_BYTES = 5.0, 400 << 20
NUM_RANKS, ROUNDS = 2, 3
WIDTH, LAYERS = 1024, 21
"""The width and the number of layers of the largest encoder. Each layer has 12 · width² parameters."""

OURS = """
import sys, time
from pathlib import Path
import transformers
from trainer.export.publish import Options, export
from trainer.export.source import Source
from trainer.telemetry.metrics import peak_memory_bytes
started = time.perf_counter()
export(Source(sys.argv[1]), Path(sys.argv[2]), Options(dtype="fp32"))
print(time.perf_counter() - started, peak_memory_bytes()["host"])
"""
PEER = """
import sys, time
from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict
from trainer.telemetry.metrics import peak_memory_bytes
started = time.perf_counter()
convert_zero_checkpoint_to_fp32_state_dict(sys.argv[1], sys.argv[2], safe_serialization=True)
print(time.perf_counter() - started, peak_memory_bytes()["host"])
"""


def work(folder: Path) -> int:
    """Run one rank, which trains for one step and saves both checkpoints."""
    import torch
    import torch.distributed as dist

    from model.batch import Batch
    from model.config import EncoderConfig
    from model.hub.configuration import describe
    from trainer import parity, parity_cases
    from trainer.checkpoint.config import CheckpointConfig
    from trainer.checkpoint.manager import CheckpointManager
    from trainer.config.load import dump
    from trainer.config.schema import Recipe
    from trainer.data.config import TokenizerConfig
    from trainer.data.sentencepiece_training import train_sentencepiece
    from trainer.parallel.groups import build_groups, connect
    from trainer.parallel.topology import Topology
    from trainer.parity_cases import DS_CONFIG

    rank, world, device = connect(timeout_sec=900)
    groups = build_groups(Topology(world, 1, 1), rank, device, parity_cases.SEED)
    tiny = parity_cases.tiny_model()
    large = {"d_model": WIDTH, "encoder_layers": LAYERS, "encoder_attention_heads": 16, "encoder_ffn_dim": 4 * WIDTH}
    encoder = EncoderConfig("whisper", "whisper", config=large, length_mode="trim")
    model = replace(tiny, primary=encoder, ctc_weight=0.0)
    step = parity.build_step(model, groups, DS_CONFIG, 1)
    samples = [parity_cases.make_sample(i, 1, model.adapter.rate, 0) for i in range(world)]
    step(0, Batch((samples[rank],)))
    manager = CheckpointManager(str(folder / "run" / "checkpoints"), CheckpointConfig(), groups)
    described = describe(model, step.llm.hf_config, parity_cases.VOCAB_SIZE)
    manager.save(1, step, {"recipe": dump(Recipe(name="bench", model=model)), "model": described})
    manager.close()
    step.audio.engine.save_checkpoint(str(folder / "peer"), tag="step1")
    if rank == 0:
        texts = ["a b c d e f g"] * 9
        train_sentencepiece(texts, 40, folder / "run" / "tokenizer.model", TokenizerConfig().placeholder)
    dist.barrier(groups.world)
    torch.distributed.destroy_process_group()
    return 0


def measure(code: str, source: Path, out: Path) -> tuple[float, int]:
    """Run one arm in a new process, and return its seconds and its peak memory in bytes."""
    done = subprocess.run([sys.executable, "-c", code, source, out], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    seconds, peak = done.stdout.split("\n")[-2].split()
    return float(seconds), int(peak)


def compare(ours: Path, peer: Path) -> tuple[int, int, int]:
    """Return the number of tensors, the number of tensors that differ, and the bytes of the largest tensor."""
    from safetensors import safe_open

    def tensors(folder: Path) -> dict[str, Any]:
        files = [safe_open(str(path), "pt") for path in sorted(folder.glob("*.safetensors"))]
        return {key: file for file in files for key in file.keys()}  # noqa: SIM118

    mine, theirs = tensors(ours), tensors(peer)
    different, largest = 0, 0
    for name, file in theirs.items():
        wanted = file.get_tensor(name)
        largest = max(largest, wanted.nbytes)
        found = mine.get(f"audio.{name}")
        different += found is None or not found.get_tensor(f"audio.{name}").equal(wanted)
    return len(theirs), different, largest


def bench(folder: Path) -> int:
    """Create the checkpoints, run the arms, print the results, and return the exit code."""
    code = start_ranks(NUM_RANKS, [sys.executable, "-m", "bench.export", str(folder)])
    if code:
        return code
    results: dict[str, list[tuple[float, int]]] = {"ours": [], "zero_to_fp32": []}
    for n in range(ROUNDS):
        for name, script, source in (("ours", OURS, folder / "run"), ("zero_to_fp32", PEER, folder / "peer")):
            out = folder / f"{name}-{n}"
            os.sync()  # Otherwise, pending writes of one arm would slow the next.
            results[name].append(measure(script, source, out))
            if n:
                shutil.rmtree(out)
    num_tensors, different, largest = compare(folder / "ours-0", folder / "zero_to_fp32-0")
    seconds = {name: statistics.median(s for s, _ in found) for name, found in results.items()}
    peaks = {name: max(peak for _, peak in found) for name, found in results.items()}
    speed = seconds["zero_to_fp32"] / seconds["ours"]
    passed = speed >= SPEED_GOAL and peaks["ours"] <= largest + MEMORY_GOAL_BYTES and not different
    for name, found in results.items():
        times = " ".join(f"{s:.2f}" for s, _ in found)
        print(f"{name:13} {seconds[name]:6.2f} s (runs: {times})   peak {peaks[name] / 2**20:6.0f} MiB")
    print(f"{speed:.1f} times as fast; {num_tensors - different} of {num_tensors} tensors bit-equal")
    report = {
        "passed": passed,
        "goal": {"times_faster": SPEED_GOAL, "peak_bytes": largest + MEMORY_GOAL_BYTES},
        "times_faster": round(speed, 2),
        "seconds": {name: [round(s, 3) for s, _ in found] for name, found in results.items()},
        "peak_bytes": peaks,
        "largest_tensor_bytes": largest,
        "num_tensors": num_tensors,
        "num_different": different,
    }
    print(json.dumps(report))
    return 0 if passed else 1


def main() -> int:
    """Run the benchmark, and return the exit code: 0 if the goals are met, else 1."""
    if "RANK" in os.environ:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        return work(Path(sys.argv[1]))
    folder = Path(tempfile.mkdtemp(prefix="bench-export-"))
    try:
        return bench(folder)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
