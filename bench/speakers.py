"""Measure the effect of augmentation and loudness normalization on a new speaker, without the test split.

    python -m bench.speakers [--steps 600] [--seeds 1]

The kit (a set of small public recordings, in the folder KIT_DIR) has recordings of digits from only a few speakers, so
the effect on a new speaker can only be measured by cross-validation. A small Whisper encoder with mean pooling and a
linear layer is trained on the ten digits of all speakers in the train and dev splits except one, and evaluated on the
held-out speaker. This is repeated for each speaker and each variant (*arm*). The arms differ in `do_normalize` and in
`data.augment`. They have the same initial weights, and the same clips in the same order. The result is the error rate
by arm and speaker. There is no goal. The five arms take about 15 minutes on one core. The exit code is 3 without the
kit.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from bench.loader_corpus import KIT
from model.batch import Ragged
from model.config import EncoderConfig
from model.encoders.registry import build_encoder
from trainer.data.augment import augment
from trainer.data.config import AugmentConfig
from trainer.data.decode import decode_audio

WIDTH, BATCH, LEARNING_RATE, WARMUP_STEPS = 128, 32, 1e-3, 20
CHANGES: dict[str, Any] = {"speed": 0.2, "num_time_masks": 2, "num_freq_masks": 2, "freq_mask_hz": 800}
ARMS = {
    "as recorded": (False, {}),
    "as recorded, augmented, noise": (False, CHANGES | {"gain_db": 10, "noise_snr_db": 15}),
    "equal loudness": (True, {}),
    "equal loudness, augmented": (True, CHANGES),
    "equal loudness, augmented, noise": (True, CHANGES | {"noise_snr_db": 15}),
}
"""The value of `do_normalize` and the settings of `data.augment` of each arm, by name."""

Clip = tuple[NDArray[np.float32], int]


@dataclass(frozen=True)
class Arm:
    """The processing of the recordings in one arm."""

    equal_loudness: bool
    changes: AugmentConfig


class Classifier(nn.Module):
    """A classifier of digits, which maps the mean over a Whisper encoder's frames to ten scores."""

    def __init__(self, equal_loudness: bool) -> None:
        super().__init__()
        shape = {"d_model": WIDTH, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 256}
        config = shape | {"init_std": 0.1, "do_normalize": equal_loudness}
        self.encoder = build_encoder(EncoderConfig("ear", "whisper", config=config, length_mode="trim"))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, clips: Sequence[NDArray[np.float32]]) -> Tensor:
        """Return the scores [B, 10] of B clips."""
        features = self.encoder(Ragged.of([torch.from_numpy(c) for c in clips])).split()
        return self.head(torch.stack([f.mean(0) for f in features]))


def speakers() -> dict[str, list[Clip]]:
    """Return the clips of single digits in the train and dev splits with their labels, by speaker."""
    rows = [json.loads(line) for line in (KIT / "asr.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [r for r in rows if r["subset"] == "digits" and r["split"] != "test"]
    words = sorted({r["answer_norm"] for r in rows})
    found: dict[str, list[Clip]] = {}
    for r in rows:
        clip = decode_audio((KIT / r["audio"]).read_bytes())
        found.setdefault(r["group"], []).append((clip, words.index(r["answer_norm"])))
    return found


def error_rate(train: Sequence[Clip], asked: Sequence[Clip], arm: Arm, steps: int, seed: int) -> float:
    """Train on `train`, and return the error rate on `asked`. Augmentation begins after a tenth of the steps."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = Classifier(arm.equal_loudness)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1.0, (i + 1) / WARMUP_STEPS) * (0.5 + 0.5 * math.cos(math.pi * i / steps))
    )
    for step in range(steps):
        drawn = [train[i] for i in rng.integers(0, len(train), BATCH)]
        strength = float(step > steps / 10 and arm.changes.enabled)
        scores = model([augment(clip, arm.changes, strength, rng) for clip, _ in drawn])
        optimizer.zero_grad()
        F.cross_entropy(scores, torch.tensor([label for _, label in drawn])).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        said = model([clip for clip, _ in asked]).argmax(1)
    return float((said != torch.tensor([label for _, label in asked])).float().mean())


def main() -> int:
    """Run the benchmark, and return the exit code: 0, or 3 without the kit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    if not KIT.is_dir():
        print(f"no kit at {KIT}: set KIT_DIR", file=sys.stderr)
        return 3
    torch.set_num_threads(1)
    clips = speakers()
    print(f"{'error rate for digits of the held-out speaker':44}" + "".join(f"{s:>16}" for s in clips) + f"{'mean':>8}")
    results: dict[str, Any] = {}
    for name, (equal_loudness, changes) in ARMS.items():
        arm = Arm(equal_loudness, AugmentConfig(**changes))
        rates = {
            speaker: [
                error_rate(
                    [c for s, own in clips.items() if s != speaker for c in own], asked, arm, options.steps, seed
                )
                for seed in range(options.seeds)
            ]
            for speaker, asked in clips.items()
        }
        means = {speaker: sum(r) / len(r) for speaker, r in rates.items()}
        mean = sum(means.values()) / len(means)
        print(f"{name:44}" + "".join(f"{m:16.3f}" for m in means.values()) + f"{mean:8.3f}", flush=True)
        results[name] = {"rates": rates, "mean": mean}
    print(json.dumps({"steps": options.steps, "seeds": options.seeds, "results": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
