"""Synthesize speech from the texts of the kit, as additional training data for speech recognition.

earshot spoken-text KIT OUT

KIT is the folder of the kit, a set of small public recordings. The texts are sentences from the captions and the novel
in KIT/text, and random digit strings. The command writes the folder OUT, which can be used as `data.root`, with the
manifest spoken.jsonl. The voices come from espeak-ng. If flite is installed (`apt-get install flite`), its voices are
used as well; they were made from recordings of people. Sentences of the kit's dev and test splits are excluded.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from model.errors import UserError
from model.lengths import SAMPLE_RATE
from tools.espeak import Espeak, Prosody
from trainer.scoring.text import DIGIT_WORDS

NUM_SENTENCES, NUM_DIGIT_STRINGS = 6000, 1500
REPORT_EVERY = 1000
MANIFEST = "spoken.jsonl"
FLITE_VOICES = ("slt", "rms", "awb", "kal16")
ESPEAK_VOICES = tuple(
    f"en-us{variant}" for variant in ("", "+m1", "+m2", "+m3", "+m4", "+m5", "+f1", "+f2", "+f3", "+f4")
)
INSTRUCTIONS = (
    "Transcribe the speech in this recording.",
    "Write a transcript of this audio clip.",
    "Please convert the spoken audio to text.",
    "What does the speaker say? Write down the exact words.",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code: 2 after printing a UserError, else 0.
    """
    parser = argparse.ArgumentParser(
        prog="earshot spoken-text", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kit", type=Path, help="the folder of the kit")
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument(
        "--sentences", type=int, default=NUM_SENTENCES, metavar="N", help="number of sentences (default: %(default)s)"
    )
    parser.add_argument(
        "--digits",
        type=int,
        default=NUM_DIGIT_STRINGS,
        metavar="N",
        help="number of digit strings (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="seed for texts and voices (default: 1)")
    options = parser.parse_args(arguments)
    try:
        seconds = write(options.kit, options.out, options.sentences, options.digits, options.seed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.out / MANIFEST}: {seconds / 60:.0f} minutes of speech")
    return 0


def write(
    kit: Path, out: Path, num_sentences: int = NUM_SENTENCES, num_digits: int = NUM_DIGIT_STRINGS, seed: int = 1
) -> float:
    """Write the recordings and the manifest, and return the total duration of the recordings in seconds.

    Raises:
        UserError: If the kit has no texts, or espeakng-loader is not installed.
    """
    rng = random.Random(seed)
    found = sentences(kit)
    rng.shuffle(found)
    texts = [("sentences", text) for text in found[:num_sentences]]
    texts += [
        ("digits", " ".join(rng.choices(DIGIT_WORDS, k=rng.choice((1, 1, 1, 2, 3, 4, 5))))) for _ in range(num_digits)
    ]
    speaker = Speaker(rng)
    (out / "audio").mkdir(parents=True, exist_ok=True)
    seconds = 0.0
    lines = []
    for i, (subset, text) in enumerate(texts):
        if i and i % REPORT_EVERY == 0:
            print(f"{i:,} of {len(texts):,} texts have been synthesized", flush=True)
        voice, samples = speaker.speak(text)
        name = f"audio/{i:05}.flac"
        soundfile.write(out / name, samples, SAMPLE_RATE)
        seconds += len(samples) / SAMPLE_RATE
        lines.append(json.dumps(row(f"spoken-{i:05}", name, subset, text, voice, len(samples), rng)))
    (out / MANIFEST).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return seconds


def row(
    name: str, audio: str, subset: str, text: str, voice: str, num_samples: int, rng: random.Random
) -> dict[str, Any]:
    """Return a manifest row (docs/data.md)."""
    return {
        "id": name,
        "audio": audio,
        "sampling_rate": SAMPLE_RATE,
        "channels": 1,
        "duration": round(num_samples / SAMPLE_RATE, 3),
        "task": "asr",
        "split": "train",
        "subset": subset,
        "instruction": rng.choice(INSTRUCTIONS),
        "answer": text,
        "group": voice,
        "language": "en",
    }


def sentences(kit: Path) -> list[str]:
    """Return the sorted sentences and clauses of 3 to 14 words in the kit's texts, except those of its dev and test
    splits.

    Raises:
        UserError: If the kit has no texts.
    """
    texts = kit / "text"
    book = texts / "botchan.txt"
    if not book.is_file():
        raise UserError(f"{book}: no such file; KIT must be the kit's folder, with a subfolder named text")
    found = set()
    for table in sorted(texts.glob("audiocaps_*.csv")):
        with table.open(encoding="utf-8", newline="") as lines:
            found |= {_as_sentence(line["caption"]) for line in csv.DictReader(lines)}
    for sentence in re.split(r"(?<=[.!?])[\"”]?\s+", " ".join(book.read_text(encoding="utf-8-sig").split())):
        parts = [sentence] if len(sentence.split()) <= 14 else re.split(r"(?<=[,;:])\s+", sentence)
        found |= {_as_sentence(part) for part in parts}
    held_out = _held_out(kit)
    return sorted(
        text
        for text in found
        if re.fullmatch(r"[A-Za-z][A-Za-z ,.'?!-]+", text)
        and 3 <= len(text.split()) <= 14
        and _letters(text) not in held_out
    )


def _as_sentence(text: str) -> str:
    text = text.strip(" \"'“”‘’_,;:()-").replace("’", "'")
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "?", "!")) else text + "."


def _letters(text: str) -> str:
    return re.sub(r"[^a-z]", "", text.lower())


def _held_out(kit: Path) -> set[str]:
    """Return the answers of the dev and test splits, reduced to their letters."""
    rows = [json.loads(line) for path in sorted(kit.glob("*.jsonl")) for line in path.read_text("utf-8").splitlines()]
    return {_letters(row["answer"]) for row in rows if row["split"] != "train"}


class Speaker:
    """A synthesizer that speaks texts with random voices.

    Args:
        rng: The generator from which the voices and their prosody are drawn.
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._espeak = Espeak()
        self._flite = shutil.which("flite")

    def speak(self, text: str) -> tuple[str, NDArray[np.float32]]:
        """Return the name of the voice, and the waveform [samples] at SAMPLE_RATE."""
        if self._flite is not None and self._rng.random() < 0.7:
            voice = self._rng.choice(FLITE_VOICES)
            samples, rate_hz = _speak_with_flite(self._flite, text, voice, self._rng.uniform(0.8, 1.15))
            voice = f"flite-{voice}"
        else:
            voice = self._rng.choice(ESPEAK_VOICES)
            prosody = Prosody(self._rng.randint(30, 70), self._rng.randint(30, 70), self._rng.randint(140, 200))
            samples = np.asarray(self._espeak.speak(text, voice, prosody), dtype=np.float32)
            rate_hz, voice = self._espeak.rate_hz, f"espeak-{voice}"
        samples = np.asarray(soxr.resample(samples, rate_hz, SAMPLE_RATE), dtype=np.float32)
        return voice, samples * np.float32(0.5 / max(1e-6, float(np.abs(samples).max())))


def _speak_with_flite(flite: str, text: str, voice: str, stretch: float) -> tuple[NDArray[np.float32], int]:
    """Return a waveform [samples] and its sampling rate in Hz."""
    command = [flite, "-voice", voice, "--setf", f"duration_stretch={stretch:.2f}", "-t", text, "-o", "/dev/stdout"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    samples, rate_hz = soundfile.read(io.BytesIO(done.stdout), dtype="float32")
    return samples, rate_hz


if __name__ == "__main__":
    sys.exit(main())
