"""Choose a split for recordings to which the source assigns none."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping

from trainer.importers.row import Clip
from trainer.importers.source import Source

DEFAULT_SPLIT = "train"


def recording_of(clip: Clip, source: Source) -> str:
    """Return a text that identifies a recording. It is the same for all parts of the recording."""
    if clip.data is not None:  # The name shows only the type, so several recordings may have the same name.
        return hashlib.blake2b(clip.data, digest_size=16).hexdigest()
    path = os.path.relpath(clip.path, source.folder)
    return path if clip.span is None else f"{path}:{clip.span[0]}"


def split_of(recording: str, shares: Mapping[str, float]) -> str:
    """Return the split of a recording. The result does not depend on other recordings."""
    place = _place(recording)
    for split, share in shares.items():
        if place < share:
            return split
        place -= share
    return DEFAULT_SPLIT


def draw_for_empty_splits(recordings: Iterable[str], shares: Mapping[str, float]) -> dict[str, str]:
    """Return recording → split, with one recording for each split that would otherwise get none.

    In a small source, `split_of` may assign no recording to a split. Such a split gets one recording from the splits
    that have several, namely the one whose hash is closest to the middle of the split's range of hashes.

    Args:
        recordings: All recordings to which the source assigns no split.
        shares: Split → the fraction of the recordings that it gets.
    """
    splits = {recording: split_of(recording, shares) for recording in recordings}
    counts = Counter(splits.values())
    drawn: dict[str, str] = {}
    begin = 0.0
    for split, share in shares.items():
        middle, begin = begin + share / 2, begin + share
        others = [name for name, now in splits.items() if counts[now] > 1]
        if counts[split] or not others:
            continue
        name = min(others, key=lambda other: (abs(_place(other) - middle), other))
        counts[splits[name]] -= 1
        counts[split] += 1
        splits[name] = drawn[name] = split
    return drawn


def _place(recording: str) -> float:
    """Return a number from 0 to 1 that is derived from a hash of the recording."""
    digest = hashlib.blake2b(recording.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
