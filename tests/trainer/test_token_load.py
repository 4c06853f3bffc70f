"""The load of the experts in the LLM's layers: sums, shares, files and limits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from model.errors import UserError
from tests.trainer.expert_usage_run import write_run
from tools import profile_experts
from trainer.telemetry.token_load import (
    HISTORY_NAME,
    TokenGroup,
    TokenLoad,
    add_up,
    read_history,
    token_metrics,
)

EXPERTS, LAYERS, TASKS = ("speech", "sound", "text"), (1, 3), ("asr", "sqa")


def load(step: int, chosen: dict[tuple[int, int], list[int]]) -> TokenLoad:
    """Return the load of two steps in which each kind (task, modality) chose the experts so often, in both layers."""
    sums = np.zeros((len(TASKS) * 2, len(LAYERS), 2 + 3 * len(EXPERTS)))
    for (task, modality), counts in chosen.items():
        tokens = sum(counts) / 2
        row = [tokens, 0.5 * tokens, *counts, *(c / 2 for c in counts), *(c / 2 for c in counts)]
        sums[2 * task + modality] = row
    return TokenLoad.of(step, 2, EXPERTS, LAYERS, TASKS, sums)


def test_shares_sum_to_one_for_every_layer_task_and_modality() -> None:
    found = load(2, {(0, 0): [0, 2, 8], (0, 1): [30, 10, 0], (1, 1): [5, 5, 0]})
    assert set(found.cells) == {TokenGroup("asr", "text"), TokenGroup("asr", "audio"), TokenGroup("sqa", "audio")}
    for cell in found.cells.values():
        np.testing.assert_allclose(cell.share.sum(-1), 1)
    audio = found.total(modality="audio")
    assert audio is not None and audio.chosen.tolist() == [[35, 15, 0]] * 2
    assert found.total(task="sqa", modality="text") is None
    assert found.dead == () and found.overload == pytest.approx(3 * 35 / 60)
    metrics = token_metrics(found)
    assert metrics["ffn_expert/asr/audio/speech/share"] == 0.75 and metrics["ffn_expert/num_dead"] == 0
    assert metrics["ffn_expert/asr/audio/speech/weight"] == pytest.approx(15 / 20)


def test_loads_are_added_and_survive_a_file(tmp_path: Path) -> None:
    loads = [load(2, {(0, 1): [6, 2, 0]}), load(4, {(0, 1): [2, 6, 0], (1, 0): [2, 2, 0]})]
    (tmp_path / HISTORY_NAME).write_text("".join(json.dumps(one.to_json()) + "\n" for one in loads))
    both = add_up(read_history(tmp_path / HISTORY_NAME))
    assert (both.step, both.num_steps) == (4, 4) and both.dead == ("1/text", "3/text")
    assert both.cells[TokenGroup("asr", "audio")].chosen.tolist() == [[8, 8, 0]] * 2
    assert read_history(tmp_path / "none.jsonl") == []
    (tmp_path / HISTORY_NAME).write_text('{"step": 1}\n')
    with pytest.raises(UserError, match=r"line 1: not a record of experts .*restore the file"):
        read_history(tmp_path / HISTORY_NAME)


def test_the_profile_shows_the_experts_of_the_llm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path)
    loads = [load(100, {(0, 1): [8, 2, 0], (0, 0): [0, 1, 9]}), load(200, {(0, 1): [8, 2, 0], (0, 0): [0, 1, 9]})]
    (run / HISTORY_NAME).write_text("".join(json.dumps(one.to_json()) + "\n" for one in loads))
    assert profile_experts.main([str(run), "--fail-on", "overload=2.0"]) == 0
    shown = capsys.readouterr().out
    assert "share of the choices of each task and modality" in shown and "speech" in shown
    assert {p.name for p in (run / "profile").glob("ffn*")} == {"ffn_experts.json", "ffn-experts-asr.png"}
    tree = json.loads((run / "profile" / "ffn_experts.json").read_text())
    assert tree["groups"]["asr/audio"]["share"][0] == [0.8, 0.2, 0.0]
    assert tree["mix"][1][0] == [1.0, 0.666667, 0.0] and tree["drift"] == {"text": 0.0, "audio": 0.0}
    assert profile_experts.main([str(run), "--fail-on", "overload=1.1"]) == 1
    assert "overload 1.350 > 1.1" in capsys.readouterr().err


def test_a_limit_for_experts_needs_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert profile_experts.main([str(write_run(tmp_path)), "--fail-on", "overload=2"]) == 2
    assert "the LLM of the run has no experts; remove this limit" in capsys.readouterr().err
