"""Measure the word error rate of a run's CTC head, without the LLM, next to that of the LLM's answers.

    python -m bench.ctc_head runs/finetune_kit --manifest KIT/asr.jsonl --split test

The CTC head must recognize pieces (`model.ctc_vocabulary: pieces`). The most probable symbol of every output is taken,
repeated symbols are merged, and blanks are removed. The predictions of the run's last evaluation of the split are the
answers of the LLM.

Goal: on no subset does the LLM have more than 0.05 more errors per word than the CTC head, whose output it reads.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from model.audio_tower import AudioTower
from model.batch import Ragged
from model.errors import UserError
from model.losses.ctc import CTC
from model.pieces import Pieces
from tools.demo import last_predictions, read_jsonl
from trainer.data.decode import decode_audio
from trainer.data.tokenizer import load_tokenizer
from trainer.expert_usage.forward import load_tower, open_checkpoint
from trainer.expert_usage.history import find_run
from trainer.scoring.asr import edits
from trainer.scoring.text import normalise

MOST_ADDED_ERRORS = 0.05


def main() -> int:
    """Print the word error rates by subset and, on the last line, one JSON object.

    Returns:
        0 if the goal is met, else 1; 2 after printing a UserError.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a run, or one of its checkpoints")
    parser.add_argument("--manifest", type=Path, required=True, help="a manifest with the task asr")
    parser.add_argument("--split", default="test", help="the split to recognize (default: %(default)s)")
    options = parser.parse_args()
    try:
        found = measure(options.run, options.manifest, options.split)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for subset, (head, llm) in found.items():
        print(f"{subset:16} CTC head {head:.3f}   LLM {'-' if llm is None else f'{llm:.3f}'}")
    added = [llm - head for head, llm in found.values() if llm is not None]
    is_met = bool(added) and max(added) <= MOST_ADDED_ERRORS
    print(json.dumps({"bench": "ctc_head", "goal_met": is_met, "wer": {k: list(v) for k, v in found.items()}}))
    return 0 if is_met else 1


@torch.no_grad()
def measure(run: Path, manifest: Path, split: str) -> dict[str, tuple[float, float | None]]:
    """Return the word error rates of the CTC head and of the LLM by subset.

    The rate of the LLM is None if it has not answered all samples of the subset.

    Raises:
        UserError: If the run has no usable checkpoint or no predictions, or its CTC head does not recognize pieces.
    """
    where = find_run(run)
    reader, recipe = open_checkpoint(where)
    if recipe.model.num_pieces is None:
        raise UserError(f"{run}: model.ctc_vocabulary = {recipe.model.ctc_vocabulary}: the bench needs pieces")
    tower = load_tower(recipe.model, reader, recipe.lora)
    tokenizer = load_tokenizer(str(recipe.data.tokenizer.path), recipe.data.tokenizer)
    pieces = tokenizer.pieces(recipe.model.num_pieces)
    answers = {row["key"]: row["hypothesis"] for row in read_jsonl(last_predictions(where.run_dir, split))}
    by_subset: defaultdict[str, list[tuple[str, str, str | None]]] = defaultdict(list)
    for row in read_jsonl(manifest):
        if row["split"] == split and row["task"] == "asr":
            samples = torch.from_numpy(decode_audio((manifest.parent / row["audio"]).read_bytes()))
            text = recognize(tower, pieces, samples)
            by_subset[row["subset"]].append((row["answer"], text, answers.get(row["id"])))
    found: dict[str, tuple[float, float | None]] = {}
    for subset, triples in by_subset.items():
        wanted, heard, answered = zip(*triples, strict=True)
        known = [text for text in answered if text is not None]
        found[subset] = (
            word_error_rate(wanted, heard),
            word_error_rate(wanted, known) if len(known) == len(wanted) else None,
        )
    return found


def recognize(tower: AudioTower, pieces: Pieces, samples: Tensor) -> str:
    """Return the text that the CTC head recognizes in a clip [T]."""
    clip = samples.to(next(tower.parameters()).device)
    output = tower(Ragged(clip, (len(clip),)), Ragged(torch.zeros(1, dtype=torch.int64, device=clip.device), (1,)))
    symbols = output.heads[CTC.name].values.view(-1, len(pieces) + 1).argmax(-1).tolist()
    return pieces.decode([symbol for symbol, _ in groupby(symbols) if symbol < len(pieces)])


def word_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Return the errors per word of all hypotheses together, after normalization."""
    counts = edits([normalise(text) for text in references], [normalise(text) for text in hypotheses])
    hits, substitutions, deletions, insertions = counts.sum(0)
    return float((substitutions + deletions + insertions) / (hits + substitutions + deletions))


if __name__ == "__main__":
    sys.exit(main())
