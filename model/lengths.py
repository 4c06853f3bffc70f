"""The conversion of seconds to audio samples, frames and audio tokens. It is done nowhere else.

Every encoder of this project returns one frame per 20 ms (50 Hz). Whisper's convolutions over mel frames of 10 ms round
their number up. The convolution stacks of HuBERT and WavLM round it down, and their last frame is then repeated.
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
    """Return the number of samples in `seconds` of 16 kHz audio, rounded to the nearest."""
    return round(seconds * SAMPLE_RATE)


def num_frames(samples: Count) -> Count:
    """Return the number of encoder frames (20 ms) that cover `samples`, one number or an array, rounded up."""
    return -(-samples // FRAME_SAMPLES)


def num_audio_tokens(frames: int, strides: tuple[int, ...]) -> int:
    """Return the number of audio tokens of `frames` after an adapter with these strides; every layer rounds up."""
    for stride in strides:
        frames = -(-frames // stride)
    return frames


def audio_tokens_of_samples(samples: int, strides: tuple[int, ...]) -> int:
    """Return the number of audio tokens of a clip of `samples`."""
    return num_audio_tokens(num_frames(samples), strides)


@dataclass(frozen=True)
class Windowing:
    """The windows into which an encoder cuts clips, which determine the cost of a call.

    All windows of a call are padded to the same length. So a call computes the number of windows times the padded
    length of the longest one.
    """

    window_samples: int
    """The length of the consecutive windows in which longer clips are encoded."""
    least_samples: int = 1
    """The length to which a shorter window is padded before anything is computed."""
    silence_samples: int = 0
    """The silence that is appended to every window, as far as `window_samples` has room for it."""

    def num_windows(self, samples: int) -> int:
        """Return the number of windows into which a clip of `samples` is cut."""
        return -(-samples // self.window_samples)

    def padded_samples(self, samples: int) -> int:
        """Return the padded length of the longest window of a clip of `samples` that is alone in its call."""
        return max(self.least_samples, min(samples + self.silence_samples, self.window_samples))

    def computed_samples(self, clips: Sequence[int]) -> int:
        """Return the number of padded audio samples that one call with clips of these lengths computes."""
        return sum(map(self.num_windows, clips)) * max(map(self.padded_samples, clips), default=0)


WHOLE = Windowing(window_samples=1 << 62)
"""The windowing of an encoder that never cuts clips and pads them only to the longest one of a call."""
