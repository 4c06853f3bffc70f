"""When a job that ended early is run again."""

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
def test_whatever_ends_a_run_the_first_time_is_tried_again(code: int) -> None:
    decision = decide([event("started")], code, CONFIG, NOW)
    assert decision.again and "restart 1 of 2" in decision.why


def test_a_finished_run_and_a_users_mistake_are_not() -> None:
    assert not decide([event("started")], ExitCode.FINISHED, CONFIG, NOW).again
    assert not decide([event("started")], ExitCode.USER_ERROR, CONFIG, NOW).again
    ended = [event("started"), event("finished", step=9)]
    assert decide(ended, 128 + 9, CONFIG, NOW).why == "the run is finished; its last attempt ended later with an error"
    assert decide([*ended, event("started")], 128 + 9, CONFIG, NOW).again  # with more steps
    # srun tells the largest code of all ranks: another rank's may hide the mistake's.
    hidden = decide([event("started"), event("failed", user=True, error="data.root")], ExitCode.PEER_LOST, CONFIG, NOW)
    assert not hidden.again and "data.root" in hidden.why


def test_the_killed_rank_does_not_hide_that_the_others_hung() -> None:
    events = [event("started"), event("hang", **{"in": "step 7", "folder": "hang-1"})]
    decision = decide(events, 128 + 9, CONFIG, NOW)
    assert decision.again and decision.why == "hung in step 7, stacks are in hang-1; restart 1 of 2"
    # An earlier attempt's hang is not this one's.
    assert "signal 9" in decide([*events, event("requeued", 200), event("started")], 128 + 9, CONFIG, NOW).why


def test_at_most_so_many_within_the_window() -> None:
    events = [event("requeued", 50.0), event("started", 49.0), event("requeued", 20.0), event("started", 10.0)]
    decision = decide(events, 137, CONFIG, NOW)
    assert not decision.again and "2 restarts within 100 s" in decision.why and "signal 9" in decision.why
    assert decide(events, 137, CONFIG, NOW + 60).again
    assert not decide([], 137, RestartConfig(max_restarts=0), NOW).again


def test_not_when_a_step_fails_twice_the_same_way() -> None:
    first = [event("started"), failed(7), event("requeued"), event("started")]
    twice = decide([*first, failed(7)], 1, CONFIG, NOW)
    assert not twice.again and "step 7 failed twice in the same way" in twice.why and "a, b" in twice.why
    assert decide([*first, failed(8)], 1, CONFIG, NOW).again
    assert decide([*first, failed(7, "OSError: disk")], 1, CONFIG, NOW).again
    assert decide([*first, event("peer_lost", step=7)], ExitCode.PEER_LOST, CONFIG, NOW).again
    # An attempt that died before it could say `started` is not blamed for what the one before it did.
    assert decide([*first, failed(7), event("requeued", 200)], 1, CONFIG, NOW).again
    # In between, the run was elsewhere.
    between = [event("signal"), event("requeued", 200), event("started")]
    assert not decide([*first, *between, failed(7)], 1, CONFIG, NOW).again
    start = [event("started"), failed(None), event("requeued"), event("started"), failed(None)]
    assert "before the first step failed twice" in decide(start, 1, CONFIG, NOW).why


def test_errors_of_one_cause_look_the_same() -> None:
    def error(message: str) -> BaseException:
        try:
            RestartConfig(max_restarts=-int(message))
        except UserError as caught:
            return caught
        raise AssertionError

    assert fingerprint(error("3")) == fingerprint(error("14"))
    assert "restart.max_restarts" in fingerprint(error("3")) and "__post_init__" in fingerprint(error("3"))
    assert fingerprint(error("3")) != fingerprint(ValueError("restart.max_restarts"))


def test_the_command_leaves_its_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
def test_a_damaged_recipe_does_not_keep_a_job_from_running_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], torn: str
) -> None:
    begin_attempt(tmp_path)
    (tmp_path / "recipe.yaml").write_text(torn)
    assert restart.main([str(tmp_path), "--exit-code", "76"]) == 0
    assert "recipe.yaml: damaged" in capsys.readouterr().err and read_events(tmp_path)[-1]["event"] == "requeued"
