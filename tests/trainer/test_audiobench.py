"""Tests of the functions that AudioBench calls, with both forms of AudioBench's samples."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.tools.exportable import INSTRUCTION, write_run
from tools import export
from trainer.evaluation.offline.answer import Windows
from trainer.evaluation.offline.audiobench import MODEL_VARIABLE, earshot_model_generation, earshot_model_loader


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("audiobench")
    write_run(root / "run")
    assert export.main([str(root / "run"), str(root / "out"), "--dtype", "fp32"]) == 0
    return root / "out"


@pytest.fixture(scope="module")
def bench(folder: Path) -> Any:
    """Return a replacement for AudioBench's `Model`, with the attributes that the functions use."""
    model = SimpleNamespace(model_name=str(folder), dataset_name="librispeech_test_clean")
    earshot_model_loader(model)
    return model


def sample(num: int, name: str, rate: int = 16000, task: str | None = "ASR") -> dict[str, Any]:
    wave = 0.1 * np.random.default_rng(num).standard_normal(num)  # float64, like the arrays of the package `datasets`
    made = {"audio": {"array": wave, "sampling_rate": rate, "path": None}, name: f"{INSTRUCTION} a", "reference": "x"}
    return made if task is None else {**made, "task_type": task}


def test_both_forms_and_lists_give_the_same(bench: Any) -> None:
    new, old = sample(8000, "instruction"), sample(8000, "text")
    answer = earshot_model_generation(bench, new)
    assert isinstance(answer, str) and answer
    assert earshot_model_generation(bench, old) == answer
    assert earshot_model_generation(bench, sample(8000, "text", task=None)) == answer
    # AudioBench calls some models with the whole dataset at once
    assert earshot_model_generation(bench, [new, sample(5000, "instruction"), old])[::2] == [answer, answer]


def test_other_rates_are_resampled_and_long_speech_is_windowed(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[int]] = []
    inner = bench.answerer._ask

    def watched(prompts: Any, progress: Any = None) -> Any:
        asked.append([len(clip) for prompt in prompts for clip in prompt.clips])
        return inner(prompts, progress)

    monkeypatch.setattr(bench.answerer, "_ask", watched)
    assert bench.answerer.windows == Windows(30.0, 5.0)
    monkeypatch.setattr(bench.answerer, "windows", Windows(6.0, 1.0))
    earshot_model_generation(bench, sample(22050, "instruction", rate=22050))
    assert asked.pop() == [16000]
    earshot_model_generation(bench, sample(8 * 16000, "instruction"))
    assert asked.pop() == [6 * 16000] * 2
    earshot_model_generation(bench, sample(8 * 16000, "instruction", task="SQA"))
    assert asked.pop() == [8 * 16000]


def test_a_sample_of_another_form_is_an_error(bench: Any) -> None:
    with pytest.raises(ValueError, match="too_long"):  # an answer about only its first seconds would be wrong
        earshot_model_generation(bench, sample(40 * 16000, "instruction", task="SQA"))
    with pytest.raises(ValueError, match="must have audio"):
        earshot_model_generation(bench, {"audio": {"array": [0.0]}, "instruction": "x"})
    with pytest.raises(ValueError, match="must have audio"):
        earshot_model_generation(bench, {"audio": {"array": [0.0], "sampling_rate": 16000}, "question": "x"})


def test_environment_variable_has_precedence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MODEL_VARIABLE, str(folder))
    model = SimpleNamespace(model_name="earshot")
    earshot_model_loader(model)
    assert isinstance(earshot_model_generation(model, sample(4000, "text")), str)
