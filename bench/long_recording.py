"""Compute the gradients for a recording of one hour with 1, 2 and 4 context-parallel ranks.

    python -m bench.long_recording [--minutes 60] [--ranks 1 2 4]

The recording is synthetic, and is encoded in windows of 30 s. Its audio tokens and 1000 text tokens form one packed
sequence, which is divided among the context-parallel ranks of a small LLM. Nothing is recomputed except the scores of
attention between different chunks of this sequence. For each number of ranks, the command prints the loss, the largest
difference between a gradient and the same gradient on a single rank (relative to the largest entry of the parameter's
gradient), and the peak memory of each rank during the forward and backward pass of the LLM. PyTorch's CPU allocator
reports this memory.

Goal: losses and gradients differ by at most 1e-5, and each of N ranks needs at most 1.3/N of the memory of one rank.
The last line is one JSON object. The exit code is 1 if the goal is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer.run.launch import start_ranks

LIMIT, OVERHEAD = 1e-5, 1.3
TEXT_TOKENS = 1000
_FOLDER = "LONG_RECORDING_FOLDER"
_LLM = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 65536,
}


def work(minutes: float) -> int:
    """Run one rank, which computes the gradients of a step and writes its measurements."""
    import torch
    from safetensors.torch import save_file
    from torch.profiler import ProfilerActivity, profile

    from model.batch import Batch
    from model.config import LLMConfig
    from trainer import parity, parity_cases
    from trainer.parallel.groups import build_groups, connect
    from trainer.parallel.topology import Topology
    from trainer.parity_cases import DS_CONFIG

    rank, world, device = connect(timeout_sec=1800)
    groups = build_groups(Topology(world, 1, 1, cp=world), rank, device, parity_cases.SEED)
    model = replace(parity_cases.tiny_model(), experts=(), ctc_weight=0.0, losses={}, llm=LLMConfig(config=_LLM))
    step = parity.build_step(model, groups, DS_CONFIG, 1)
    sample = _sample(minutes, model)
    compute, peaks, start = step.llm.forward_backward, [], time.perf_counter()

    def measured(*args: Any) -> Any:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            found = compute(*args)
        peaks.append(_peak(profiler.profiler.kineto_results.events()))
        return found

    step.llm.forward_backward = measured  # type: ignore[method-assign, assignment]
    report = step.forward_backward(0, Batch((sample,) if rank == 0 else ()))
    seconds = time.perf_counter() - start
    gradients = parity.gradients_of(step)
    folder = Path(os.environ[_FOLDER])
    found = {"rank": rank, "loss": report.loss, "peak_bytes": peaks[0], "tokens": sample.num_tokens, "seconds": seconds}
    (folder / f"{world}-{rank}.json").write_text(json.dumps(found))
    if rank == 0:
        save_file({n: g.contiguous() for n, g in gradients.items()}, folder / f"{world}.safetensors")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return 0


def _sample(minutes: float, model: Any) -> Any:
    """Return a sample with a recording of tones and noise, followed by random text tokens."""
    import torch

    from model.batch import IGNORE, Sample
    from model.lengths import SAMPLE_RATE
    from trainer.parity_cases import PLACEHOLDER

    generator = torch.Generator().manual_seed(0)
    times = torch.arange(int(minutes * 60 * SAMPLE_RATE)) / SAMPLE_RATE
    clip = 0.1 * torch.sin(times * (800 + 300 * torch.sin(times))) + 0.05 * torch.randn(len(times), generator=generator)
    audio_tokens = model.adapter.rate.tokens_of_samples(len(clip))
    text = torch.randint(0, PLACEHOLDER, (TEXT_TOKENS,), generator=generator)
    ids = torch.cat([torch.full((audio_tokens,), PLACEHOLDER), text])
    labels = torch.full((len(ids),), IGNORE)
    labels[audio_tokens - 1 : -1] = text
    return Sample(
        key="hour",
        task="asr",
        is_transcription=True,
        clips=(clip,),
        token_ids=ids,
        audio_mask=torch.arange(len(ids)) < audio_tokens,
        labels=labels,
        prompt_ids=text[:4],
    )


def _peak(events: Any) -> int:
    """Return the maximum number of bytes that were allocated at the same time since the start of the profile."""
    alive = peak = 0
    for _, change in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        alive += change
        peak = max(peak, alive)
    return peak


def run(minutes: float, worlds: list[int]) -> list[dict[str, Any]]:
    """Return the measurements for each number of ranks.

    The first number of ranks is the reference for all other numbers.
    """
    from safetensors.torch import load_file

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ[_FOLDER] = folder
        for world in worlds:
            code = start_ranks(world, [sys.executable, "-m", "bench.long_recording", "--rank", str(minutes)])
            if code:
                raise SystemExit(code)
            found = [json.loads(Path(folder, f"{world}-{rank}.json").read_text()) for rank in range(world)]
            first, own = (load_file(Path(folder, f"{n}.safetensors")) for n in (worlds[0], world))
            floor = 1e-2 * max(float(g.abs().max()) for g in first.values())
            differences = {
                name: float((own[name] - g).abs().max()) / max(float(g.abs().max()), floor) for name, g in first.items()
            }
            worst = max(differences, key=lambda name: differences[name])
            rows.append(
                {
                    "context": world,
                    "tokens": found[0]["tokens"],
                    "loss": found[0]["loss"],
                    "loss_difference": abs(found[0]["loss"] / (rows[0]["loss"] if rows else found[0]["loss"]) - 1),
                    "gradient_difference": differences[worst],
                    "largest_at": worst,
                    "peak_bytes": [one["peak_bytes"] for one in found],
                    "seconds": max(one["seconds"] for one in found),
                }
            )
            _print(rows[-1])
    return rows


def _print(row: dict[str, Any]) -> None:
    peaks = ", ".join(f"{peak / 2**20:.0f}" for peak in row["peak_bytes"])
    print(
        f"CP{row['context']}: {row['tokens']} tokens, loss {row['loss']:.6f}, differences {row['loss_difference']:.1e} "
        f"(loss) and {row['gradient_difference']:.1e} (gradient, {row['largest_at']}); peak of each rank {peaks} MiB; "
        f"{row['seconds']:.0f} s",
        flush=True,
    )


def main() -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.long_recording", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0, help="length of the recording (default: 60)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="context-parallel sizes")
    parser.add_argument("--rank", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        return work(options.rank)
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    rows = run(options.minutes, options.ranks)
    limit = OVERHEAD * max(rows[0]["peak_bytes"]) * rows[0]["context"]
    passed = all(
        max(row["loss_difference"], row["gradient_difference"]) <= LIMIT
        and (row is rows[0] or max(row["peak_bytes"]) <= limit / row["context"])
        for row in rows
    )
    print(json.dumps({"minutes": options.minutes, "passed": passed, "rows": rows}))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
