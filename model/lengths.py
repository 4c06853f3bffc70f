"""Conversions between seconds, audio samples, frames and audio tokens. No other module repeats this arithmetic.

Every encoder of this project returns one frame per 20 ms (50 Hz), and the number of frames is rounded up. Whisper's
convolutions over mel frames of 10 ms already round up. The convolution stacks of HuBERT and WavLM round down, and their
last frame is then repeated.
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
    """Return the number of samples in `seconds` of 16 kHz audio, rounded to the nearest integer."""
    return round(seconds * SAMPLE_RATE)


def num_frames(samples: Count) -> Count:
    """Return the number of encoder frames (20 ms) that cover `samples` audio samples, rounded up.

    Args:
        samples: The number of audio samples, or an array of such numbers.
    """
    return -(-samples // FRAME_SAMPLES)


@dataclass(frozen=True)
class TokenRate:
    """The rule for the number of audio tokens of a clip. The number depends only on the number of frames."""

    strides: tuple[int, ...]
    """The down-sampling factor of each layer. Each layer rounds up, unless `drops_rest` is true."""
    tokens_per_group: int = 1
    """The number of audio tokens for each group of frames. The product of the strides is the size of a group."""
    drops_rest: bool = False
    """True if layers round down, so that frames at the end that do not fill a stride are dropped. A clip has at least
    one group."""
    block_frames: int = 0
    """The number of frames after which the grouping restarts, so that the last group of a block may be shorter; 0 for
    no blocks. With blocks, a frame at the end of a clip counts only if it contains at least 10 ms of audio."""

    def frames_of_samples(self, samples: int) -> int:
        """Return the number of encoder frames that count in a clip of `samples` audio samples."""
        if not self.block_frames:
            return num_frames(samples)
        return max(1, -(-(samples // (FRAME_SAMPLES // 2)) // 2))

    def tokens_of_frames(self, frames: int) -> int:
        """Return the number of audio tokens of `frames` encoder frames."""
        if self.block_frames and frames > self.block_frames:
            blocks, rest = divmod(frames, self.block_frames)
            return blocks * self.tokens_of_frames(self.block_frames) + (self.tokens_of_frames(rest) if rest else 0)
        for stride in self.strides:
            frames = max(1, frames // stride) if self.drops_rest else -(-frames // stride)
        return frames * self.tokens_per_group

    def tokens_of_samples(self, samples: int) -> int:
        """Return the number of audio tokens of a clip of `samples` audio samples."""
        return self.tokens_of_frames(self.frames_of_samples(samples))


@dataclass(frozen=True)
class Windowing:
    """The rule by which an encoder cuts clips into windows and pads them.

    All windows of an encoder call are padded to the length of the longest window. The cost of the call is therefore the
    number of windows times this length.
    """

    window_samples: int
    """The length of the consecutive windows into which longer clips are cut."""
    least_samples: int = 1
    """The length to which shorter windows are padded before they are encoded."""
    silence_samples: int = 0
    """The length of the silence that is appended to every window. A window with its silence is at most `window_samples`
    long."""

    def num_windows(self, samples: int) -> int:
        """Return the number of windows into which a clip of `samples` audio samples is cut."""
        return -(-samples // self.window_samples)

    def padded_samples(self, samples: int) -> int:
        """Return the padded length of the longest window if a clip of `samples` audio samples is encoded alone."""
        return max(self.least_samples, min(samples + self.silence_samples, self.window_samples))

    def computed_samples(self, clips: Sequence[int]) -> int:
        """Return the number of padded audio samples that one call with clips of these lengths computes."""
        return sum(map(self.num_windows, clips)) * max(map(self.padded_samples, clips), default=0)


WHOLE = Windowing(window_samples=1 << 62)
"""The windowing of an encoder that never cuts clips and pads them only to the longest clip of a call."""
