"""Create a small corpus of synthetic speech and sounds for five tasks, without any download.

    python -m tools.demo_corpus /tmp/corpus                 the corpus of `make demo`
    python -m tools.demo_corpus /tmp/corpus --scale 0.1     a tenth of the items

The command writes the manifest OUT/demo.jsonl, and its clips as 16 kHz FLAC files to OUT/audio. Speech is synthesized
by espeak-ng (PyPI package espeakng-loader), and sounds by NumPy. Splits have no speaker and no sound setting in common.
The same seed and scale always produce the same bytes.

espeak-ng has the licence GPL-3.0-or-later. It is an optional dependency that only this tool loads. Its licence does not
cover the speech that it synthesizes.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from model.errors import UserError
from model.lengths import SAMPLE_RATE
from tools.demo_sounds import SOUNDS, make_sound
from tools.espeak import Espeak, Prosody
from trainer.files import write_whole
from trainer.scoring.text import DIGIT_WORDS

Wave = NDArray[np.float32]

VERSION = 1
"""The version of the corpus. Increase it when the corpus changes, so that existing corpora are created again."""

COMMANDS = (
    "lights on",
    "lights off",
    "turn left",
    "turn right",
    "play music",
    "stop the music",
    "open the door",
    "close the door",
)
PHRASES = ("the train is here", "we leave at noon", "dinner is ready", "it is raining")
EMOTIONS = {"happy": (22, 95, 1.25), "neutral": (0, 45, 1.0), "sad": (-18, 8, 0.72)}
"""The pitch offset, the pitch range and the factor of the speaking rate for each emotion."""

TRANSCRIBE = "Transcribe the speech."
EMOTION = "How does the speaker feel?"
WHICH_SOUND = "Which sound is heard first?"
CAPTION = "Describe the audio."


@dataclass(frozen=True)
class Speaker:
    """The settings of the synthesizer for one speaker. The settings of each clip deviate from them slightly."""

    name: str
    voice: str
    """The name of espeak-ng's voice, optionally with a variant, such as `en-us+f3`."""
    pitch: int
    """The pitch, 0 to 99."""
    rate: int
    """The speaking rate in words per minute."""

    @staticmethod
    def of(voice: str, pitch: int, rate: int) -> Speaker:
        """Return a speaker whose name consists of the settings."""
        return Speaker(f"{voice}-p{pitch}-r{rate}", voice, pitch, rate)


SPEAKERS = {
    "train": (
        Speaker.of("en-us", 50, 165),
        Speaker.of("en-us+m1", 45, 160),
        Speaker.of("en-us+m2", 55, 175),
        Speaker.of("en-us+m4", 50, 150),
        Speaker.of("en-us+m5", 40, 165),
        Speaker.of("en-us+m7", 50, 180),
        Speaker.of("en-us+m8", 60, 170),
        Speaker.of("en-us+Gene", 50, 160),
        Speaker.of("en-us+f1", 45, 155),
        Speaker.of("en-us+linda", 40, 165),
        Speaker.of("en-us+belinda", 50, 170),
        Speaker.of("en-us+steph", 45, 160),
    ),
    "dev": (Speaker.of("en-us+m6", 45, 165),),
    "test": (Speaker.of("en-us+m3", 48, 162), Speaker.of("en-us+f4", 50, 168)),
}
"""The speakers of each split. No voice is in two splits.

Voices with breath are excluded, since espeak-ng synthesizes breath from unseeded noise.
"""

SOUND_SETTINGS = {"train": range(0, 40), "dev": range(100, 104), "test": range(200, 208)}
"""The values of `make_sound`'s argument `setting` in each split. Like speakers, they differ between splits."""

SIZES = {
    "train": {"digits": 400, "digit_strings": 500, "commands": 300, "sqa": 250, "er": 200, "aqa": 250, "ac": 200},
    "dev": {"digits": 6, "digit_strings": 10, "commands": 4, "sqa": 8, "er": 8, "aqa": 8, "ac": 8},
    "test": {"digits": 10, "digit_strings": 18, "commands": 12, "sqa": 10, "er": 10, "aqa": 10, "ac": 10},
}
"""The number of items of each kind in each split. The questions of `sqa` are about recordings of `digit_strings`."""


