"""Measure the cost of sending clips to the ranks of the chosen encoders, and features back to the source ranks.

    python -m bench.dispatch

Four ranks (gloo) hold one encoder each, and every clip is sent to one of the encoders. Each variant below (*arm*) moves
the same clips with the same routing, and the arms take turns. The encoders compute nothing and return stored features.

- ours: `trainer.engine.expert_parallel.EncoderDispatch`, which gathers the lengths on all ranks, plans the exchange,
  sends the clips and returns the features.
- bare: two calls to `all_to_all_single` that send only the bytes that must leave a rank, between prepared buffers.
- messages, lengths: two parts of `ours`, timed separately. `messages` sends each clip and each feature sequence as a
  separate message, without copying it first. `lengths` gathers the lengths on all ranks. Every dispatch method has
  these costs.
- AutoEP: `_AllToAllV` from deepspeed.module_inject, with its own split plan. All rows of one call have the same width.
  A row is one frame: 320 samples on the way to the encoder, 768 features on the way back. Rounding up to whole frames
  pads a clip by at most 20 ms.
- MOELayer: `deepspeed.moe`. All rows have the same width in both directions, and every rank sends the same number of
  rows, called the capacity, to every expert. A row is one frame, zero-padded to 768 columns. The capacity is the
  smallest that drops no frame (`drop_tokens=False`). If rows were whole clips, every clip would be padded to the length
  of the longest clip.

Goals: `ours` sends at most 1.02 times the payload, which is the samples and features of the clips that are encoded on
another rank, and takes at most 1.3 times as long as `bare`. On a busy machine, every wait for another rank adds
scheduling delay to the wall time, but not to the CPU time of all ranks, which is also printed. Bytes are computed from
the arguments of each collective call. An all-reduce is assumed to be a ring all-reduce. The exit code is 1 if a goal is
missed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bench.dispatch_arms import ARMS, CLIPS_PER_RANK, DIM, WORLD, Work
from model.lengths import FRAME_SAMPLES
from trainer.run.launch import start_ranks

ROUNDS, WARMUP_ROUNDS = 30, 4
BYTES_LIMIT, TIME_LIMIT = 1.02, 1.3


@dataclass
class Wire:
    """A counter of the bytes that this rank sends to other ranks."""

    sent_bytes: float = 0.0
    calls: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def tapped(self) -> Iterator[None]:
        """Count the bytes of every torch.distributed collective that the arms use."""
        real = {name: getattr(dist, name) for name in _SENT}

        def tap(name: str) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                self.calls[name] = self.calls.get(name, 0) + 1
                self.sent_bytes += _SENT[name](*args, **kwargs)
                return real[name](*args, **kwargs)

            return call

        for name in real:
            setattr(dist, name, tap(name))
        try:
            yield
        finally:
            for name, function in real.items():
                setattr(dist, name, function)


def _sent_all_to_all(output: Tensor, input: Tensor, output_split_sizes: list[int] | None = None,
                     input_split_sizes: list[int] | None = None, **kwargs: Any) -> float:  # fmt: skip
    own = input_split_sizes[dist.get_rank()] if input_split_sizes else input.shape[0] // WORLD
    return input.element_size() * (input.shape[0] - own) * (input.numel() / max(1, input.shape[0]))


def _sent_messages(moves: list[dist.P2POp]) -> float:
    return sum(m.tensor.numel() * m.tensor.element_size() for m in moves if m.op is dist.isend)


def _sent_all_gather(output_tensor: Tensor, input_tensor: Tensor, **kwargs: Any) -> float:
    return input_tensor.numel() * input_tensor.element_size() * (WORLD - 1)


def _sent_all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> float:
    return 2 * tensor.numel() * tensor.element_size() * (WORLD - 1) / WORLD


# The parameters above are named as in torch.distributed, since DeepSpeed passes them as keyword arguments.
_SENT: dict[str, Callable[..., float]] = {
    "all_to_all_single": _sent_all_to_all,
    "batch_isend_irecv": _sent_messages,
    "all_gather_into_tensor": _sent_all_gather,
    "all_reduce": _sent_all_reduce,
}


def measure() -> dict[str, Any]:
    """Return the bytes sent, the time of the slowest rank and the CPU time of all ranks for each arm.

    The arms take turns.

    Collective: every rank of the world must call it.
    """
    rank = dist.get_rank()
    work = Work.draw(rank)
    arms = {name: build(work) for name, build in ARMS.items()}
    check(arms, work)
    payload = torch.tensor(
        4.0 * sum(n for r, n in enumerate(work.samples_to()) if r != rank)
        + 4.0 * DIM * sum(n for r, n in enumerate(work.frames_to()) if r != rank)
    )
    dist.all_reduce(payload)
    sent, calls = {}, {}
    for name, run in arms.items():
        wire = Wire()
        with wire.tapped():
            run()
        total = torch.tensor(float(wire.sent_bytes), dtype=torch.float64)
        dist.all_reduce(total)
        sent[name], calls[name] = float(total), wire.calls
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(WARMUP_ROUNDS + ROUNDS):
        names = list(arms)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            dist.barrier()
            start, cpu_start = time.perf_counter(), time.process_time()
            arms[name]()
            spent, cpu_spent = torch.tensor([time.perf_counter() - start, time.process_time() - cpu_start])
            dist.all_reduce(spent, op=dist.ReduceOp.MAX)
            dist.all_reduce(cpu_spent)
            if number >= WARMUP_ROUNDS:
                seconds[name].append(float(spent))
                cpu_seconds[name].append(float(cpu_spent))
    return {
        "payload_bytes": float(payload),
        "sent_bytes": sent,
        "calls": calls,
        "sec": seconds,
        "cpu_sec": cpu_seconds,
    }


def check(arms: dict[str, Callable[[], list[Tensor]]], work: Work) -> None:
    """Check that no arm loses a frame, and that MOELayer, whose expert is the identity, keeps the order of frames."""
    frames, expert = work.frames()
    for name, run in arms.items():
        to_others = sum(n for r, n in enumerate(work.frames_to()) if r != dist.get_rank())
        expected = {"bare": to_others, "lengths": 2 * WORLD * CLIPS_PER_RANK}.get(name, len(frames))
        assert sum(len(t) for t in run()) == expected, name
    (returned,) = arms["MOELayer"]()
    assert torch.equal(returned[:, :FRAME_SAMPLES], frames)


def report(found: dict[str, Any]) -> dict[str, Any]:
    """Print a table, and return the result as a JSON-compatible tree."""
    bare, bare_cpu = found["sec"]["bare"], found["cpu_sec"]["bare"]
    print(f"{'arm':10} {'bytes / payload':>15} {'ms (quartiles)':>22} {'time / bare':>12} {'CPU / bare':>11}   calls")
    rows = {}
    for name, seconds in found["sec"].items():
        low, middle, high = statistics.quantiles(seconds, n=4)
        # Each time is compared with the bare exchange of the same round, since other load on the machine slows both.
        ratio = statistics.median(s / b for s, b in zip(seconds, bare, strict=True))
        cpu_ratio = statistics.median(s / b for s, b in zip(found["cpu_sec"][name], bare_cpu, strict=True))
        share = found["sent_bytes"][name] / found["payload_bytes"]
        rows[name] = {
            "bytes_ratio": share,
            "time_ratio": ratio,
            "cpu_ratio": cpu_ratio,
            "sec": middle,
            "sec_quartiles": [low, high],
        }
        spread = f"{1e3 * middle:.1f} ({1e3 * low:.1f}–{1e3 * high:.1f})"
        calls = ", ".join(f"{n} {c}" for c, n in found["calls"][name].items())
        print(f"{name:10} {share:15.4f} {spread:>22} {ratio:12.2f} {cpu_ratio:11.2f}   {calls}")
    ours = rows["ours"]
    passed = ours["bytes_ratio"] <= BYTES_LIMIT and ours["time_ratio"] <= TIME_LIMIT
    verdict = "met" if passed else "MISSED"
    print(f"goals: bytes at most {BYTES_LIMIT} × payload, time at most {TIME_LIMIT} × bare: {verdict}")
    return {"passed": passed, "payload_bytes": found["payload_bytes"], "arms": rows}


def work_rank() -> int:
    """Run one rank of the benchmark."""
    import deepspeed

    from trainer.parallel.groups import connect

    connect(timeout_sec=120)
    # Otherwise, DeepSpeed would compile a C++ extension at startup that only CPU inference uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_init_required=False, verbose=False)
    found = measure()
    code = 0
    if dist.get_rank() == 0:
        result = report(found)
        print(json.dumps(result), flush=True)
        code = 0 if result["passed"] else 1
    dist.barrier()
    dist.destroy_process_group()
    return code


def main() -> int:
    """Run the benchmark, and return the exit code: 0 if the goals are met, else 1."""
    argparse.ArgumentParser(prog="python -m bench.dispatch", description=(__doc__ or "").splitlines()[0]).parse_args()
    if "RANK" in os.environ:
        return work_rank()
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"}
    return start_ranks(WORLD, [sys.executable, "-m", "bench.dispatch"])


if __name__ == "__main__":
    sys.exit(main())
