"""The audio of samples as the model received it, in FLAC, which every browser plays."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence

import numpy as np
import soundfile
from numpy.typing import NDArray

from model.lengths import SAMPLE_RATE
from trainer.data.decode import decode_audio
from trainer.data.errors import SampleError
from trainer.data.stored import StoredData

_BATCH_SAMPLES = 32


def to_flac(clip: NDArray[np.float32]) -> str:
    """Encode a waveform `[T]` at 16 kHz as 16-bit FLAC in base64. Values beyond ±1 are clipped."""
    file = io.BytesIO()
    soundfile.write(file, np.clip(clip, -1.0, 1.0), SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return base64.b64encode(file.getvalue()).decode("ascii")


def read_clips(stored: StoredData, keys: Sequence[str]) -> Iterator[tuple[str, list[NDArray[np.float32]]]]:
    """Yield the key and the clips (`[T]` at 16 kHz) of each readable sample in `keys`, in order."""
    index_of = {item.key: index for index, item in enumerate(stored.items)}
    for start in range(0, len(keys), _BATCH_SAMPLES):
        part = keys[start : start + _BATCH_SAMPLES]
        for key, item in zip(part, stored.read([index_of[key] for key in part]), strict=True):
            try:
                if isinstance(item, SampleError):
                    raise item
                yield key, [decode_audio(file) for file in item[0]]
            except SampleError:
                continue  # The sample was readable when it was evaluated; the page omits its audio.
