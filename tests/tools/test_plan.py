"""The command `earshot plan`, as called by users and batch scripts."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def plan(*arguments: str, timeout_sec: float = 200.0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.plan", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_sec, check=False)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_70b_plan() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = plan("mowe_70b", "--json")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert "fits: " in done.stdout and "mowe_70b on 128 x h100: TP 8 x PP 4 x DP 4" in done.stdout
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["fits"] and found["ranks"] == 128
    # The weights of the LLM are bf16 and split over TP and PP.
    assert sum(k["weights_bytes"] * len(k["stages"]) for k in found["kinds"]) * 8 / 4 > 2 * 70.5e9
    # There are 6 FLOPs per weight and token, without the embedding table.
    assert found["llm_flops"] == pytest.approx(6 * 69.5e9 * found["tokens_per_step"], rel=0.03)
    assert found["step_sec"] == pytest.approx(
        sum(found[k] for k in ("encoders_sec", "llm_sec", "exchange_sec", "update_sec"))
    )
    assert found["days"] == pytest.approx(20000 * found["step_sec"] / 86400)
    assert after.ru_maxrss < 4 * 2**20  # KiB
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 60


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mowe_70b", "parallel.tensr=8"], "error: parallel.tensr: unknown key"),
        (["mowe_70b", "parallel.tensor=3"], "error: parallel.tensor = 3: legal values for 128 ranks are 1, 2, 4, 8,"),
        (["mowe_70b", "--accelerator", "v100"], "error: --accelerator v100: legal names are"),
    ],
)
def test_user_error_is_one_line_before_anything_slow(arguments: list[str], message: str) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = plan(*arguments)
    assert done.returncode == 2 and done.stderr.startswith(message), done.stderr
    assert done.stderr.count("\n") == 1 and done.stdout == ""
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 20


@pytest.mark.slow
def test_a_job_that_cannot_fit_is_refused_with_the_worst_rank() -> None:
    done = plan("debug", "--accelerator", "memory_gib=6.1", "--json")
    assert done.returncode == 2
    assert done.stderr.startswith(
        "error: debug does not fit: a rank of stage 0 at place 0 of its expert-parallel group needs "
    )
    assert done.stderr.count("\n") == 1 and "usable; try " in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["fits"] is False


@pytest.mark.slow
def test_the_fastest_layout_that_fits_is_a_legal_recipe() -> None:
    done = plan("debug", "parallel.num_ranks=4", "data.num_lanes=8", "--fit", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    again = plan("debug", "parallel.num_ranks=4", "data.num_lanes=8", *found["changes"], "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout.splitlines()[-1])["step_sec"] == pytest.approx(found["step_sec"])
    as_it_is = plan("debug", "parallel.num_ranks=4", "data.num_lanes=8", "--json")
    assert found["step_sec"] <= json.loads(as_it_is.stdout.splitlines()[-1])["step_sec"]
