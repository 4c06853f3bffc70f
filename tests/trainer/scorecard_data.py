"""Constructed predictions and sounds of four tasks in two languages, with a name that contains HTML."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from trainer.evaluation.predictions import Prediction
from trainer.evaluation.scorecard.card import make_card

HOSTILE = "</script><img src=x onerror=alert(1)>"
ASR = (
    ("one two three", "one two tree", "digits", "en", 1.2),
    ("four five", "four five", "digits", "en", 0.8),
    ("the cat sat on the mat", "the cat on a the mat", "sentences", "en", 3.4),
    ("ala ma kota", "ala na kota", HOSTILE, "pl", 2.5),
    ("a long recording of many words", "a long recording of many words", "sentences", "en", 41.0),
)
EMOTIONS = ("angry", "happy", "sad")
SAID = ("angry", "happy", "happy", "sad", "", "sad", "I think it is sad")


def make_predictions() -> list[Prediction]:
    """Return 17 predictions whose scores are known."""
    found = []
    for i, (reference, said, subset, language, seconds) in enumerate(ASR):
        meta = {"task": "asr", "answer": reference, "subset": subset, "language": language, "source": "made"}
        meta["instruction"] = "Transcribe."
        found.append(Prediction(f"asr-{i}", said, True, seconds, meta, 2 if seconds > 30 else 1))
    for i, said in enumerate(SAID):
        meta = {"task": "er", "answer": EMOTIONS[i % 3], "choices": list(EMOTIONS), "subset": "stage", "language": "en"}
        found.append(Prediction(f"er-{i}", said, i != 4, 2.0 + i, {**meta, "instruction": "Which emotion?"}))
    for i, said in enumerate(("a dog barks", "rain falls")):
        meta = {"task": "ac", "answer": "A dog barks.", "references": ["A dog barks.", "Barking."], "subset": "esc"}
        found.append(Prediction(f"ac-{i}", said, True, 5.0, {**meta, "instruction": "Caption this."}))
    for i, said in enumerate(("on monday", "tuesday", "no idea")):
        meta = {"task": "sqa", "answer": "on monday", "subset": "facts", "instruction": "When?", "language": "en"}
        found.append(Prediction(f"sqa-{i}", said, True, 4.0, meta))
    return found


def tones(keys: Sequence[str]) -> Iterator[tuple[str, list[Any]]]:
    """Yield each key with a tone of one second."""
    time_sec = np.arange(16000) / 16000
    for i, key in enumerate(keys):
        yield key, [(0.3 * np.sin(2 * np.pi * (220 + 40 * i) * time_sec)).astype(np.float32)]


def make_tree(audio_bytes: int = 4 << 20) -> dict[str, Any]:
    """Return the scorecard of `make_predictions`, without METEOR."""
    about = {"model": "none", "data": HOSTILE}
    return make_card(f"made up {HOSTILE}", about, make_predictions(), ["broken", "broken"], None, tones, audio_bytes)
