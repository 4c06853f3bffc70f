"""Tests of a batch job without Slurm: layout, choice of nodes, and the checks of nodes and recipes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from model.errors import UserError
from tests.trainer.data_corpus import clip_rows, write_manifest
from tools.make_shards import main as make_shards
from trainer.config.load import load_recipe
from trainer.job import gpu_check
from trainer.job.__main__ import Job, Signals
from trainer.job.check import Facts, fewer_ranks
from trainer.job.gpu_check import Report, judge_amd, judge_nvidia
from trainer.job.node_check import Wanted, look
from trainer.job.preflight import BadNodesError, choose, preflight
from trainer.job.slurm import Allocation, Layout, lay_out, srun
from trainer.job.submission import RefusedError, check, keep_plan
from trainer.telemetry.events import EventLog, read_events

H100 = "{}, NVIDIA H100 80GB HBM3, {}, 81559, {}\n"


def allocation(num_nodes: int, tasks: int = 8) -> Allocation:
    return Allocation(7, 0, tuple(f"n{i + 1}" for i in range(num_nodes)), tasks, 12, tasks)


@pytest.mark.parametrize(
    ("num_nodes", "num_ranks", "tensor", "expected"),
    [
        (16, 128, 8, Layout(16, 8)),
        (18, 128, 8, Layout(16, 8)),  # two nodes are spares
        (2, 16, 4, Layout(2, 8)),
        (2, 2, 2, Layout(1, 2)),  # a small recipe on large nodes
    ],
)
def test_ranks_fill_nodes(num_nodes: int, num_ranks: int, tensor: int, expected: Layout) -> None:
    assert lay_out(allocation(num_nodes), num_ranks, tensor) == expected


def test_impossible_layout_names_the_remedy() -> None:
    with pytest.raises(
        UserError, match=r"needs 16 nodes of 8 tasks, but the job has 2: use sbatch --nodes=16, or .*=16$"
    ):
        lay_out(allocation(2), 128, 8)
    with pytest.raises(UserError, match="parallel.num_ranks = 12: must be a multiple of 8, the number of tasks"):
        lay_out(allocation(2), 12, 1)
    with pytest.raises(UserError, match="parallel.tensor = 16: .* set it to one of 1, 2, 4, 8"):
        lay_out(allocation(2), 16, 16)


def test_a_step_has_its_ranks_in_blocks_on_the_chosen_nodes() -> None:
    command = srun(allocation(3), ("n1", "n3"), 8, ["trainer", "debug"], {})
    assert {"--nodelist=n1,n3", "--nodes=2", "--ntasks=16", "--ntasks-per-node=8", "--distribution=block"} <= set(
        command
    )
    assert command[-5:] == [sys.executable, "-u", "-m", "trainer", "debug"]


def test_container_command_is_between_srun_and_python() -> None:
    environ = {"SRUN_OPTIONS": "--container-image=x.sqsh", "RANK_PYTHON": "apptainer exec 'my image' python"}
    command = srun(allocation(1), ("n1",), 8, ["trainer"], environ)
    assert command[-8:] == [
        "--container-image=x.sqsh",
        "apptainer",
        "exec",
        "my image",
        "python",
        "-u",
        "-m",
        "trainer",
    ]


def test_spares_replace_faulty_nodes() -> None:
    nodes = ("n1", "n2", "n3", "n4")
    assert choose(nodes, {}, 3) == ("n1", "n2", "n3")
    assert choose(nodes, {"n2": "7 of 8 GPUs answer"}, 3) == ("n1", "n3", "n4")
    with pytest.raises(
        BadNodesError, match=r"4 nodes are needed, but only 3 of 4 are usable; n2: dead; .*--nodes=4-5.*n2\)"
    ) as got:
        choose(nodes, {"n2": "dead"}, 4)
    assert got.value.bad == ("n2",)


@pytest.mark.parametrize(
    ("table", "faults"),
    [
        ("".join(H100.format(i, 81000, 0) for i in range(8)), []),
        ("".join(H100.format(i, 81000, "[N/A]") for i in range(8)), []),
        ("".join(H100.format(i, 81000, 0) for i in range(7)), ["7 of 8 GPUs answer"]),
        (
            "".join(H100.format(i, 81000 - 40000 * (i == 3), 2 * (i == 5)) for i in range(8)),
            ["GPU 3: 41000 of 81559 MiB free; another process uses the rest", "GPU 5: 2 uncorrected memory errors"],
        ),
    ],
)
def test_gpus_are_judged_by_what_nvidia_smi_says(table: str, faults: list[str]) -> None:
    report = Report("n1")
    judge_nvidia(table, 8, report)
    assert report.faults == faults


def test_node_checks_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # contains no nvidia-smi
    wanted = Wanted(1, str(tmp_path / "run"), (), ("http://127.0.0.1:1",), 1e6, 1e6)
    report = look(wanted)
    kinds = ["memory available, 1e+06 needed (PREFLIGHT_MIN_MEMORY_GIB)", "GiB free in", "(PREFLIGHT_MIN_DISK_GIB)"]
    assert all(kind in fault for kind, fault in zip(kinds, report.faults, strict=True)), report.faults
    assert report.warnings[0] == "GPUs are not checked: no nvidia-smi in PATH"
    assert "metrics go to metrics.jsonl only" in report.warnings[1]
    fine = look(Wanted(0, str(tmp_path / "run"), (), (), 0.01, 0.01))
    assert not fine.faults and "no GPUs requested" in fine.facts


AMD = {"VRAM Total Memory (B)": str(192 << 30), "Card Series": "Instinct MI300X"}


def test_amd_gpus_are_queried_if_torch_is_built_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = [1 << 20, 150 << 30]
    cards = {f"card{i}": {**AMD, "VRAM Total Used Memory (B)": str(used[i])} for i in range(2)}
    tool = tmp_path / "rocm-smi"
    tool.write_text(f"#!/bin/sh\necho '{json.dumps({**cards, 'system': {}})}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(gpu_check, "torch_build", lambda: {"hip": "6.4", "cuda": None})
    report = Report("n1")
    gpu_check.check_gpus(3, report)
    assert report.faults == ["2 of 3 GPUs answer", "GPU 1: 43008 of 196608 MiB free; another process uses the rest"]
    assert report.facts == ["2 × Instinct MI300X, 42.0 GiB free", "memory errors not checked"]
    unreadable = Report("n1")
    judge_amd("WARNING: no cards", 1, unreadable)
    assert not unreadable.faults and "not checked" in unreadable.warnings[0]


def test_torch_build_is_read_without_importing_torch() -> None:
    body = "import sys; from trainer.job.gpu_check import torch_build; assert 'hip' in torch_build()"
    body += "; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", body], cwd=Path(__file__).parents[2], check=True, timeout=60)


def test_fault_of_all_nodes_names_the_check_and_its_variable() -> None:
    faults = {f"n{i}": f"{20 + i}.5 GiB of memory available, 64 needed (PREFLIGHT_MIN_MEMORY_GIB)" for i in (1, 2)}
    with pytest.raises(
        BadNodesError, match=r"^all 2 nodes fail the same check: 21.5 .* 64 needed .*; export a smaller P"
    ):
        choose(("n1", "n2"), faults, 1)
    with pytest.raises(BadNodesError, match="request spares"):
        choose(("n1", "n2"), {"n1": "no answer", "n2": "1 of 8 GPUs answer"}, 1)


def test_a_folder_that_cannot_be_written_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    report = look(Wanted(0, str(tmp_path / "file" / "run"), (), (), 0, 0))
    assert report.faults == [f"{tmp_path}/file/run cannot be written: Not a directory"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["debug", "optim.lrr=1"], "error: optim.lrr: unknown key; did you mean lr?\n"),
        (
            ["debug", "data.root=/nowhere"],
            "error: data.datasets 'demo': /nowhere/demo.jsonl: no such file; check data.root",
        ),
    ],
)
def test_outside_a_job_it_checks_and_refuses(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    command = [sys.executable, "-m", "trainer.job", *arguments]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith(message) and done.stderr.count("\n") == 1


def test_shards_and_weights_are_checked_before_a_job(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.job.check import main

    manifest = write_manifest(tmp_path, clip_rows(tmp_path, 3))
    assert make_shards([str(manifest), str(tmp_path / "shards")]) == 0
    shards = ["debug", f"data.root={tmp_path}", "data.datasets=[{name: a, shards: shards}]"]
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert main([*shards, "data.eval_splits=[train]", "eval.final_split=train"]) == 0
    assert main([*shards, "data.eval_splits=[train, dev]", "eval.final_split=train"]) == 2
    assert "data.eval_splits: no dataset has samples of split 'dev'" in capsys.readouterr().err
    assert main([*shards, "data.datasets.0.tasks=[er]"]) == 2 and "select nothing" in capsys.readouterr().err
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main([*shards, "data.eval_splits=[train]", "eval.final_split=train", "model.llm.weights=a/b"]) == 2
    assert "model.llm.weights = a/b: neither a path nor in the hub's cache" in capsys.readouterr().err


def test_facts_of_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from trainer.job.check import main

    write_manifest(tmp_path, clip_rows(tmp_path, 2, split="test") + clip_rows(tmp_path, 2, prefix="a"), "demo.jsonl")
    keys = [f"data.root={tmp_path}", f"train.run_dir={tmp_path}/runs"]
    assert main(["debug", *keys]) == 0
    facts = json.loads(capsys.readouterr().out)
    # The command makes no plan, so these fields are empty.
    assert (facts.pop("host_gib"), facts.pop("disk_gib"), facts.pop("plan"), facts.pop("plan_json")) == (0, 0, "", "")
    assert facts.pop("checkpoints") == f"{tmp_path}/runs/debug"
    wanted = {"num_ranks": 2, "tensor": 1, "min_nodes": None, "stores": [], "trackers": []}
    wanted |= {"fewer_ranks": [], "ranks_per_node": 0}
    assert facts == {"run_dir": f"{tmp_path}/runs/debug", **wanted}


def test_a_restarted_job_takes_the_largest_number_of_nodes_that_is_possible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def check(recipe: str, overrides: Sequence[str], retry_sec: float, per_node: int) -> Facts:
        assert per_node == 8
        asked.append(int(overrides[-1].removeprefix("parallel.num_ranks=")))
        if asked[-1] % 16:
            raise RefusedError("no whole pipelines", None)
        return replace(facts, num_ranks=asked[-1], plan="a plan", plan_json=f'{{"ranks": {asked[-1]}}}')

    monkeypatch.setattr("trainer.job.__main__.check", check)
    monkeypatch.setattr("signal.signal", lambda *_: None)  # keeps pytest's signal handlers
    facts = Facts(str(tmp_path), 128, 8, 12, (), ())
    keep_plan(replace(facts, plan="the plan", plan_json='{"ranks": 128}'))

    def job(num_nodes: int, restarts: int, min_nodes: int | None) -> Job:
        nodes = replace(allocation(num_nodes), restarts=restarts)
        return Job(nodes, replace(facts, min_nodes=min_nodes), Signals(), EventLog(tmp_path), ("x", "optim.lr=1"))

    fewer = job(15, 1, 12)._fit()
    assert asked == [120, 112] and fewer.facts.num_ranks == 112
    assert fewer.arguments == ("x", "optim.lr=1", "parallel.num_ranks=112")
    (event,) = read_events(tmp_path)
    assert (event["event"], event["nodes"], event["num_ranks"]) == ("fewer_nodes", 14, 112)
    stored = {path.name: path.read_text().strip() for path in tmp_path.glob("plan*")}
    wanted = {"plan.txt": "the plan", "plan.json": '{"ranks": 128}', "plan-112-ranks.json": '{"ranks": 112}'}
    assert stored == wanted  # the plan for all nodes stays, as a later attempt may have all nodes again
    asked.clear()
    for unchanged in (job(15, 0, 12), job(15, 1, None), job(16, 1, 12), job(11, 1, 12)):
        assert unchanged._fit() is unchanged
    assert asked == []
    assert job(13, 1, 13)._fit().facts.num_ranks == 128 and asked == [104]


def test_smaller_layouts_are_those_for_which_the_recipe_is_valid() -> None:
    recipe = load_recipe("mowe_70b", ["restart.min_nodes=12"])  # 4 pipeline stages of 4 tensor-parallel ranks
    assert fewer_ranks(recipe, 8) == (112, 96)
    assert fewer_ranks(recipe, 128) == ()  # the job has only one node
    with pytest.raises(UserError, match=r"restart.min_nodes = 15: the recipe is not valid on 15 nodes of 8 ranks "):
        fewer_ranks(load_recipe("mowe_70b", ["restart.min_nodes=15"]), 8)


@pytest.mark.parametrize(
    ("least_possible", "message"),
    [
        (96, None),
        (112, r"^restart.min_nodes = 12: 96 ranks cannot run: too large; set restart.min_nodes=14$"),
        (
            128,
            r"^restart.min_nodes = 12: 96 ranks cannot run: too large; no smaller number of nodes is possible, so rem",
        ),
    ],
)
def test_smaller_layouts_are_planned_before_a_job_starts(
    least_possible: int, message: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = Facts("runs/x", 128, 4, 12, (), (), fewer_ranks=(112, 96), ranks_per_node=8)
    numbers = json.dumps({"host_bytes_per_node": {"total": 2**30}, "disk_bytes_per_run": 2**31})

    def start(module: str, *arguments: str) -> Any:
        if module == "trainer.job.check":
            assert "--per-node=8" in arguments
            return SimpleNamespace(communicate=lambda: (json.dumps(asdict(facts)), ""), returncode=0)
        ranks = next((int(word.partition("=")[2]) for word in arguments if "num_ranks" in word), 128)
        code = 2 * (ranks < least_possible)
        return SimpleNamespace(communicate=lambda: (f"the plan\n{numbers}", "error: too large\n"), returncode=code)

    monkeypatch.setattr("trainer.job.submission._start", start)
    monkeypatch.delenv("PLAN_ACCELERATOR", raising=False)
    with nullcontext() if message is None else pytest.raises(RefusedError, match=message):
        found = check("mowe_70b", ["restart.min_nodes=12"], smaller=True)
        assert (found.plan, found.host_gib, found.disk_gib) == ("the plan", 1, 2)
        assert "a restart may continue with 112, 96 ranks" in capsys.readouterr().out


def test_node_needs_memory_for_the_planned_snapshot_in_addition(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Wanted] = []
    limits: list[float] = []

    def answers(command: list[str], limit_sec: float) -> list[dict[str, Any]]:
        limits.append(limit_sec)
        if "trainer.job.node_check" in command:
            asked.append(Wanted(**json.loads(command[-1])))
            return [asdict(Report(f"n{i + 1}")) for i in range(16)]
        return [{"node": "n1", "mib": 4, "gb_per_sec": 1.0}] * 128

    monkeypatch.setattr("trainer.job.preflight._answers", answers)
    facts = Facts("runs/x", 128, 8, None, (), (), host_gib=53.5, disk_gib=7.5, checkpoints="runs/x")
    found = preflight(allocation(16), Layout(16, 8), facts, {"PREFLIGHT_MIN_MEMORY_GIB": "64"})
    assert len(found.nodes) == 16
    assert asked[0].min_memory_gib == 117.5 and asked[0].num_ranks == 128
    assert 120 < limits[0] < limits[1] < 130
    assert (asked[0].checkpoints, asked[0].checkpoints_gib, asked[0].min_disk_gib) == ("runs/x", 7.5, 10)


def test_node_needs_disk_space_for_the_planned_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoints" / "step-1").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-1" / "weights").write_bytes(bytes(2**20))
    usage = SimpleNamespace(free=12.5 * 2**30)
    monkeypatch.setattr("trainer.job.node_check.shutil.disk_usage", lambda folder: usage)
    wanted = Wanted(0, str(tmp_path), (), (), 0, 10, checkpoints=str(tmp_path), checkpoints_gib=2.5)
    with monkeypatch.context() as patched:
        patched.setattr("trainer.job.node_check.Path.glob", None)  # files are not counted if the space suffices
        assert look(wanted).faults == []
    assert look(replace(wanted, checkpoints_gib=2.5 + 1 / 1024)).faults == []  # 1 MiB of the checkpoints exists already
    wanted = replace(wanted, checkpoints_gib=2.5 + 2 / 1024)
    (fault,) = look(wanted).faults
    assert "12.50 GiB free in " in fault and "but checkpoints need 2.50 (checkpoint.keep_last), and 10 must" in fault


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("a100", ["--accelerator=a100", "--per-node=4"]),
        ("a100,per_node=2", ["--accelerator=a100,per_node=2"]),
    ],
)
def test_the_plan_of_a_job_is_for_as_many_ranks_as_a_node_has(
    given: str, wanted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def start(command: list[str], **_: Any) -> Any:
        asked.extend(word for word in command if word.startswith(("--accelerator=", "--per-node=")))
        return SimpleNamespace(communicate=lambda: ("", "error: no"), returncode=2)

    monkeypatch.setattr("trainer.job.submission.subprocess.Popen", start)
    monkeypatch.setenv("PLAN_ACCELERATOR", given)
    with pytest.raises(RefusedError, match="no"):
        check("debug", [], per_node=4)
    assert asked == wanted


@pytest.mark.slow
def test_the_check_before_a_job_takes_the_memory_from_the_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_manifest(tmp_path, clip_rows(tmp_path, 2), "demo.jsonl")
    keys = [f"data.root={tmp_path}", f"train.run_dir={tmp_path}/runs", "data.eval_splits=[train]"]
    facts = check("debug", [*keys, "eval.final_split=train"])
    assert 1 < facts.host_gib < 5 and 0 < facts.disk_gib < 0.1 and json.loads(facts.plan_json)["recipe"] == "debug"
    text = capsys.readouterr().out
    assert "Host memory of a node with 2 ranks: " in text and "{" not in text
