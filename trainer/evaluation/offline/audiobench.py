"""The two hooks that AudioBench (github.com/AudioLLMs/AudioBench) needs to run an exported model.

Make this project importable from a checkout of AudioBench. Then add these branches to `load_model` and `generate` in
`src/model.py`:

    elif os.path.isdir(self.model_name):
        from trainer.evaluation.offline.audiobench import earshot_model_loader
        earshot_model_loader(self)

    elif os.path.isdir(self.model_name):
        from trainer.evaluation.offline.audiobench import earshot_model_generation
        return earshot_model_generation(self, input)

Run it with `--model_name FOLDER`. If AudioBench does not accept a path as a model's name, choose any name and put the
path into the environment variable EARSHOT_MODEL.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soxr
import torch
from numpy.typing import NDArray

from model.lengths import SAMPLE_RATE
from trainer.data.errors import SampleError
from trainer.evaluation.offline.answer import Answerer, Decoding, Question, Windows
from trainer.evaluation.offline.model import DTYPES, default_dtype, find_model, load_model

MODEL_VARIABLE = "EARSHOT_MODEL"
MAX_NEW_TOKENS = 512
"""The largest number of tokens in an answer. Some of AudioBench's tasks need longer answers than training did."""
_INSTRUCTION_KEYS = ("instruction", "text")
"""The keys that contain the question of a sample in current and in older versions of AudioBench."""


def earshot_model_loader(self: Any) -> None:
    """Load the model that EARSHOT_MODEL or `self.model_name` names into AudioBench's object `self`."""
    folder = Path(os.environ.get(MODEL_VARIABLE) or self.model_name)
    origin = find_model(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_model(origin, DTYPES[default_dtype(device)], device)
    longest = min(MAX_NEW_TOKENS, loaded.max_positions // 2)
    decoding = Decoding(longest, 1, batch_samples=16, batch_sec=480.0)
    self.model, self.processor = loaded.model, loaded.processor
    self.answerer = Answerer(loaded, Windows.of(origin, None, None), decoding)


def earshot_model_generation(self: Any, input: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Any:  # noqa: A002
    """Return the answer to one of AudioBench's samples, or a list of answers to a list of samples.

    Recordings longer than a window are transcribed in overlapping windows. No audio is truncated.

    Args:
        self: AudioBench's object, after `earshot_model_loader`.
        input: A sample or a list of samples. A sample has `audio` (with `array` and `sampling_rate`), `instruction` (in
            older versions `text`) and, in some datasets, `task_type`.

    Raises:
        ValueError: If a sample does not have this form, or is longer than the LLM can read.
    """
    samples = [input] if isinstance(input, Mapping) else list(input)
    answers = self.answerer([_question(str(i), sample) for i, sample in enumerate(samples)])
    for answer in answers:
        if isinstance(answer, SampleError):
            raise ValueError(str(answer))
    texts = [answer.hypothesis for answer in answers]
    return texts[0] if isinstance(input, Mapping) else texts


def _question(key: str, sample: Mapping[str, Any]) -> Question:
    instruction = next((sample[name] for name in _INSTRUCTION_KEYS if isinstance(sample.get(name), str)), None)
    audio = sample.get("audio")
    if instruction is None or not isinstance(audio, Mapping) or not {"array", "sampling_rate"} <= set(audio):
        raise ValueError(
            f"a sample with the keys {', '.join(map(str, sample))}: must have audio (array, sampling_rate) and "
            "instruction or text"
        )
    is_transcription = str(sample.get("task_type", "")).upper().startswith("ASR")
    clips = (_clip(audio["array"], audio["sampling_rate"]),)
    return Question(key, clips, {"instruction": instruction}, is_transcription)


def _clip(array: Any, rate: int) -> NDArray[np.float32]:
    wave = np.asarray(array, dtype=np.float32)
    wave = wave.mean(axis=-1 if wave.shape[-1] < wave.shape[0] else 0) if wave.ndim == 2 else wave
    if wave.ndim != 1 or len(wave) == 0 or not np.isfinite(wave).all():
        raise ValueError(f"audio of shape {np.shape(array)}: must be [T], T > 0, with finite values")
    return wave if rate == SAMPLE_RATE else np.asarray(soxr.resample(wave, rate, SAMPLE_RATE, quality="HQ"))
