"""Audio for a page: what the model heard, in a form that every browser plays."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence

import numpy as np
import soundfile
from numpy.typing import NDArray

from model.lengths import SAMPLE_RATE
from trainer.data.decode import SampleError, decode_audio
from trainer.data.stored import StoredData

_AT_ONCE = 32


def to_flac(clip: NDArray[np.float32]) -> str:
    """`[T]` at 16 kHz as 16-bit FLAC, in base64; values beyond ±1 are limited."""
    file = io.BytesIO()
    soundfile.write(file, np.clip(clip, -1.0, 1.0), SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return base64.b64encode(file.getvalue()).decode("ascii")


def read_clips(stored: StoredData, keys: Sequence[str]) -> Iterator[tuple[str, list[NDArray[np.float32]]]]:
    """(key, clips) of each of `keys` that can still be read, in that order."""
    place_of = {item.key: place for place, item in enumerate(stored.items)}
    for start in range(0, len(keys), _AT_ONCE):
        part = keys[start : start + _AT_ONCE]
        for key, item in zip(part, stored.read([place_of[key] for key in part]), strict=True):
            try:
                if isinstance(item, SampleError):
                    raise item
                yield key, [decode_audio(file) for file in item[0]]
            except SampleError:
                continue  # it has an answer, so it could be read a moment ago; the page does without
