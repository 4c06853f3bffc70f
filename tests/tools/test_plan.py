"""Tests of the command `earshot plan`: its output, exit codes, CPU time and memory."""

from __future__ import annotations

import dataclasses
import json
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from model.errors import UserError
from tools.plan import _accelerator, _parser, main
from trainer.plan.accelerator import KNOWN, parse_accelerator

ROOT = Path(__file__).resolve().parents[2]


def plan(*arguments: str, timeout_sec: float = 400.0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.plan", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_sec, check=False)


# A program that runs the command in its arguments, and writes the command's CPU seconds and peak memory to stderr.
# It is needed because a process inherits the peak memory of the process that starts it.
METER = """
import resource, subprocess, sys
status = subprocess.run(sys.argv[1:]).returncode
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime, used.ru_maxrss * 1024, file=sys.stderr)
sys.exit(status)
"""


def measured_plan(*arguments: str) -> tuple[dict[str, Any], str, float, int]:
    """Run `earshot plan`, and return its JSON, its whole output, its CPU seconds and its peak memory in bytes."""
    command = [sys.executable, "-c", METER, sys.executable, "-m", "tools.plan", *arguments, "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    cpu_sec, peak_bytes = done.stderr.splitlines()[-1].split()
    return json.loads(done.stdout.splitlines()[-1]), done.stdout, float(cpu_sec), int(peak_bytes)


@pytest.mark.slow
@pytest.mark.timeout(450)
def test_the_70b_plan() -> None:
    found, text, cpu_sec, peak_bytes = measured_plan("mowe_70b")
    lines = text.splitlines()
    assert [line.split("  ")[1] for line in lines[1:3]] == [
        "fits",
        "time",
    ] and "Layout: TP 4 x PP 4 (20 virtual stages) x DP 8" in text
    assert lines[0] == "mowe_70b on 128 x h100 (16 nodes)" and lines[1].startswith("  fits        yes: ")
    for word in ("  MFU  ", "  limited by  computing the LLM, ", "  would help  "):
        assert word in text
    assert max(map(len, lines[:-1])) <= 100
    assert found["fits"] and found["ranks"] == 128
    # The LLM's weights are bf16 and are divided among tensor-parallel ranks and stages. A stage has one kind of rank
    # for each place in an expert-parallel group.
    assert found["expert"] == 2
    first = [kind for kind in found["kinds"] if kind["expert_place"] == 0]
    assert found["tensor"] * sum(k["weights_bytes"] * len(k["stages"]) for k in first) > 2 * 70.5e9
    # The LLM takes 6 FLOPs per weight and token. The embedding table is not counted.
    assert found["llm_flops"] == pytest.approx(6 * 69.5e9 * found["tokens_per_step"], rel=0.03)
    assert found["step_sec"] == pytest.approx(
        sum(found[k] for k in ("encoders_sec", "llm_sec", "exchange_sec", "update_sec"))
    )
    assert found["step_sec"] == pytest.approx(sum(found["parts_sec"].values()))
    low, high = found["step_sec_range"]
    assert 0.8 * found["step_sec"] < low < found["step_sec"] < high < 1.25 * found["step_sec"]
    assert found["mfu"] < found["mfu_full_attention"] < 1.1 * found["mfu"]
    assert found["what_if"] == [] and not found["too_small"]
    assert found["advice"]["layout_speedup"] >= found["advice"]["change_speedup"] >= 1
    assert found["days"] == pytest.approx(5000 * found["step_sec"] / 86400)
    assert peak_bytes < 4 * 2**30
    assert cpu_sec < 150  # 65 s on a slow core (AVX2, 2026-11-30)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mowe_70b", "parallel.tensr=8"], "error: parallel.tensr: unknown key"),
        (["mowe_70b", "parallel.tensor=3"], "error: parallel.tensor = 3: must be one of 1, 2, 4, 8,"),
        (["mowe_70b", "--accelerator", "v100"], "error: --accelerator v100: must be one of"),
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


@pytest.mark.slow
def test_a_toy_gets_no_forecast(tmp_path: Path) -> None:
    done = plan("debug", "--price-per-gpu-hour", "2", "--explain", "--store", f"train.run_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "too small to forecast" in done.stdout and "per day" not in done.stdout and "cost" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert "The time of a step by part" in done.stdout
    stored = json.loads((tmp_path / "debug" / "plan.json").read_text())
    assert stored["too_small"] and (tmp_path / "debug" / "plan.txt").read_text().startswith("debug on 2 x h100")
    assert f"stored in {tmp_path}/debug" in done.stderr


@pytest.mark.slow
def test_a_sweep_is_a_table() -> None:
    done = plan("debug", "--sweep", "parallel.num_ranks=1,2,3,16", "--price-per-gpu-hour", "2")
    assert done.returncode == 0, done.stderr
    header, *rows = [line.split() for line in done.stdout.splitlines()]
    assert header[:5] == ["num_ranks", "ranks", "fits", "peak", "GiB"] and header[-1] == "cost"
    assert [row[:3] for row in rows[:3]] == [["1", "1", "yes"], ["2", "2", "yes"], ["3", "3", "yes"]]
    assert rows[3] == ["16", "invalid"]
    assert "parallel.num_ranks=16: data.global_batch_samples = 8: 16 LLM replicas" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100


@pytest.mark.parametrize(
    ("arguments", "refused"),
    [
        (["--fit"], "--fit: a sweep only prints a table"),
        (["--tokens-per-update", "2M"], "--tokens-per-update: a sweep only prints a table"),
        (["--store"], "--store: a sweep only prints a table"),
        (["--price-per-gpu-hour", "inf"], "--price-per-gpu-hour inf: must be positive and finite"),
    ],
)
def test_options_that_a_sweep_would_ignore_are_refused(arguments: list[str], refused: str) -> None:
    done = plan("debug", "--sweep", "parallel.num_ranks=1", *arguments)
    assert done.returncode == 2 and done.stdout == "" and refused in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: RECIPE\n"),
        (
            ["debug", "--fit", "--tokens-per-update", "2T"],
            "argument --tokens-per-update: '2T' is not a positive number such as 500k or 2.1M\n",
        ),
        (["debug", "--fit", "--tokens-per-update", "-1"], "argument --tokens-per-update: '-1' is not a positive"),
    ],
)
def test_errors_of_options_name_what_to_give(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_the_help_fits_into_100_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert max(map(len, _parser().format_help().splitlines())) <= 100


def test_a_node_has_as_many_ranks_as_asked_for() -> None:
    options: Any = SimpleNamespace(accelerator="a100", per_node=4)
    assert _accelerator(options) == dataclasses.replace(KNOWN["a100"], per_node=4)
    with pytest.raises(UserError, match="--per-node 0: must be at least 1"):
        options.per_node = 0
        _accelerator(options)


def test_a_calibrated_device_can_be_planned_for(tmp_path: Path) -> None:
    path = tmp_path / "device.json"
    known = {**dataclasses.asdict(KNOWN["h100"]), "name": "mine", "memory_gib": 40.0}
    path.write_text(json.dumps(known))
    assert parse_accelerator(str(path)) == dataclasses.replace(KNOWN["h100"], name="mine", memory_gib=40.0)
    assert parse_accelerator(f"{path},per_node=4").per_node == 4
    path.write_text("{}")
    with pytest.raises(UserError, match="cannot be read .*write it with python -m bench.calibrate"):
        parse_accelerator(str(path))


@pytest.mark.slow
@pytest.mark.timeout(450)
def test_405_b_on_ten_thousand_ranks_takes_half_a_minute_and_a_gibibyte() -> None:
    sizes = {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128}
    found, _, cpu_sec, peak_bytes = measured_plan(
        "mowe_70b",
        *(f"model.llm.config.{key}={value}" for key, value in sizes.items()),
        "parallel.num_ranks=10080",
        "parallel.tensor=8",
        "parallel.pipeline=9",
        "parallel.virtual_stages=1",
        "data.global_batch_samples=10080",
        "data.num_lanes=10080",
    )
    assert found["ranks"] == 10080
    assert peak_bytes < 2**30
    assert cpu_sec < 30
