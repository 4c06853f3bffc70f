"""The data of two large reports: a scorecard, and the usage of eight encoder experts. Both have long names."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from tests.trainer.scorecard_data import tones
from trainer.evaluation.predictions import Prediction
from trainer.evaluation.scorecard.card import make_card

WORDS = "the quick brown fox jumps over a lazy dog while several other animals watch from behind the old fence".split()
CHOICES = ("dog barking", "church bells", "hand saw", "crackling fire", "sea waves", "rain", "crying baby")
EMOTIONS = ("angry", "happy", "neutral", "sad", "surprised")
ENCODERS = (
    "hubert_large_ll60k",
    "wavlm_base_plus",
    "whisper_tiny",
    "whisper_base_en",
    "data2vec",
    "ast",
    "beats",
    "mert",
)
LONG = "a_very_long_name_of_a_subset_that_somebody_generated_from_a_path_without_any_space_in_it"


def large_card() -> dict[str, Any]:
    """Return a scorecard of 60 samples, with five tasks and four languages."""
    rng = random.Random(3)
    found = []
    for i in range(60):
        task = ("asr", "er", "aqa", "sqa", "ac")[i % 5]
        words = rng.choices(WORDS, k=rng.randint(3, 24))
        said = [w if rng.random() > 0.2 else rng.choice(WORDS) for w in words]
        answer, reply, choices = " ".join(words), " ".join(said), None
        if task in ("er", "aqa"):
            choices = EMOTIONS if task == "er" else CHOICES
            answer, reply = rng.choice(choices), rng.choice(choices)
        meta = {"task": task, "answer": answer, "subset": rng.choice(("digits", "stage", LONG)), "source": "kit"}
        meta |= {"language": rng.choice(("en", "pl", "de", "fr")), "instruction": f"What is it? {' '.join(words[:6])}"}
        meta |= {"choices": list(choices)} if choices else {}
        key = f"{LONG}/{i:06d}" if i % 7 == 0 else f"{task}-{i}"
        found.append(Prediction(key, reply, True, rng.uniform(0.5, 40), meta))
    about = {"model": "asr/large-run/checkpoints/step-00012000", "data": f"s3://bucket/{LONG}/test.jsonl, split test"}
    about |= {"decoding": "greedy, at most 64 tokens, bf16", "long speech": "windows of 30 s that overlap by 5 s"}
    return make_card(f"{LONG} on test.jsonl, test", about, found, ["broken", "too_long"], None, tones, 1 << 20)


def large_usage(folder: Path) -> dict[str, Any]:
    """Return the usage of eight encoder experts by five tasks, for a run on 64 ranks."""
    rng = random.Random(4)
    num = len(ENCODERS)

    def shares() -> list[float]:
        weights = [rng.random() ** 2 for _ in range(num)]
        return [w / sum(weights) for w in weights]

    cells = []
    for task in ("asr", "er", "aqa", "sqa", "ac"):
        for language in ("en", "pl", "de"):
            for band in ("0-1 s", "1-2 s", "2-5 s", "5-10 s"):
                clips, parts = rng.randint(5, 60), shares()
                routed = [round(clips * p) for p in parts]
                cell = {"task": task, "language": language, "source": rng.choice(("kit", LONG)), "band": band}
                cell |= {"num_clips": clips, "audio_sec": clips * 3.0, "routed_clips": routed}
                cell |= {"routed_sec": [3.0 * r for r in routed], "entropy": [0.5, 0.9]}
                cells.append(
                    {**cell, "probs": [[clips * p for p in parts]] * 2, "weights": [[clips * p for p in parts]] * 2}
                )
    tasks = ("all", "asr", "er", "aqa", "sqa", "ac")
    windows = [
        {
            "first_step": 100 * i,
            "last_step": 100 * i + 99,
            "tasks": {t: {"num_clips": 100, "routed_clips": [round(100 * p) for p in shares()]} for t in tasks},
        }
        for i in range(12)
    ]
    names = ("whisper_large_v3", *ENCODERS)
    cost = {"compute_sec": 0.1, "compute_sec_max": 0.2, "wait_sec": 0.01, "sent_bytes": 1e6, "received_bytes": 2e6}
    time = {
        "num_steps": 1200,
        "step_sec": 1.5,
        "num_ranks": 64,
        "lost_sec": 0.1,
        "lost_share": 0.07,
        "imbalance": 1.4,
        "mean_sec": 0.8,
        "encoders": {n: {**cost, "sec_per_audio_sec": 0.004} for n in names},
        "compute_sec_by_rank": {n: [rng.uniform(0.05, 0.15) for _ in range(64)] for n in names},
        "wait_sec_by_rank": [rng.uniform(0, 0.3) for _ in range(64)],
    }
    placed = {"ep": 4, "slots": [list(ENCODERS[i::4]) for i in range(4)], "slot_sec": [0.4, 0.3, 0.5, 0.2]}
    placed |= {"slowest_sec": 0.5, "imbalance": 1.3}
    placement = {"num_ranks": 64, "ep": 4, "current": placed, "suggested": placed, "others": [placed]}
    return {
        "run": LONG,
        "origin": f"{folder}/expert_load.jsonl, steps 0 to 1199",
        "primary": "whisper_large_v3",
        "experts": list(ENCODERS),
        "gates": ["data_independent", "data_dependent"],
        "cells": cells,
        "windows": windows,
        "drift": dict.fromkeys(tasks, 0.23),
        "dead": ["mert"],
        "last_used_step": {"mert": 311},
        "skipped": {"broken": 2},
        "imbalance": 1.4,
        "time": time,
        "placement": {**placement, "saved_sec": 0.02, "saved_share": 0.01},
    }
