"""Tests of sweeps over recipe keys as job arrays. tests/cluster submits a sweep to a real Slurm."""

from __future__ import annotations

import pytest

from model.errors import UserError
from trainer.job import sweep
from trainer.job.sweep import choose, combinations


def test_every_combination_is_a_run_with_its_own_name() -> None:
    given = ["optim.lr=1e-4,3e-4", "seed=0,1", "data.root=/data", "data.datasets=[{name: a, b: 1}, {name: c}]"]
    runs = combinations("recipes/asr.yaml", given)
    assert len(runs) == 4
    assert runs[1] == ["optim.lr=1e-4", "seed=1", *given[2:], "name=asr-lr_1e-4-seed_1"]
    assert runs[3][-1] == "name=asr-lr_3e-4-seed_1"
    assert combinations("debug", ["name=x", "a='1,2',3"])[0] == ["a='1,2'", "name=x-a__1_2_"]
    assert combinations("debug", ["seed=3"]) == [["seed=3", "name=debug"]]


def test_a_task_of_an_array_is_one_run() -> None:
    given = ["seed=0,1"]
    assert choose("debug", given, {}) == given
    assert choose("debug", given, {"SLURM_ARRAY_TASK_ID": "1"}) == ["seed=1", "name=debug-seed_1"]
    with pytest.raises(UserError, match=r"only 2 runs; use --array=0-1"):
        choose("debug", given, {"SLURM_ARRAY_TASK_ID": "2"})


def test_combinations_are_checked_before_anything_is_queued(capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep.main(["debug", "seed=0,1"]) == 0
    assert capsys.readouterr().out == "debug-seed_0\ndebug-seed_1\n"
    assert sweep.main(["debug", "optim.lr=1e-3,-1"]) == 2
    assert "optim.lr = -1" in capsys.readouterr().err
    assert sweep.main(["debug", "seed=1,1"]) == 2 and "two runs would have the name" in capsys.readouterr().err
    assert sweep.main(["debug", "--folder", "train.run_dir=/x"]) == 0 and capsys.readouterr().out == "/x\n"
