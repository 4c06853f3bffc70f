"""Compare how well Whisper learns to recognize pieces of words with different numbers of CTC outputs and of pieces.

    earshot models whisper-base smollm2-135m --out models
    earshot spoken-text KIT runs/spoken
    KIT_DIR=KIT python -m bench.ctc_rate --spoken runs/spoken              all arms
    KIT_DIR=KIT python -m bench.ctc_rate --spoken runs/spoken --arm fast   one arm

Every arm trains the adapter, the CTC head and the two upper layers of Whisper base as in the first stage of the recipe
`finetune_kit`, but without augmentation, and only on sentences: synthetic ones, and half of those of the kit. It is
scored on the kit's dev split and on its other half of the training sentences, and on 60 synthetic sentences. The last
line is one JSON object.

Goal: with 10 outputs per second and 600 pieces (arm `slow`), more words are wrong than with 16.7 outputs per second
(arm `fast`), and than with 1,500 pieces (arm `longer`), which are longer, so that speech has fewer of them. If audio
tokens consist of two parts that share a head (arm `stacked`), there are at most 0.05 more errors per word than in the
arm `fast`.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench.ctc_head import recognize, word_error_rate
from bench.loader_corpus import KIT
from model.audio_tower import AudioTower
from model.batch import Ragged
from model.config import AdapterConfig, ModelConfig
from model.errors import UserError
from model.losses.ctc import CTC, ctc_feasible, ctc_sum
from model.pieces import Pieces
from tools.demo import read_jsonl
from trainer.config.load import load_recipe
from trainer.data.decode import decode_audio


class Arm(NamedTuple):
    """One of the compared settings."""

    adapter: AdapterConfig
    num_outputs: int
    """The number of CTC outputs per audio token."""
    num_pieces: int


ARMS = {
    "slow": Arm(AdapterConfig("stacking", strides=(5,), normalize=True), 1, 600),
    "longer": Arm(AdapterConfig("stacking", strides=(5,), normalize=True), 1, 1500),
    "fast": Arm(AdapterConfig("stacking", strides=(3,), normalize=True), 1, 600),
    "stacked": Arm(AdapterConfig("stacked_convolutions", strides=(3, 2), normalize=True), 2, 600),
}
"""The arms by name. They have 10, 10, 16.7 and 16.7 CTC outputs and 10, 10, 16.7 and 8.3 audio tokens per second."""
SENTENCES = ("timit_sample", "ljspeech")
BATCH_CLIPS, SHARE_OF_KIT, PEAK_RATE, ENCODER_RATE, WARMUP_STEPS = 32, 0.25, 1e-3, 1e-4, 20
MOST_ADDED_ERRORS = 0.05


@dataclass(frozen=True)
class Clip:
    """A recording and its transcript."""

    samples: Tensor
    text: str


def main() -> int:
    """Print the word error rates of every arm and, on the last line, one JSON object.

    Returns:
        0 if the goal is met, or if only one arm was run; 1 if it is missed; 2 after printing a UserError; 3 if the kit
        is missing.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spoken", type=Path, required=True, help="the folder that `earshot spoken-text` wrote")
    parser.add_argument("--arm", choices=ARMS, help="the arm to run (default: all)")
    parser.add_argument("--steps", type=int, default=120, help="number of training steps (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="keys of the recipe finetune_kit to change")
    options = parser.parse_args()
    if not (KIT / "asr.jsonl").is_file():
        print(json.dumps({"bench": "ctc_rate", "goal_met": None, "reason": f"no kit at {KIT}; set KIT_DIR"}))
        return 3
    try:
        model = load_recipe("finetune_kit", options.overrides).model
        source = tokenizer_of(model)
        kit, held_out, spoken = corpus(options.spoken)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = {}
    for arm in [options.arm] if options.arm else ARMS:
        start_sec, pieces = time.process_time(), Pieces(source, ARMS[arm].num_pieces)
        tower = train(arm, model, pieces, kit, spoken[:-60], options.steps)
        rates = {"kit": rate(tower, pieces, held_out), "synthetic": rate(tower, pieces, spoken[-60:])}
        found[arm] = rates
        shown = "  ".join(f"{name} {value:.3f}" for name, value in rates.items())
        print(f"{arm:8} WER: {shown}   {time.process_time() - start_sec:.0f} CPU seconds", flush=True)
    met = None
    if options.arm is None:
        met = all(
            max(found["fast"][name], found["longer"][name]) < found["slow"][name]
            and found["stacked"][name] <= found["fast"][name] + MOST_ADDED_ERRORS
            for name in ("kit", "synthetic")
        )
    print(json.dumps({"bench": "ctc_rate", "goal_met": met, "steps": options.steps, "wer": found}))
    return 1 if met is False else 0


def tokenizer_of(model: ModelConfig) -> str:
    """Return the description of the LLM's tokenizer, from which the pieces are taken.

    Raises:
        UserError: If the tokenizer has not been downloaded.
    """
    assert model.llm.weights is not None
    source = Path(model.llm.weights) / "tokenizer.json"
    if not source.is_file():
        raise UserError(f"{source}: no such file; run `earshot models whisper-base smollm2-135m --out models`")
    return source.read_text(encoding="utf-8")


def corpus(spoken: Path) -> tuple[list[Clip], list[Clip], list[Clip]]:
    """Return the sentences of the kit for training, those of the kit for scoring, and the synthetic sentences.

    Raises:
        UserError: If there are no synthetic sentences.
    """
    manifest = spoken / "spoken.jsonl"
    if not manifest.is_file():
        raise UserError(f"{manifest}: no such file; run `earshot spoken-text {KIT} {spoken}`")

    def clip(folder: Path, audio: str, text: str) -> Clip:
        return Clip(torch.from_numpy(decode_audio((folder / audio).read_bytes())), text)

    rows = [row for row in read_jsonl(KIT / "asr.jsonl") if row["subset"] in SENTENCES]
    train, dev = ([clip(KIT, r["audio"], r["answer"]) for r in rows if r["split"] == s] for s in ("train", "dev"))
    sentences = [row for row in read_jsonl(manifest) if row["subset"] == "sentences"]
    return train[::2], dev + train[1::2], [clip(spoken, r["audio"], r["answer"]) for r in sentences]


def train(
    arm: str, model: ModelConfig, pieces: Pieces, kit: Sequence[Clip], spoken: Sequence[Clip], steps: int
) -> AudioTower:
    """Train the audio side of one arm and return it."""
    torch.manual_seed(1)
    rng = random.Random(1)
    chosen = ARMS[arm]
    config = replace(
        model,
        adapter=chosen.adapter,
        ctc_outputs=chosen.num_outputs,
        ctc_pieces=chosen.num_pieces,
        ctc_feedback=False,
    )
    tower = AudioTower(config, llm_dim=8, vocab_size=1)
    learning = upper_layers(tower)
    optimizer = torch.optim.AdamW(
        [
            {"params": learning, "peak": ENCODER_RATE},
            {"params": [*tower.adapter.parameters(), *tower.head_of(CTC.name).parameters()], "peak": PEAK_RATE},
        ],
        betas=(0.9, 0.98),
    )
    batches: list[list[Clip]] = []
    for step in range(steps):
        if not batches:  # Clips of similar length form a batch, so that there is little padding.
            drawn = [rng.choice(kit if rng.random() < SHARE_OF_KIT else spoken) for _ in range(8 * BATCH_CLIPS)]
            drawn.sort(key=lambda clip: len(clip.samples))
            batches = [drawn[i : i + BATCH_CLIPS] for i in range(0, len(drawn), BATCH_CLIPS)]
            rng.shuffle(batches)
        factor = min(1.0, (step + 1) / WARMUP_STEPS) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = factor * group["peak"]
        logits, targets = outputs_of(tower, pieces, batches.pop())
        loss = ctc_sum(logits, targets) / len(targets.values)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
        optimizer.step()
    return tower.eval()


def upper_layers(tower: AudioTower) -> list[nn.Parameter]:
    """Freeze the encoder except its two upper layers and its last norm, and return their parameters."""
    assert tower.primary is not None
    tower.primary.requires_grad_(False)
    network: Any = tower.primary.encoder
    learning: list[nn.Parameter] = [*network.layers[-2:].parameters(), *network.layer_norm.parameters()]
    for parameter in learning:
        parameter.requires_grad_()
    return learning


def outputs_of(tower: AudioTower, pieces: Pieces, clips: Sequence[Clip]) -> tuple[Ragged, Ragged]:
    """Return the CTC outputs [ΣS, symbols + 1] and the symbols [ΣC] of clips.

    A clip with too few outputs for its symbols has none.
    """
    waves = Ragged(torch.cat([clip.samples for clip in clips]), tuple(len(clip.samples) for clip in clips))
    prompts = Ragged(torch.zeros(len(clips), dtype=torch.int64), (1,) * len(clips))
    head = tower(waves, prompts).heads[CTC.name]
    logits = head.values.reshape(-1, len(pieces) + 1)
    lengths = tuple(n * len(logits) // len(head.values) for n in head.lengths)
    symbols = [torch.tensor(pieces.encode(clip.text)) for clip in clips]
    none = torch.zeros(0, dtype=torch.int64)
    kept = [own if ctc_feasible(own, n) else none for own, n in zip(symbols, lengths, strict=True)]
    return Ragged(logits, lengths), Ragged.of(kept, like=none)


def rate(tower: AudioTower, pieces: Pieces, clips: Sequence[Clip]) -> float:
    """Return the word error rate of the CTC head."""
    with torch.no_grad():
        heard = [recognize(tower, pieces, clip.samples) for clip in clips]
    return word_error_rate([clip.text for clip in clips], heard)


if __name__ == "__main__":
    sys.exit(main())
