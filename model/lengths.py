"""Seconds → samples → frames → LLM slots. The only home of this arithmetic.

Every encoder of this project reports one frame per 20 ms (50 Hz): Whisper's two stride-1/2 convolutions over 10 ms mel
frames count ceil, the convolution stacks of HuBERT and WavLM count floor (their last frame is repeated to fill up).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Count = TypeVar("Count", int, NDArray[np.int64])

SAMPLE_RATE = 16_000
FRAME_SAMPLES = 320


def num_samples(seconds: float) -> int:
    """Samples in `seconds` of 16 kHz audio, rounded to the nearest."""
    return round(seconds * SAMPLE_RATE)


def num_frames(samples: Count) -> Count:
    """Encoder frames (20 ms) that cover `samples` (one number or an array): the last one may be partly filled."""
    return -(-samples // FRAME_SAMPLES)


def num_audio_tokens(frames: int, strides: tuple[int, ...]) -> int:
    """LLM positions that `frames` take after an adapter with these strides: ceil at every layer."""
    for stride in strides:
        frames = -(-frames // stride)
    return frames


def audio_tokens_of_samples(samples: int, strides: tuple[int, ...]) -> int:
    """LLM positions that a clip of `samples` takes."""
    return num_audio_tokens(num_frames(samples), strides)


@dataclass(frozen=True)
class Windowing:
    """How an encoder cuts clips into windows, and how long it computes them: what one of its calls costs.

    All windows of a call are padded to one length, so a call computes (number of windows) · (longest one, padded).
    """

    window_samples: int
    """Longer clips are encoded in consecutive windows of this length."""
    least_samples: int = 1
    """A shorter window is padded to this length before anything is computed."""
    silence_samples: int = 0
    """Silence that is appended to every window, as far as `window_samples` has room for it."""

    def num_windows(self, samples: int) -> int:
        """Number of windows that a clip of `samples` is cut into."""
        return -(-samples // self.window_samples)

    def padded_samples(self, samples: int) -> int:
        """Length at which the longest window of a clip of `samples` is computed, alone in its call."""
        return max(self.least_samples, min(samples + self.silence_samples, self.window_samples))

    def computed_samples(self, clips: Sequence[int]) -> int:
        """Padded audio samples that one call with clips of these lengths computes."""
        return sum(map(self.num_windows, clips)) * max(map(self.padded_samples, clips), default=0)


WHOLE = Windowing(window_samples=1 << 62)
"""Clips as they are: never cut, padded only to the longest one of a call."""
