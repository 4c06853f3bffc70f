"""Tests of the decision whether to restart a job that ended early."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from model.errors import UserError
from trainer.run import restart
from trainer.run.exit_codes import ExitCode
from trainer.run.restart import RestartConfig, decide, fingerprint
from trainer.telemetry.events import begin_attempt, read_events

NOW = 1_000_000.0
CONFIG = RestartConfig(max_restarts=2, window_sec=100.0)


def event(name: str, age_sec: float = 0.0, **fields: Any) -> dict[str, Any]:
    return {"time": NOW - age_sec, "event": name, "attempt": 1, **fields}


def failed(step: int | None, cause: str = "ValueError: # at x.py:f", **fields: Any) -> dict[str, Any]:
    return event("failed", step=step, fingerprint=cause, error="ValueError: 3", samples=["a", "b"], **fields)


@pytest.mark.parametrize("code", [1, 75, 76, 77, 128 + 9, 128 + 15, 128 + 11, 3])
def test_first_failure_of_any_kind_is_retried(code: int) -> None:
    decision = decide([event("started")], code, CONFIG, NOW)
    assert decision.again and "restart 1 of 2" in decision.why


def test_finished_runs_and_user_errors_are_not_restarted() -> None:
    assert not decide([event("started")], ExitCode.FINISHED, CONFIG, NOW).again
    assert not decide([event("started")], ExitCode.USER_ERROR, CONFIG, NOW).again
    ended = [event("started"), event("finished", step=9)]
    why = "the run is finished, but its last attempt ended with an error afterwards"
    assert decide(ended, 128 + 9, CONFIG, NOW).why == why
    assert decide([*ended, event("started")], 128 + 9, CONFIG, NOW).again  # for example, to train more steps
    # srun returns the largest exit code of all ranks, which may hide the code of a user error.
    hidden = decide([event("started"), event("failed", user=True, error="data.root")], ExitCode.PEER_LOST, CONFIG, NOW)
    assert not hidden.again and "data.root" in hidden.why


def test_a_user_error_on_fewer_nodes_says_so() -> None:
    events = [event("submitted"), event("fewer_nodes", nodes=14, num_ranks=112), event("started")]
    mistake = event("failed", user=True, error="data.num_lanes = 64")
    why = decide([*events, mistake], ExitCode.USER_ERROR, CONFIG, NOW).why
    assert why.startswith("it would fail again: data.num_lanes = 64; this attempt had only 14 nodes with 112 ranks")
    assert why.endswith("submit the job again with restart.min_nodes=15")
    later = [*events, event("submitted"), event("started"), mistake]  # this attempt has all nodes again
    assert "nodes" not in decide(later, ExitCode.USER_ERROR, CONFIG, NOW).why


def test_the_killed_rank_does_not_hide_that_the_others_hung() -> None:
    events = [event("started"), event("hang", **{"in": "step 7", "folder": "hang-1"})]
    decision = decide(events, 128 + 9, CONFIG, NOW)
    assert decision.again and decision.why == "hung in step 7, stacks are in hang-1; restart 1 of 2"
    # A hang of an earlier attempt does not count.
    assert "signal 9" in decide([*events, event("requeued", 200), event("started")], 128 + 9, CONFIG, NOW).why


def test_a_fenced_attempt_does_not_decide_about_the_newer_one() -> None:
    started = [event("started"), event("submitted"), event("started", attempt=2)]
    mistake = event("failed", rank=0, user=True, error="attempt 2 of this run has started, so attempt 1 stops")
    # Earlier versions reported a fenced attempt as a user's mistake.
    assert decide([*started, mistake], 137, CONFIG, NOW).again
    assert decide([*started, event("fenced", rank=0)], 137, CONFIG, NOW).again
    assert decide([*started, event("finished", rank=0)], 137, CONFIG, NOW).again  # the older attempt has finished
    assert decide([*started, event("hang", rank=1, folder="x")], 137, CONFIG, NOW).why.startswith("a rank was killed")
    mine = event("failed", rank=0, user=True, error="data.root", attempt=2)
    assert not decide([*started, mistake, mine], 77, CONFIG, NOW).again
    # A third attempt ended before its ranks started.
    assert decide([*started, event("submitted"), mine], 137, CONFIG, NOW).again
    fenced = decide([*started, event("fenced", rank=0)], ExitCode.FENCED, CONFIG, NOW)
    assert not fenced.again and fenced.why == "a newer attempt of this run has started"


def test_the_decision_about_a_fenced_attempt_is_not_an_event_of_the_newer_one(tmp_path: Path) -> None:
    begin_attempt(tmp_path)
    begin_attempt(tmp_path)
    assert restart.main([str(tmp_path), "--exit-code", str(int(ExitCode.FENCED))]) == 1
    assert [e["event"] for e in read_events(tmp_path)] == ["started", "started"]


def test_a_fault_of_the_machine_is_retried_at_the_same_step() -> None:
    fault = event("failed", step=7, error="FaultError: rank 0: decoding process 0 died (exit code -9)")
    assert decide([event("started"), fault, event("requeued", 200), event("started"), fault], 1, CONFIG, NOW).again


def test_restarts_in_the_future_are_not_counted() -> None:
    """Check restarts that were written by a machine whose clock was an hour ahead."""
    events = [event("requeued", -3600.0), event("requeued", -3500.0), event("started", 10.0)]
    assert decide(events, 137, CONFIG, NOW).again
    assert not decide([event("requeued", -5.0), event("requeued", 5.0), event("started")], 137, CONFIG, NOW).again


def test_number_of_restarts_within_the_window_is_limited() -> None:
    events = [event("requeued", 50.0), event("started", 49.0), event("requeued", 20.0), event("started", 10.0)]
    decision = decide(events, 137, CONFIG, NOW)
    assert not decision.again and "2 restarts within 100 s" in decision.why and "signal 9" in decision.why
    assert decide(events, 137, CONFIG, NOW + 60).again
    assert not decide([], 137, RestartConfig(max_restarts=0), NOW).again


def test_step_that_fails_twice_in_the_same_way_is_not_retried() -> None:
    first = [event("started"), failed(7), event("requeued"), event("started")]
    twice = decide([*first, failed(7)], 1, CONFIG, NOW)
    assert not twice.again and "failed twice in the same way in step 7" in twice.why and "a, b" in twice.why
    assert decide([*first, failed(8)], 1, CONFIG, NOW).again
    assert decide([*first, failed(7, "OSError: disk")], 1, CONFIG, NOW).again
    assert decide([*first, event("peer_lost", step=7)], ExitCode.PEER_LOST, CONFIG, NOW).again
    # If an attempt died before it wrote `started`, the failure of the previous attempt is not taken for its own.
    assert decide([*first, failed(7), event("requeued", 200)], 1, CONFIG, NOW).again
    # The run was at a different step in between.
    between = [event("signal"), event("requeued", 200), event("started")]
    assert not decide([*first, *between, failed(7)], 1, CONFIG, NOW).again
    start = [event("started"), failed(None), event("requeued"), event("started"), failed(None)]
    assert "failed twice in the same way before the first step" in decide(start, 1, CONFIG, NOW).why


def test_errors_with_the_same_cause_are_equal() -> None:
    def error(message: str) -> BaseException:
        try:
            RestartConfig(max_restarts=-int(message))
        except UserError as caught:
            return caught
        raise AssertionError

    assert fingerprint(error("3")) == fingerprint(error("14"))
    assert "restart.max_restarts" in fingerprint(error("3")) and "__post_init__" in fingerprint(error("3"))
    assert fingerprint(error("3")) != fingerprint(ValueError("restart.max_restarts"))


def test_command_writes_its_decision(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin_attempt(tmp_path)
    assert restart.main([str(tmp_path), "--exit-code", "76", "--max-restarts", "1"]) == 0
    assert capsys.readouterr().out == "requeue: hung; restart 1 of 1\n"
    (tmp_path / "recipe.yaml").write_text("name: x\nrestart: {max_restarts: 1, window_sec: 1000.0}\n")
    begin_attempt(tmp_path)
    assert restart.main([str(tmp_path), "--exit-code", "76"]) == 1
    assert capsys.readouterr().out.startswith("no requeue: 1 restarts within 1000 s")
    assert restart.main([str(tmp_path), "--exit-code", "76", "--max-restarts", "2"]) == 0
    assert restart.main([str(tmp_path), "--exit-code", "0"]) == 1
    found = [e["event"] for e in read_events(tmp_path)]
    assert found == ["started", "requeued", "started", "refused", "requeued"]
    assert restart.main([str(tmp_path), "--exit-code", "1", "--max-restarts", "-1"]) == 2
    assert restart.main([str(tmp_path / "nope"), "--exit-code", "1"]) == 2 and not (tmp_path / "nope").exists()


@pytest.mark.parametrize("torn", ["", "name: [", "restart: {max_restarts: -3}", "restart: {unknown: 3}"])
def test_damaged_recipe_does_not_prevent_a_restart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], torn: str
) -> None:
    begin_attempt(tmp_path)
    (tmp_path / "recipe.yaml").write_text(torn)
    assert restart.main([str(tmp_path), "--exit-code", "76"]) == 0
    assert "recipe.yaml: damaged" in capsys.readouterr().err and read_events(tmp_path)[-1]["event"] == "requeued"