class _Corpus:
    """A writer of clips, with the manifest rows of the clips that were written."""

    def __init__(self, out: Path, seed: int, scale: float) -> None:
        self.rng = np.random.default_rng(seed)
        self.rows: list[dict[str, Any]] = []
        self._out, self._scale = out, scale
        self._espeak = Espeak()
        version = importlib.metadata.version("espeakng-loader")
        self._speech_source, self._sound_source = f"espeak-ng (espeakng-loader {version})", "numpy synthesis"
        self._num_clips = 0
        self._num_items: Counter[str] = Counter()

    def num(self, split: str, kind: str) -> int:
        """Return the number of items of a kind in a split, multiplied by the scale."""
        return max(1, round(SIZES[split][kind] * self._scale))

    def speaker(self, split: str) -> Speaker:
        """Return a random speaker of a split."""
        return SPEAKERS[split][int(self.rng.integers(len(SPEAKERS[split])))]

    def speak(self, split: str, text: str, speaker: Speaker, prosody: Prosody) -> dict[str, Any]:
        """Synthesize and write a clip of speech, and return the manifest fields of its file."""
        wave = soxr.resample(self._espeak.speak(text, speaker.voice, prosody), self._espeak.rate_hz, SAMPLE_RATE)
        return self._write(split, "speech", wave) | {"group": speaker.name, "source": self._speech_source}

    def sound(self, split: str, names: Sequence[str]) -> dict[str, Any]:
        """Synthesize and write a clip of consecutive sounds, and return the manifest fields of its file."""
        setting = int(self.rng.choice(SOUND_SETTINGS[split]))
        waves = [make_sound(name, setting, self.rng) for name in names]
        gap = np.zeros(SAMPLE_RATE // 10, np.float32)
        wave = np.concatenate([part for w in waves for part in (w, gap)][:-1])
        return self._write(split, "sounds", wave) | {"group": f"sounds-{setting:03d}", "source": self._sound_source}

    def add(self, task: str, split: str, clip: dict[str, Any], subset: str, **fields: Any) -> None:
        """Add a manifest row for a clip.

        Args:
            task: The task of the row.
            split: The split of the row.
            clip: The result of `speak` or `sound`.
            subset: The subset of the row.
            fields: Other fields of the row.
        """
        self._num_items[task] += 1
        head = {
            "id": f"demo-{task}-{self._num_items[task]:05d}",
            **clip,
            "task": task,
            "split": split,
            "subset": subset,
        }
        self.rows.append({**head, **fields, "label_kind": "original", "licence": "CC0-1.0 (made by this tool)"})

    def _write(self, split: str, kind: str, wave: Wave) -> dict[str, Any]:
        quiet = [np.zeros(int(n), np.float32) for n in self.rng.integers(800, 3200, 2)]
        wave = np.concatenate([quiet[0], wave.astype(np.float32) * self.rng.uniform(0.5, 0.9), quiet[1]])
        # Real recordings are never digitally silent. A model trained on digital silence could come to depend on it.
        wave = np.clip(wave + self.rng.normal(0, 5e-4, len(wave)), -1, 1).astype(np.float32)
        self._num_clips += 1
        name = f"audio/{kind}/{split}-{self._num_clips:05d}.flac"
        path = self._out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, wave, SAMPLE_RATE, subtype="PCM_16", compression_level=0.0)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        duration = round(len(wave) / SAMPLE_RATE, 4)
        return {"audio": name, "sampling_rate": SAMPLE_RATE, "channels": 1, "duration": duration, "sha256": digest}


def write_corpus(out: Path, seed: int = 0, scale: float = 1.0) -> Path:
    """Write the corpus, unless `out` already contains it.

    Args:
        out: The folder to write to. It must be new or empty, or contain a demo corpus.
        seed: The seed for all random choices.
        scale: The factor by which the number of items is multiplied.

    Returns:
        The path to the manifest.

    Raises:
        UserError: If espeakng-loader is not installed, or `out` contains other files.
    """
    manifest, stamp = out / "demo.jsonl", out / "corpus.json"
    wanted = {"version": VERSION, "seed": seed, "scale": scale}
    if stamp.exists() and manifest.exists() and json.loads(stamp.read_text()) == wanted:
        return manifest
    if out.exists() and any(out.iterdir()) and not stamp.exists():
        raise UserError(f"{out}: contains files that are not a demo corpus; use an empty or new folder")
    out.mkdir(parents=True, exist_ok=True)
    manifest.unlink(missing_ok=True)
    stamp.write_text(json.dumps(wanted) + "\n")
    corpus = _Corpus(out, seed, scale)
    for split in ("train", "dev", "test"):
        for make in (_make_speech, _make_emotions, _make_sounds):
            make(corpus, split)
    write_whole(manifest, ["".join(json.dumps(row) + "\n" for row in corpus.rows).encode()])
    return manifest


