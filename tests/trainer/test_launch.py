"""Tests of starting and ending ranks, and of the environment variables from which a rank reads its number."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from model.errors import UserError
from trainer.__main__ import main as train
from trainer.run.launch import RankEnv, first_host, rank_env, rendezvous, start_ranks
from trainer.telemetry.events import EventLog

ROOT = Path(__file__).parents[2]
TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}
SRUN = {"SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "16", "SLURM_NTASKS": "16"}


@pytest.mark.parametrize(
    ("environ", "num_ranks", "expected"),
    [
        ({}, 2, None),
        (TORCHRUN, 4, RankEnv(3, 1, 4)),
        (SRUN, 16, RankEnv(9, 1, 16)),
        (SRUN | TORCHRUN, 4, RankEnv(3, 1, 4)),  # torchrun within a Slurm task
        (
            {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "16"},
            16,
            None,
        ),  # the batch script, which is not a task
        (SRUN | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, 2, None),  # an interactive shell
        (SRUN | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1"}, 1, RankEnv(0, 0, 1)),
    ],
)
def test_a_rank_finds_its_place(environ: dict[str, str], num_ranks: int, expected: RankEnv | None) -> None:
    assert rank_env(environ, num_ranks) == expected


def test_an_incomplete_launcher_is_named() -> None:
    with pytest.raises(UserError, match="LOCAL_RANK is not set: the launcher must set RANK, LOCAL_RANK and WORLD_SIZE"):
        rank_env({"RANK": "0", "WORLD_SIZE": "2"}, 2)
    with pytest.raises(UserError, match="must be whole numbers"):
        rank_env(TORCHRUN | {"RANK": "x"}, 2)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[003-010,12],x5", "gpu003"),
        ("gpu[7]", "gpu7"),
        ("a-1-[2,5],b", "a-1-2"),
        ("rack[1-2]n[04-9].site", "rack1n04.site"),
    ],
)
def test_the_first_host_of_a_node_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_ranks_connect_at_the_launchers_address() -> None:
    assert rendezvous({"MASTER_ADDR": "h", "MASTER_PORT": "5"}) == ("h", 5)
    slurm = {"SLURM_JOB_ID": "1234567", "SLURM_JOB_NODELIST": "n[3-4]"}
    assert rendezvous(slurm) == ("n3", 24567)
    assert rendezvous(slurm | {"SLURM_STEP_NODELIST": "n4"}) == ("n4", 24567)
    later = slurm | {"SLURM_RESTART_COUNT": "1", "SLURM_STEP_ID": "2"}
    assert rendezvous(later) == ("n3", 24567 + 101 + 22)
    with pytest.raises(UserError, match="MASTER_ADDR is not set"):
        rendezvous({})


def ranks(code: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code)]


def test_ranks_get_their_places_and_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    code = f"""
    import os
    names = "RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT OMP_NUM_THREADS".split()
    open({str(tmp_path)!r} + "/" + os.environ["RANK"], "w").write(" ".join(os.environ[n] for n in names))
    """
    assert start_ranks(2, ranks(code)) == 0
    first, second = ((tmp_path / r).read_text().split() for r in "01")
    assert (first[:3], second[:3]) == (["0", "0", "2"], ["1", "1", "2"])
    assert first[3:] == second[3:]
    assert int(first[5]) == max(1, len(os.sched_getaffinity(0)) // 2)


def test_one_failing_rank_ends_the_others_at_once_and_gives_the_code() -> None:
    start = time.monotonic()
    code = "import os, sys, time; time.sleep(60 if os.environ['RANK'] != '1' else 0); sys.exit(7)"
    assert start_ranks(3, ranks(code)) == 7
    assert time.monotonic() - start < 15


@pytest.mark.parametrize(
    ("events", "code", "left"),
    [
        (["started", "failed"], 2, []),
        ([], 2, []),
        (["started", "skip", "diverged"], 2, ["runs"]),
        (["started", "failed"], 1, ["runs"]),
        (["started", "failed 500"], 2, ["runs"]),  # for example, an evaluation at step 500 lacks a package
        # Another process was started at the same time, and trains in the folder.
        (["started"], 2, ["runs"]),
        (["started", "started", "failed"], 2, ["runs"]),
    ],
)
def test_a_first_try_that_is_a_mistake_leaves_no_folder(
    events: list[str], code: int, left: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "runs" / "debug"

    def ranks(num_ranks: int, command: list[str]) -> int:
        assert num_ranks == 2 and command[-2:] == ["debug", f"train.run_dir={tmp_path / 'runs'}"]
        run.mkdir(parents=True, exist_ok=True)
        (run / "recipe.yaml").touch()
        for words in events:
            event, _, step = words.partition(" ")
            EventLog(run).add(event, int(step) if step else None)
        return code

    monkeypatch.setattr("trainer.run.launch.start_ranks", ranks)
    monkeypatch.setattr("trainer.data.config_files.check_files", lambda config: None)  # the corpus does not exist
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    arguments = ["debug", f"train.run_dir={tmp_path / 'runs'}"]
    assert train(arguments) == code and [path.name for path in tmp_path.iterdir()] == left
    run.mkdir(parents=True, exist_ok=True)  # a folder of an earlier try or of a user is kept
    assert train(arguments) == code and (run / "recipe.yaml").exists()


def test_rank_killed_by_a_signal_gives_the_exit_code_of_a_shell() -> None:
    assert start_ranks(1, ranks("import os; os.kill(os.getpid(), 9)")) == 128 + 9


def test_ctrl_c_before_the_first_step_prints_one_line(tmp_path: Path) -> None:
    (tmp_path / "demo.jsonl").write_text("")
    command = [sys.executable, "-m", "trainer", "debug", f"data.root={tmp_path}", f"train.run_dir={tmp_path}/runs"]
    names = ("RANK", "WORLD_SIZE", "SLURM_PROCID", "TRAINER_ERROR_DIR")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        assert "2 ranks start" in process.stderr.readline()
        time.sleep(1.5)  # the ranks are importing torch
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        found = process.stderr.read()
        assert found.endswith(" debug: ended by Ctrl-C, nothing was saved\n") and found.count("\n") == 1, found
    finally:
        process.kill()
        process.wait()


def test_a_users_error_on_all_ranks_is_printed_once(capfd: pytest.CaptureFixture[str]) -> None:
    code = """
    import sys
    from trainer.run.launch import report_error
    report_error("data.root = x: no such folder")
    sys.exit(2)
    """
    assert start_ranks(3, ranks(code)) == 2
    assert capfd.readouterr().err == "error: data.root = x: no such folder\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_reach_every_rank_once(tmp_path: Path, number: signal.Signals) -> None:
    rank = f"""
    import os, signal, sys, time
    me = {str(tmp_path)!r} + "/" + os.environ["RANK"]
    def handle(number, frame):
        open(me + ".got", "a").write(str(number) + " ")
    signal.signal({int(number)}, handle)
    open(me, "w").close()
    for _ in range(600):
        if os.path.exists(me + ".got"):
            time.sleep(0.3)
            sys.exit(0)
        time.sleep(0.05)
    """
    launcher = f"import sys; from trainer.run.launch import start_ranks; sys.exit(start_ranks(2, {ranks(rank)!r}))"
    process = subprocess.Popen([sys.executable, "-c", launcher])
    try:
        wait_for(lambda: (tmp_path / "0").exists() and (tmp_path / "1").exists())
        process.send_signal(number)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
    assert [(tmp_path / f"{r}.got").read_text().split() for r in (0, 1)] == [[str(int(number))]] * 2


def test_ranks_die_with_a_killed_launcher(tmp_path: Path) -> None:
    rank = f"""
    import os, time
    from trainer.run.launch import RankEnv, join
    join(RankEnv(int(os.environ["RANK"]), 0, 2))
    open({str(tmp_path)!r} + "/" + os.environ["RANK"], "w").write(str(os.getpid()))
    time.sleep(60)
    """
    launcher = f"from trainer.run.launch import start_ranks; start_ranks(2, {ranks(rank)!r})"
    process = subprocess.Popen([sys.executable, "-c", launcher])
    pids: list[int] = []
    try:
        wait_for(lambda: all((tmp_path / r).exists() and (tmp_path / r).read_text() for r in "01"))
        pids = [int((tmp_path / r).read_text()) for r in "01"]
        process.kill()
        process.wait()
        wait_for(lambda: not any(running(pid) for pid in pids))
    finally:
        process.kill()
        process.wait()
        for pid in filter(running, pids):
            os.kill(pid, signal.SIGKILL)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["debug", "optim.lrr=1"], "error: optim.lrr: unknown key; did you mean lr?\n"),
        (["nope"], "error: recipe nope: not one of "),
        (["debug", "parallel.tensor=3"], "error: parallel.tensor = 3: must be one of 1, 2 for 2 ranks;"),
    ],
)
def test_user_error_is_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from trainer.__main__ import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    assert main([*arguments, "--verbose"]) == 2
    out = capsys.readouterr()
    assert out.err.startswith(message)
    assert out.err.count("\n") == 1
    assert not out.out
    assert not list(tmp_path.iterdir())
