"""Kill ranks of small training runs repeatedly, and check that each run ends like an uninterrupted run.

    python -m tools.kill_test                50 kills, every third during a save
    python -m tools.kill_test --kills 5      5 kills
    python -m tools.kill_test --json         also print one JSON object on the last line

Two ranks train a tiny model. The tool sends SIGKILL to a random rank at a random moment, and restarts the run with the
same command. After at most ten kills, the run continues to its end and is compared with an uninterrupted run. Then the
next run starts.

The test passes if
- every restart resumes from the newest committed checkpoint,
- every restart repeats at most one checkpoint interval, plus the steps during an unfinished save, and
- all losses and gradient norms are bit-identical to those of the uninterrupted run.

Exit code 0: passed. 1: failed. 2: the test could not run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from model.errors import UserError
from tools.demo_corpus import write_corpus
from tools.options import check_at_least
from trainer.checkpoint.local import LocalCheckpoints
from trainer.run.command import module_command

EVERY_STEPS, KILLS_PER_RUN = 3, 10
_STEP = re.compile(r"(?:resuming at step|debug step) (\d+)")
_ATTEMPT_SEC = 240.0


@dataclass
class Result:
    """The counts and failures of a test."""

    kills: int = 0
    kills_in_a_save: int = 0
    restarts: int = 0
    runs: int = 0
    max_repeated_steps: int = 0
    """The largest number of steps that a restart repeated."""
    failures: list[str] = field(default_factory=list)
    """Descriptions of the failures; empty if the test passed."""

    @property
    def passed(self) -> bool:
        """True if nothing failed."""
        return not self.failures


@dataclass(frozen=True)
class Killed:
    """The state of the run when a rank was killed."""

    last_step: int
    """The last logged step."""
    committed: int
    """The step of the newest committed checkpoint; 0 if there is none."""
    in_a_save: bool
    """True if a save was being written."""


def kill_test(folder: Path, num_kills: int, num_steps: int, seed: int, corpus: Path | None = None) -> Result:
    """Run the test.

    Args:
        folder: An empty folder for the runs.
        num_kills: The number of kills.
        num_steps: The number of steps of a run.
        seed: The seed for choosing the ranks and the moments of the kills.
        corpus: A demo corpus; None to create one.

    Raises:
        UserError: If the uninterrupted run fails.
    """
    if corpus is None:
        corpus = folder / "corpus"
        write_corpus(corpus, scale=0.05)
    common = [f"data.root={corpus}", f"data.cache_dir={folder / 'cache'}", f"train.steps={num_steps}"]
    common += [f"checkpoint.every_steps={EVERY_STEPS}", "checkpoint.keep_last=2", "telemetry.log_every_steps=1"]
    whole = folder / "whole"
    code, output = _attempt([*common, f"train.run_dir={whole}"], None)
    if code:
        reason = (output.strip().splitlines() or ["it printed nothing"])[-1]
        raise UserError(f"the uninterrupted run failed with exit code {code}: {reason}")
    expected, choose, result = _curve(whole / "debug"), random.Random(seed), Result()
    while result.kills < num_kills and result.passed:
        run_dir = folder / f"run{result.runs}"
        _one_run([*common, f"train.run_dir={run_dir}"], run_dir / "debug", num_kills, choose, result)
        result.runs += 1
        if result.passed and _curve(run_dir / "debug") != expected:
            result.failures.append(f"{run_dir}: losses or gradient norms differ from those of the uninterrupted run")
        if result.passed:
            shutil.rmtree(run_dir)
    return result


def _one_run(arguments: list[str], run_dir: Path, num_kills: int, choose: random.Random, result: Result) -> None:
    killed: Killed | None = None
    done = 0
    while result.passed:
        may_kill = done < KILLS_PER_RUN and result.kills < num_kills
        killer = _Killer(run_dir, choose, in_a_save=result.kills % 3 == 0) if may_kill else None
        code, output = _attempt(arguments, killer)
        if killed is not None:
            _check_resumed(killed, output, result)
        if killer is None or killer.killed is None:
            if code:
                result.failures.append(f"an attempt that was not killed ended with exit code {code}: {output[-500:]}")
            return
        killed = killer.killed
        done, result.kills = done + 1, result.kills + 1
        result.kills_in_a_save += killed.in_a_save
        print(f"kill {result.kills}: after step {killed.last_step}{', in a save' * killed.in_a_save}", flush=True)


def _check_resumed(killed: Killed, output: str, result: Result) -> None:
    found = re.search(r"resuming at step (\d+)", output)
    resumed = int(found[1]) if found else 0
    started = _STEP.search(output) is not None
    if not started:
        return  # The attempt was killed before its first step.
    result.restarts += 1
    repeated = killed.last_step - resumed
    result.max_repeated_steps = max(result.max_repeated_steps, repeated)
    limit = EVERY_STEPS + (killed.last_step % EVERY_STEPS if killed.in_a_save else 0)
    if resumed < killed.committed:
        result.failures.append(f"resumed at step {resumed}, but step {killed.committed} was committed: {output[-500:]}")
    if repeated > limit:
        result.failures.append(f"repeated {repeated} steps, but at most {limit} are allowed: {output[-500:]}")


class _Killer:
    """A random rank, and a random moment at which to kill it."""

    def __init__(self, run_dir: Path, choose: random.Random, in_a_save: bool) -> None:
        self.run_dir, self.in_a_save = run_dir, in_a_save
        self.rank, self.skip = choose.randrange(2), choose.randrange(2)
        self.delay_sec = choose.uniform(0, 0.03) if in_a_save else choose.uniform(0, 6.0)
        self.killed: Killed | None = None

    def watch(self, launcher: subprocess.Popen[bytes]) -> None:
        """Wait for the moment and kill the rank, unless the run ends first."""
        before = self._last_step()
        seen: set[str] = set()
        while launcher.poll() is None:
            if self.in_a_save:
                seen |= {p.name for p in self._unfinished_saves()}
                due = len(seen) > self.skip and bool(self._unfinished_saves())
            else:
                due = self._last_step() > before
            if due:
                time.sleep(self.delay_sec)
                self._kill(launcher)
                return
            time.sleep(0.001 if self.in_a_save else 0.02)

    def _kill(self, launcher: subprocess.Popen[bytes]) -> None:
        ranks = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        if launcher.poll() is not None or len(ranks) < 2:
            return
        os.kill(int(ranks[self.rank]), signal.SIGSTOP)  # Stop the rank first, so that its state can be recorded.
        in_a_save = bool(self._unfinished_saves())
        committed = LocalCheckpoints(self.run_dir / "checkpoints").steps()
        os.kill(int(ranks[self.rank]), signal.SIGKILL)
        launcher.wait()
        self.killed = Killed(self._last_step(), max(committed, default=0), in_a_save)

    def _unfinished_saves(self) -> list[Path]:
        return list((self.run_dir / "checkpoints").glob(".tmp-*-step-*"))

    def _last_step(self) -> int:
        return max(_curve(self.run_dir), default=0)


def _attempt(arguments: Sequence[str], killer: _Killer | None) -> tuple[int, str]:
    """Start the run, wait until it ends or is killed, and return its exit code and output."""
    with tempfile.TemporaryFile() as output:
        launcher = subprocess.Popen(
            module_command("trainer", "debug", *arguments),
            cwd=Path(__file__).parents[1],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            if killer is not None:
                killer.watch(launcher)
            launcher.wait(_ATTEMPT_SEC)
        finally:
            if launcher.poll() is None:
                launcher.terminate()
                launcher.wait()
        output.seek(0)
        return launcher.returncode, output.read().decode(errors="replace")


def _curve(run_dir: Path) -> dict[int, tuple[float, float]]:
    """Return the loss and gradient norm of each logged step, by step."""
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        return {}
    curve = {}
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n") and "train/loss" in (record := json.loads(line)):
            curve[record["step"]] = (record["train/loss"], record["train/grad_norm"])
    return curve


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code: 0 if the test passed, 1 if it failed, 2 after printing a UserError.
    """
    parser = argparse.ArgumentParser(
        prog="python -m tools.kill_test", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50, metavar="N", help="number of kills (default: 50)")
    parser.add_argument("--steps", type=int, default=60, metavar="N", help="length of a run in steps (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="seed for the choice of moments and ranks (default: 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    try:
        check_at_least(1, kills=options.kills, steps=options.steps)
        with tempfile.TemporaryDirectory(prefix="kill-test-") as folder:
            result = kill_test(Path(folder), options.kills, options.steps, options.seed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for failure in result.failures:
        print(f"FAILED: {failure}")
    verdict = "all curves are identical" if result.passed else "FAILED"
    print(f"{result.kills} kills ({result.kills_in_a_save} in a save), {result.restarts} restarts, {result.runs} runs")
    print(f"at most {result.max_repeated_steps} steps repeated at an interval of {EVERY_STEPS}: {verdict}")
    if options.json:
        seconds = round(time.monotonic() - started, 1)
        print(json.dumps({**asdict(result), "passed": result.passed, "every_steps": EVERY_STEPS, "seconds": seconds}))
    return 0 if result.passed else 1


if __name__ == "__main__":
    sys.exit(main())