def _make_speech(corpus: _Corpus, split: str) -> None:
    """Add the items of the task `asr`, and items of the task `sqa` about the same digit strings."""
    rng, strings = corpus.rng, []
    for subset, text_of in _TEXTS.items():
        for i in range(corpus.num(split, subset)):
            speaker, text = corpus.speaker(split), text_of(rng, i)
            clip = corpus.speak(split, text, speaker, _varied(speaker, rng))
            corpus.add("asr", split, clip, subset, instruction=TRANSCRIBE, answer=text, answer_norm=text, language="en")
            if subset == "digit_strings":
                strings.append((clip, text.split()))
    for i in range(corpus.num(split, "sqa")):
        clip, words = strings[i % len(strings)]
        question, answer = (
            ("What is the first digit?", words[0]),
            ("What is the last digit?", words[-1]),
            ("How many digits are spoken?", DIGIT_WORDS[len(words)]),
        )[int(rng.integers(3))]
        fields = {"instruction": question, "answer": answer, "transcript": " ".join(words), "language": "en"}
        corpus.add("sqa", split, clip, "digit_strings", **fields)


def _make_emotions(corpus: _Corpus, split: str) -> None:
    for i in range(corpus.num(split, "er")):
        emotion = list(EMOTIONS)[i % len(EMOTIONS)]
        speaker = corpus.speaker(split)
        phrase = PHRASES[int(corpus.rng.integers(len(PHRASES)))]
        clip = corpus.speak(split, phrase, speaker, _varied(speaker, corpus.rng, emotion))
        fields = {"instruction": EMOTION, "answer": emotion, "choices": sorted(EMOTIONS), "language": "en"}
        corpus.add("er", split, clip, "prosody", **fields)


def _make_sounds(corpus: _Corpus, split: str) -> None:
    """Add the items of the tasks `aqa` and `ac`."""
    rng, names = corpus.rng, list(SOUNDS)
    for i in range(corpus.num(split, "aqa")):
        first, other = rng.permutation(names)[:2]
        clip = corpus.sound(split, [first, other] if rng.random() < 0.3 else [first])
        if i % 2:
            choices = sorted(SOUNDS[name] for name in names)
            fields = {"instruction": WHICH_SOUND, "answer": SOUNDS[first], "qtype": "first", "choices": choices}
        else:
            # The absent sound is neither `first` nor `other`, so "no" is also correct for clips with two sounds.
            present = i % 4 == 0
            asked = first if present else rng.choice([n for n in names if n not in (first, other)])
            question = f"Is there {SOUNDS[asked]}? Answer yes or no."
            fields = {"instruction": question, "answer": "yes" if present else "no", "qtype": "yesno"}
            fields["choices"] = ["yes", "no"]
        corpus.add("aqa", split, clip, "sounds", label=str(first), **fields)
    for _ in range(corpus.num(split, "ac")):
        drawn = [str(n) for n in rng.permutation(names)[: 2 if rng.random() < 0.3 else 1]]
        clip = corpus.sound(split, drawn)
        captions = _captions([SOUNDS[name] for name in drawn])
        fields = {"instruction": CAPTION, "answer": captions[0], "references": captions}
        corpus.add("ac", split, clip, "sounds", label="+".join(drawn), **fields)


def _captions(nouns: Sequence[str]) -> list[str]:
    if len(nouns) == 1:
        return [f"There is {nouns[0]}.", f"{nouns[0].capitalize()} is heard."]
    first, second = nouns
    return [f"There is {first}, then {second}.", f"{first.capitalize()} is heard, then {second}."]


def _digit_string(rng: np.random.Generator, i: int) -> str:
    return " ".join(DIGIT_WORDS[d] for d in rng.integers(0, 10, rng.integers(2, 5)))


_TEXTS: dict[str, Callable[[np.random.Generator, int], str]] = {
    "digits": lambda rng, i: DIGIT_WORDS[i % 10],
    "digit_strings": _digit_string,
    "commands": lambda rng, i: COMMANDS[i % len(COMMANDS)],
}


def _varied(speaker: Speaker, rng: np.random.Generator, emotion: str = "neutral") -> Prosody:
    """Return the speaker's prosody for `emotion`, with a small random variation."""
    offset, pitch_range, factor = EMOTIONS[emotion]
    return Prosody(
        pitch=int(np.clip(speaker.pitch + offset + rng.integers(-4, 5), 0, 99)),
        pitch_range=int(np.clip(pitch_range + rng.integers(-4, 5), 0, 99)),
        rate_wpm=round(speaker.rate * factor * rng.uniform(0.94, 1.06)),
        word_gap=int(rng.integers(0, 6)),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code: 2 after printing a UserError, else 0.
    """
    parser = argparse.ArgumentParser(
        prog="python -m tools.demo_corpus", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="new or empty folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="seed for all random choices (default: 0)")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="factor by which the number of items is multiplied (default: 1)"
    )
    options = parser.parse_args(arguments)
    print(f"{options.out}: synthesizing speech and sounds", file=sys.stderr, flush=True)
    try:
        manifest = write_corpus(options.out, options.seed, options.scale)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    hours = sum({row["audio"]: row["duration"] for row in rows}.values()) / 3600
    print(f"{manifest}: {len(rows)} items, {hours:.2f} h of audio")
    return 0


if __name__ == "__main__":
    sys.exit(main())
