"""Tests of expert usage profiles of random routing histories, and of their text, JSON and plots."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.errors import UserError
from model.router import Routing
from tests.trainer.expert_usage_run import EXPERTS, LAST_STEP, TINY_DIES, make_history, write_run
from trainer.expert_usage.analysis import MAX_WINDOWS, Profile
from trainer.expert_usage.files import write_files
from trainer.expert_usage.history import find_run, profile_history
from trainer.expert_usage.placement import advise, current_slots, measured_time, place
from trainer.expert_usage.text import describe
from trainer.telemetry.expert_load import ClipGroup, ExpertLoad, add_up
from trainer.telemetry.load_history import EncoderCosts, LoadInterval

ASR = ClipGroup("asr", "en", "radio", "1-2 s")


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    return profile_history(find_run(write_run(tmp_path_factory.mktemp("runs"))))


def one_hot(experts: list[int], num: int = 2) -> ExpertLoad:
    """Return the load of one clip of 1 s per entry of `experts`. The only gate routes the clip to that expert."""
    probs = torch.eye(num)[experts][:, None]
    names = [f"e{k}" for k in range(num)]
    return ExpertLoad.of(Routing(probs, probs.bool(), ("g",)), [ASR] * len(experts), [1.0] * len(experts), names)


def interval(step: int, load: ExpertLoad, compute_sec: list[list[float]], num_steps: int = 1) -> LoadInterval:
    compute = np.array(compute_sec)
    none = np.zeros(len(compute))
    slowest = float(compute.sum(0).max())
    names = tuple(f"e{k}" for k in range(len(compute)))
    costs = EncoderCosts(names, compute, np.zeros_like(compute), none, none, slowest)
    return LoadInterval(step, num_steps, 2.0 * num_steps, load, costs)


def of(*history: LoadInterval) -> Profile:
    return Profile("x", "y", None, add_up(i.load for i in history), history, measured_time(history), None)


def test_every_clip_of_the_history_is_in_the_profile(profile: Profile) -> None:
    history = make_history(2)
    tree = profile.to_json()
    assert profile.origin == f"steps 1 to {LAST_STEP}"
    assert tree["tasks"]["all"]["num_clips"] == sum(i.load.total().num_clips for i in history)
    assert tree["tasks"]["all"]["audio_sec"] == pytest.approx(sum(i.load.total().audio_sec for i in history))
    for task in ("asr", "er", "ac"):
        cells = [c for c in tree["cells"] if c["task"] == task]
        assert tree["tasks"][task]["num_clips"] == sum(c["num_clips"] for c in cells)
        for k, name in enumerate(EXPERTS):
            found = tree["tasks"][task]["encoders"][name]
            assert found["num_clips"] == sum(c["routed_clips"][k] for c in cells)
            assert found["clip_share"] == pytest.approx(found["num_clips"] / tree["tasks"][task]["num_clips"])
    assert {c["band"] for c in tree["cells"]} == {"0-1 s", "1-2 s", "2-5 s", "5-10 s", "10-20 s"}
    json.dumps(tree, allow_nan=False)


def test_a_dead_expert_and_since_when(profile: Profile) -> None:
    assert profile.dead == ("whisper_tiny",)
    assert profile.last_used_step("whisper_tiny") == TINY_DIES and profile.last_used_step("hubert") == LAST_STEP
    late = of(*(interval(s, one_hot([0] if s < 8 else [0, 1]), [[1.0, 1.0], [1.0, 1.0]]) for s in range(1, 11)))
    assert late.dead == ()  # e1 is used only at the end, but only the end counts
    assert of(interval(1, one_hot([1]), [[0.0], [1.0]])).last_used_step("e0") is None
    silent = add_up([])
    assert of(interval(1, silent, [[1.0], [1.0]])).dead == ()  # without clips, it is unknown whether an expert is dead


def test_drift_is_how_far_the_shares_moved() -> None:
    times = [[1.0], [1.0]]
    moved = of(*(interval(s, one_hot([0, 0, 0, 1] if s <= 4 else [0, 1, 1, 1]), times) for s in range(1, 9)))
    assert moved.drift == {"all": 0.5, "asr": 0.5}
    still = of(*(interval(s, one_hot([0, 1]), times) for s in range(1, 9)))
    assert still.drift["asr"] == 0.0
    assert of(interval(1, one_hot([0], num=1), [[1.0]])).drift == {"all": 0.0, "asr": 0.0}


def test_windows_cover_all_steps_once() -> None:
    history = [interval(10 * s, one_hot([0, 1]), [[1.0], [1.0]], 10) for s in range(1, 201)]
    windows = of(*history).windows
    assert len(windows) <= MAX_WINDOWS and windows[0].first_step == 1 and windows[-1].last_step == 2000
    assert all(b.first_step == a.last_step + 1 for a, b in zip(windows, windows[1:], strict=False))
    assert sum(w.load.total().num_clips for w in windows) == 400


def test_time_is_of_warm_steps_on_the_last_ranks() -> None:
    cold = interval(1, one_hot([0]), [[50.0, 50.0], [50.0, 50.0]])
    other = interval(4, one_hot([0]), [[9.0], [9.0]], 3)
    warm = [interval(s, one_hot([0, 1, 1]), [[1.0, 3.0], [1.0, 1.0]]) for s in (2, 3)]
    time = measured_time([cold, *warm])
    assert time is not None and (time.num_steps, time.step_sec) == (2, 2.0)
    assert (time.costs.mean_sec, time.costs.slowest_sec, time.lost_sec) == (3.0, 4.0, 1.0)
    assert time.costs.imbalance == pytest.approx(4 / 3)
    assert time.sec_per_audio_sec == pytest.approx([4.0 / 1.0, 2.0 / 2.0])
    resumed = measured_time([cold, *warm, other])
    assert resumed is not None and resumed.costs.num_ranks == 1 and resumed.costs.mean_sec == pytest.approx(18 / 3)
    assert measured_time([interval(1, one_hot([0]), [[0.0], [0.0]])]) is None
    first_only = measured_time([cold])
    assert first_only is not None and first_only.costs.mean_sec == 100.0


def test_placement_by_cost() -> None:
    assert place([6.0, 2.0, 2.0], [0, 1, 1], ep=2, num_ranks=4).slot_sec == (3.0, 2.0)
    advice = advise(["a", "b", "c"], [6.0, 2.0, 2.0], ep=2, num_ranks=4, current=(0, 0, 1))
    assert advice.current is not None and advice.current.slot_sec == (4.0, 1.0)
    assert advice.suggested.slots == (0, 1, 1) and advice.suggested.slowest_sec == 3.0
    assert advice.saved_sec == 1.0 and advice.suggested.imbalance == pytest.approx(3.0 / 2.5)
    assert advice.others == ()  # with 4 places for 3 experts, one would be empty
    apart = advise(["a", "b", "c"], [6.0, 2.0, 2.0], ep=1, num_ranks=6, current=None)
    assert [len(p.slot_sec) for p in apart.others] == [2, 3] and apart.saved_sec == 0.0


def test_placement_is_derived_from_the_computing_ranks() -> None:
    computed = [[3.0, 0.0, 3.0, 0.0], [0.0, 1.0, 0.0, 1.0], [0.0, 2.0, 0.0, 2.0]]
    time = measured_time([interval(1, one_hot([0, 1, 2], num=3), computed)])
    assert time is not None and current_slots(time, ["e0", "e1", "e2"], 2) == (0, 1, 1)


def test_a_checkpoint_is_profiled_up_to_its_step(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    folder = run / "checkpoints" / "step-00000050"
    folder.mkdir(parents=True)
    upto = profile_history(find_run(folder))
    assert upto.origin == "steps 1 to 50" and upto.dead == ()
    (run / "checkpoints" / "step-00000000").mkdir()
    with pytest.raises(UserError, match="begins after step 0"):
        profile_history(find_run(run / "checkpoints" / "step-00000000"))
    with pytest.raises(UserError, match="neither a run's folder"):
        find_run(tmp_path)


def test_an_expert_parallel_run_gets_advice(tmp_path: Path) -> None:
    found = profile_history(find_run(write_run(tmp_path, "parallel.expert=2", num_ranks=4)))
    assert found.advice is not None and found.advice.ep == 2 and found.advice.current is not None
    saved = found.advice.current.slowest_sec - found.advice.suggested.slowest_sec
    assert saved > 0 and f"saves {saved:.3f} s ({saved / 0.5:.1%} of the step)" in describe(found)


def test_text_contains_the_numbers(profile: Profile) -> None:
    tree, text = profile.to_json(), describe(profile)
    share = tree["tasks"]["asr"]["encoders"]["hubert"]["clip_share"]
    line = next(line for line in text.splitlines() if line.startswith("hubert"))
    assert f"{share:.3f}" in line.split()
    assert "whisper_tiny: runs on less than 0.1% of the latest clips; last used in step 100" in text
    time = tree["time"]
    assert time["imbalance"] == pytest.approx((0.1 + 3 * 0.09) / (0.1 + 3 * 0.07))
    assert f"imbalance  {time['imbalance']:.3f}" in text
    assert max(map(len, text.splitlines())) < 160
    empty = Profile("x", "y", None, add_up([]), (), None, None)
    assert "no clips" in describe(empty) and empty.to_json()["tasks"] == {} and empty.imbalance is None


def test_files_contain_the_same_numbers(profile: Profile, tmp_path: Path) -> None:
    files = {p.name for p in write_files(profile, tmp_path)}
    assert files == {"profile.json", "cells.csv", "report.html", "shares.png", "drift.png", "ranks.png"}
    tree = json.loads((tmp_path / "profile.json").read_text())
    assert tree == json.loads(json.dumps(profile.to_json()))
    with (tmp_path / "cells.csv").open(newline="") as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    assert len(rows) == len(tree["cells"]) * 4
    for name in ("whisper", *EXPERTS):
        found = sum(float(row["audio_sec"]) for row in rows if row["encoder"] == name and row["task"] == "er")
        assert found == pytest.approx(tree["tasks"]["er"]["encoders"][name]["audio_sec"], abs=1e-3)
    weighted = sum(
        float(row["weight_data_dependent"]) * int(row["group_clips"]) for row in rows if row["encoder"] == "hubert"
    )
    whole = tree["tasks"]["all"]
    assert weighted / whole["num_clips"] == pytest.approx(
        whole["encoders"]["hubert"]["weight"]["data_dependent"], abs=1e-5
    )
    for path in tmp_path.glob("*.png"):
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 5000
    write_files(Profile("x", "y", None, profile.load, (), None, None), tmp_path)
    assert {p.name for p in tmp_path.glob("*.png")} == {"shares.png"}  # plots of an earlier profile are deleted


def test_entropies_are_bounded(profile: Profile) -> None:
    for task in profile.to_json()["tasks"].values():
        for gate in profile.load.gates:
            assert 0 <= task["entropy"][gate] <= task["entropy_of_mean"][gate] + 1e-9 <= math.log(3) + 1e-6
