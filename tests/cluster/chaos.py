"""A test of twenty random faults in one run on a real Slurm. It needs root and takes half an hour on two cores.

    python -m tests.cluster.chaos --faults 20 --seed 0

`make chaos` starts it. The run must finish with the results of an undisturbed run: the losses and gradient norms of
every step, the data-loading state, and the tensors in the last checkpoint must be equal. Otherwise, the exit code is 1.
At the end, `tools.status` prints the run's goodput.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence

from tests.cluster import faults
from tests.cluster.harness import ROOT, Bench, next_start, scratch
from tests.services.slurm import Cluster, running, why_not

STEPS_PER_FAULT = 7
CHOICES = [f for name, f in faults.TABLE.items() if not name.startswith(("USR1", "preemption"))] + [faults.warning]
"""The faults to choose from. A time limit and a preemption have the same effect as a warning, but take longer."""


def chaos(bench: Bench, num_faults: int, seed: int) -> list[str]:
    """Run a training with random faults, and return its differences from an undisturbed run."""
    choose, done = random.Random(seed), Counter[str]()
    # Each kind of fault occurs once, in random order. Random kinds follow.
    order = choose.sample(CHOICES, len(CHOICES)) + choose.choices(CHOICES, k=max(0, num_faults - len(CHOICES)))
    run = bench.submit("chaos", "checkpoint.every_steps=2", "train.hang_timeout_sec=30")
    run.wait_step(1)
    started = time.monotonic()
    for number, fault in enumerate(order[:num_faults], start=1):
        step = run.wait_step_after(choose.randint(2, 5))
        moment = fault(run)
        back = run.wait_step(1, after=next_start(run, moment)) - moment
        done[fault.__name__] += 1
        print(f"{number:3} {fault.__name__:24} at step {step:4}, next step after {back:5.1f} s", flush=True)
    run.wait_end(600)
    print(f"{num_faults} faults in {time.monotonic() - started:.0f} s: {dict(sorted(done.items()))}")
    print(f"attempts: {len(run.events('started'))}, restarts by the events: {len(run.events('requeued'))}")
    status = [sys.executable, "-m", "tools.status", str(run.run_dir)]
    print(subprocess.run(status, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    return bench.differences(run)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the test as a command."""
    parser = argparse.ArgumentParser(prog="python -m tests.cluster.chaos", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    reason = why_not()
    if reason:
        print(f"error: Slurm cannot run on this machine: {reason}", file=sys.stderr)
        return 2
    folder = scratch()
    with running(Cluster(folder / "slurm", num_nodes=4)) as cluster:
        bench = Bench(cluster, folder, num_steps=STEPS_PER_FAULT * options.faults)
        bench.run_whole()
        cluster.wait_idle()
        wrong = chaos(bench, options.faults, options.seed)
    for line in wrong:
        print(f"FAILED: {line}")
    if not wrong:
        print(
            "finished; losses, gradient norms, data-loading state and last weights equal those of the undisturbed run"
        )
        shutil.rmtree(folder)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
