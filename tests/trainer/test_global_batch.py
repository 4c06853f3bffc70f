"""Tests that the description of a global batch, which joins the numbers of all ranks, equals that of a plain loop."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.parallel.dispatch import ClipLengths
from trainer.training.global_batch import global_batch

LOSSES, NOTES = ["ctc", "dpo"], [0.0, 2.5]


@pytest.mark.parametrize("samples_per_rank", [[2, 2, 2], [3, 0, 1], [0, 0, 0]])
@pytest.mark.parametrize(("clips_per_sample", "with_digests"), [(1, False), (None, False), (None, True)])
def test_parts_of_all_ranks_are_joined(
    samples_per_rank: list[int], clips_per_sample: int | None, with_digests: bool
) -> None:
    rng = np.random.default_rng(sum(samples_per_rank))
    parts, samples, clips = [], [], []
    for rank, count in enumerate(samples_per_rank):
        own = []
        for _ in range(count):
            lengths = rng.integers(1, 99, clips_per_sample or int(rng.integers(0, 4))).tolist()
            own.append((*rng.integers(1, 99, 3).tolist(), len(lengths), int(rng.integers(0, 9))))
            if with_digests:
                own[-1] += (int(rng.integers(1 << 62, (1 << 63) - 1)),)
            samples.append((rank, *own[-1], sum(lengths)))
            clips += [(rank, n) for n in lengths]
        mine = [n for r, n in clips if r == rank]
        notes = np.array([rank, *NOTES[1:]]).view(np.int64).tolist()
        parts.append([count, len(mine), 10 + rank, 20 + rank, *notes, *(v for row in own for v in row), *mine])
    sizes = np.array([len(part) for part in parts])
    rows = np.zeros((len(parts), sizes.max() + 2), dtype=np.int64)
    for row, part in zip(rows, parts, strict=True):
        row[: len(part)] = part
    found = global_batch(rows, sizes, LOSSES, ["dpo"], len(NOTES), 1, with_digests)
    columns = [found.source_ranks, found.num_tokens, found.num_targets, found.tasks]
    wanted = [s[:4] for s in samples]
    assert [tuple(int(c[i]) for c in columns) for i in range(len(found))] == wanted
    assert found.reference_tokens["dpo"].tolist() == [s[5] for s in samples]
    assert found.audio_samples.tolist() == [s[-1] for s in samples]
    assert (found.digests is None) != with_digests
    assert found.digests is None or found.digests.tolist() == [s[6] for s in samples]
    assert list(zip(found.clips.source_rank.tolist(), found.clips.samples.tolist(), strict=True)) == clips
    assert found.counts == {"ctc": 33, "dpo": 63} and found.first_sample == samples_per_rank[0]
    assert found.notes.tolist() == [[0.0, 2.5], [1.0, 2.5], [2.0, 2.5]] and found.num_values == max(sizes)


def test_ranks_without_clips_get_a_dummy() -> None:
    clips = ClipLengths(np.array([1, 1, 3]), np.array([10, 20, 30])).with_dummies(5, 7)
    assert clips.source_rank.tolist() == [0, 1, 1, 2, 3, 4] and clips.samples.tolist() == [7, 10, 20, 7, 30, 7]
