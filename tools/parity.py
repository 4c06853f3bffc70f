"""Compare distributed training with the single-process model, on this machine's topologies.

    python -m tools.parity              all topologies that fit on 4 processes, five kinds of batches, 20-step curves
    python -m tools.parity --ranks 2    up to 2 processes
    python -m tools.parity --steps 0    no loss curves
    python -m tools.parity --deepspeed ds_configs/zero3_offload.json    with ZeRO-3 as a run would have it
    python -m tools.parity --pack-multiple 24    with train.pack_multiple_tokens: long paddings
    python -m tools.parity --json       one JSON object on the last line

A user runs it on a new cluster before trusting it. Exit code 1: a difference is over the limit.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from model.errors import UserError
from tools.options import check_at_least
from trainer.parallel.topology import Topology, divisors
from trainer.run.command import module_command
from trainer.run.launch import start_ranks

KINDS = ("mixed", "text_only", "rank_without_audio", "fewer_samples_than_ranks", "one_expert")
TOLERANCE = 1e-5
CURVE_TOLERANCE = 1e-4
MAX_TENSOR = 4
DS_CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "zero_force_ds_cpu_optimizer": False,
    # No parameter stays gathered, so that every gather is exercised.
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": False,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_reuse_distance": 0,
    },
}


@dataclass(frozen=True)
class Row:
    """One topology and kind of batch."""

    topology: str
    kind: str
    loss: float
    gradient: float
    worst: str

    @property
    def passed(self) -> bool:
        """One batch: loss and every gradient within 1e-5. A curve: every loss within 1e-4. NaN does not pass."""
        if self.kind.startswith("curve"):
            return self.loss <= CURVE_TOLERANCE
        return self.loss <= TOLERANCE and self.gradient <= TOLERANCE


def topologies(max_ranks: int) -> list[Topology]:
    """All ways to lay out 1, 2, 4, … ≤ `max_ranks` processes; the encoders over all ranks, and expert-parallel: over 2
    (the three experts do not divide evenly) and over 4 (a rank holds none)."""
    worlds = [w for w in (1, 2, 4, 8, 16) if w <= max_ranks]
    return [
        Topology(w, tp, pp, ep)
        for ep in (1, 2, 4)
        for w in worlds
        for tp in divisors(w)
        for pp in divisors(w // tp)
        if tp <= MAX_TENSOR and pp <= 4 and w % ep == 0 and (ep < 4 or tp * pp <= 2)
    ]


def name(topology: Topology) -> str:
    """E.g. `DP2·TP2`; sequence parallelism is on wherever TP > 1."""
    sizes = (("DP", topology.dp), ("TP", topology.tp), ("PP", topology.pp), ("EP", topology.ep))
    parts = [f"{k}{n}" for k, n in sizes if n > 1]
    return "·".join(parts) or "1"


def check(
    topology: Topology,
    num_steps: int,
    family: str,
    kinds: tuple[str, ...] = KINDS,
    deepspeed: str | None = None,
    pack_multiple: int | None = None,
) -> list[Row]:
    """Measure one topology in processes of its own; `deepspeed` names a DeepSpeed JSON, else `DS_CONFIG` holds."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "rows.json"
        shape = [topology.tp, topology.pp, topology.ep]
        task = json.dumps([*shape, num_steps, family, kinds, deepspeed, pack_multiple, str(out)])
        code = start_ranks(topology.world, module_command("tools.parity", "--worker", task))
        if code:
            return [Row(name(topology), f"crashed with exit code {code}", float("nan"), float("nan"), "")]
        return [Row(**row) for row in json.loads(out.read_text())]


def work(task: str) -> int:
    """One rank of `check`."""
    *arguments, out = json.loads(task)
    rows = measure(*arguments)
    if os.environ["RANK"] == "0":
        Path(out).write_text(json.dumps(rows))
    return 0


def measure(
    tp: int,
    pp: int,
    ep: int,
    num_steps: int,
    family: str,
    kinds: Sequence[str],
    deepspeed: str | None,
    pack_multiple: int | None = None,
) -> list[dict[str, Any]]:
    """What each rank does: compare this launch's topology with the oracle. Returns the rows, as dicts."""
    from trainer.engine.imports import lean_imports

    with lean_imports():
        from trainer import parity
        from trainer.engine.ds_config import build_ds_config
        from trainer.parallel.groups import build_groups, connect
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    import torch.distributed as dist

    rank, world, device = connect(timeout_sec=300)
    topology = Topology(world, tp, pp, ep)
    groups = build_groups(topology, rank, device, parity.SEED)
    model = parity.tiny_model(family)
    ds_config = build_ds_config(Path(deepspeed), precision="fp32") if deepspeed else DS_CONFIG
    step = parity.build_step(model, groups, ds_config, max(1, num_steps), pack_multiple=pack_multiple)
    oracle = parity.build_oracle(model)
    rows = []
    for kind in kinds:
        with parity.favoured(step, 1 if kind == "one_expert" else None):
            found = parity.compare(step, oracle, parity.make_samples(kind, world, model.adapter.strides))
        rows.append(Row(name(topology), kind, found.loss, found.gradient, found.worst))
    if num_steps:
        worst_loss, worst_norm = parity.loss_curves(step, oracle, num_steps)
        rows.append(Row(name(topology), f"curve of {num_steps} steps", worst_loss, worst_norm, "gradient norm"))
    dist.barrier()
    dist.destroy_process_group()
    return [asdict(row) for row in rows]


def _check_deepspeed(path: str | None) -> None:
    """Here, since every rank of every topology would fail of it. Raises UserError."""
    if path is not None:
        from trainer.engine.imports import lean_imports

        with lean_imports():
            from trainer.engine.ds_config import build_ds_config
        build_ds_config(Path(path), precision="fp32")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0: all within the limits. 1: not. 2: nothing was measured; one line on stderr says why."""
    parser = argparse.ArgumentParser(prog="python -m tools.parity", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4, help="largest number of processes (default 4)")
    parser.add_argument("--steps", type=int, default=20, help="length of the loss curves; 0: none (default 20)")
    parser.add_argument("--family", default="llama", choices=("llama", "mistral", "qwen2", "qwen3"))
    parser.add_argument("--deepspeed", help="a DeepSpeed JSON (default: stage 3, no weight stays gathered)")
    parser.add_argument("--pack-multiple", type=int, help="train.pack_multiple_tokens, a multiple of 4 (default none)")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        if options.worker:
            return work(options.worker)
        check_at_least(1, ranks=options.ranks)
        check_at_least(0, steps=options.steps)
        if options.pack_multiple is not None and (options.pack_multiple < 1 or options.pack_multiple % MAX_TENSOR):
            raise UserError(f"--pack-multiple {options.pack_multiple}: must be a multiple of {MAX_TENSOR} tensor ranks")
        _check_deepspeed(options.deepspeed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    print(f"{'topology':12} {'batch':26} {'loss':>9} {'gradient':>9}   largest at")
    rows: list[Row] = []
    for topology in topologies(options.ranks):
        for row in check(topology, options.steps, options.family, KINDS, options.deepspeed, options.pack_multiple):
            rows.append(row)
            verdict = "" if row.passed else "   OVER"
            print(
                f"{row.topology:12} {row.kind:26} {row.loss:9.1e} {row.gradient:9.1e}   {row.worst}{verdict}",
                flush=True,
            )
    passed = all(r.passed for r in rows)
    print("every topology equals the single-process model" if passed else "some topologies differ: see OVER above")
    if options.json:
        print(json.dumps({"passed": passed, "limit": TOLERANCE, "rows": [asdict(r) for r in rows]}))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
