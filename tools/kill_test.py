"""Kill ranks of a small run again and again; it must end as if nothing had happened.

    python -m tools.kill_test                50 kills, every third aimed inside a save
    python -m tools.kill_test --kills 5      fewer
    python -m tools.kill_test --json         one JSON object on the last line

Two ranks train a tiny model. SIGKILL goes to a random one at a random moment; the same command starts the run again. A
run that ends before its share of kills is compared, and another one begins. Exit code 1 unless every restart resumed
from the newest committed checkpoint, no more was repeated than one interval (and the steps made while a save was still
being written), and every loss and gradient norm equals the uninterrupted run's, bit for bit.
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
    """What was seen; `failures` empty: the test passed."""

    kills: int = 0
    kills_in_a_save: int = 0
    restarts: int = 0
    runs: int = 0
    max_repeated_steps: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return not self.failures


@dataclass(frozen=True)
class Killed:
    """The run as it was when a rank was killed."""

    last_step: int
    committed: int
    """Newest committed step; 0: none."""
    in_a_save: bool


def kill_test(folder: Path, num_kills: int, num_steps: int, seed: int, corpus: Path | None = None) -> Result:
    """Run the test in `folder`, which must be empty."""
    if corpus is None:
        corpus = folder / "corpus"
        write_corpus(corpus, scale=0.05)
    common = [f"data.root={corpus}", f"data.cache_dir={folder / 'cache'}", f"train.steps={num_steps}"]
    common += [f"checkpoint.every_steps={EVERY_STEPS}", "checkpoint.keep_last=2", "telemetry.log_every_steps=1"]
    whole = folder / "whole"
    code, output = _attempt([*common, f"train.run_dir={whole}"], None)
    if code:
        reason = (output.strip().splitlines() or ["it said nothing"])[-1]
        raise UserError(f"the uninterrupted run failed with exit code {code}: {reason}")
    wanted, choose, result = _curve(whole / "debug"), random.Random(seed), Result()
    while result.kills < num_kills and result.passed:
        run_dir = folder / f"run{result.runs}"
        _one_run([*common, f"train.run_dir={run_dir}"], run_dir / "debug", num_kills, choose, result)
        result.runs += 1
        if result.passed and _curve(run_dir / "debug") != wanted:
            result.failures.append(f"{run_dir}: losses or gradient norms differ from the uninterrupted run's")
        if result.passed:
            shutil.rmtree(run_dir)
    return result


def _one_run(arguments: list[str], run_dir: Path, num_kills: int, choose: random.Random, result: Result) -> None:
    killed: Killed | None = None
    done = 0
    while result.passed:
        again = done < KILLS_PER_RUN and result.kills < num_kills
        killer = _Killer(run_dir, choose, in_a_save=result.kills % 3 == 0) if again else None
        code, output = _attempt(arguments, killer)
        if killed is not None:
            _check_resumed(killed, output, result)
        if killer is None or killer.killed is None:
            if code:
                result.failures.append(f"an attempt that nobody killed ended with exit code {code}: {output[-500:]}")
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
        return  # killed again before its first step
    result.restarts += 1
    repeated = killed.last_step - resumed
    result.max_repeated_steps = max(result.max_repeated_steps, repeated)
    limit = EVERY_STEPS + (killed.last_step % EVERY_STEPS if killed.in_a_save else 0)
    if resumed < killed.committed:
        result.failures.append(f"resumed at step {resumed}, step {killed.committed} was committed: {output[-500:]}")
    if repeated > limit:
        result.failures.append(f"{repeated} steps repeated, at most {limit} may be: {output[-500:]}")


class _Killer:
    """Waits for its moment and kills one rank."""

    def __init__(self, run_dir: Path, choose: random.Random, in_a_save: bool) -> None:
        self.run_dir, self.aimed = run_dir, in_a_save
        self.rank, self.skip = choose.randrange(2), choose.randrange(2)
        self.delay_sec = choose.uniform(0, 0.03) if in_a_save else choose.uniform(0, 6.0)
        self.killed: Killed | None = None

    def watch(self, launcher: subprocess.Popen[bytes]) -> None:
        """Until the moment has come, or the run has ended."""
        before = self._last_step()
        seen: set[str] = set()
        while launcher.poll() is None:
            if self.aimed:
                seen |= {p.name for p in self._asides()}
                due = len(seen) > self.skip and bool(self._asides())
            else:
                due = self._last_step() > before
            if due:
                time.sleep(self.delay_sec)
                self._kill(launcher)
                return
            time.sleep(0.001 if self.aimed else 0.02)

    def _kill(self, launcher: subprocess.Popen[bytes]) -> None:
        ranks = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        if launcher.poll() is not None or len(ranks) < 2:
            return
        os.kill(int(ranks[self.rank]), signal.SIGSTOP)  # so that what is seen is what the kill finds
        in_a_save = bool(self._asides())
        committed = LocalCheckpoints(self.run_dir / "checkpoints").steps()
        os.kill(int(ranks[self.rank]), signal.SIGKILL)
        launcher.wait()
        self.killed = Killed(self._last_step(), max(committed, default=0), in_a_save)

    def _asides(self) -> list[Path]:
        return list((self.run_dir / "checkpoints").glob(".tmp-*-step-*"))

    def _last_step(self) -> int:
        return max(_curve(self.run_dir), default=0)


def _attempt(arguments: Sequence[str], killer: _Killer | None) -> tuple[int, str]:
    """Exit code and output of one start of the run."""
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
    """Loss and gradient norm by step."""
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        return {}
    curve = {}
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n") and "train/loss" in (record := json.loads(line)):
            curve[record["step"]] = (record["train/loss"], record["train/grad_norm"])
    return curve


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0: passed. 1: it did not. 2: nothing was tested; one line on stderr says why."""
    parser = argparse.ArgumentParser(prog="python -m tools.kill_test", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=60, help="length of the run (default 60)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
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
    equal = "all curves equal" if result.passed else "FAILED"
    print(f"{result.kills} kills ({result.kills_in_a_save} in a save), {result.restarts} restarts, {result.runs} runs")
    print(f"at most {result.max_repeated_steps} steps repeated at an interval of {EVERY_STEPS}; {equal}")
    if options.json:
        seconds = round(time.monotonic() - started, 1)
        print(json.dumps({**asdict(result), "passed": result.passed, "every_steps": EVERY_STEPS, "seconds": seconds}))
    return 0 if result.passed else 1


if __name__ == "__main__":
    sys.exit(main())
