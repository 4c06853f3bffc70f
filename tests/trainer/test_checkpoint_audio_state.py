"""Tests that every tensor of the audio side is saved completely and once, if each expert is on half of the ranks."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainer.checkpoint import audio_state
from trainer.checkpoint.layout import Shard, entries_of, merge_entries, sliced_elements
from trainer.checkpoint.rect import matrix_of
from trainer.parallel.topology import Topology

WORLD = 4
GROUPS = {"everyone": (0, 1, 2, 3), "first": (0, 2), "second": (1, 3)}
PARAMETERS = {  # shape and group by name
    "audio.projector.weight": ((5, 7), "everyone"),
    "audio.experts.hubert.w": ((3, 5), "first"),
    "audio.experts.wavlm.w": ((11,), "second"),
    "audio.experts.wavlm.scalar": ((), "second"),
}


def test_blocks_with_copies_save_every_tensor_once(monkeypatch: pytest.MonkeyPatch) -> None:
    topology = Topology(8, 1, 1, ep=2, shard=4)
    blocks = []
    for rank in range(8):
        own = held_by(rank % 4, monkeypatch)
        groups: Any = SimpleNamespace(topology=topology, rank=rank)
        moved = [
            replace(s, slices=replace(s.slices, ranks=topology.sharers(rank, of_experts="experts" in s.name)))
            for s in own
            if s.slices is not None and audio_state._is_saved_here(s.name, groups)
        ]
        blocks.append(moved)
    assert all(any(blocks[first : first + 4]) for first in (0, 4)), "both blocks must save"
    entries = [entries_of(own, "audio", rank) for rank, own in enumerate(blocks)]
    assert merge_entries(entries, [sliced_elements(own) for own in blocks]).keys() == PARAMETERS.keys()


def held_by(rank: int, monkeypatch: pytest.MonkeyPatch) -> list[Shard]:
    """Return the shards of one rank. The value of an element is its place in the flat tensor."""
    monkeypatch.setattr(audio_state.dist, "get_rank", lambda group: GROUPS[group].index(rank))
    monkeypatch.setattr(audio_state.dist, "get_process_group_ranks", lambda group: list(GROUPS[group]))
    found = []
    for name, (shape, group) in PARAMETERS.items():
        if rank in GROUPS[group]:
            numel = math.prod(shape)
            part = -(-numel // len(GROUPS[group]))
            start = GROUPS[group].index(rank) * part
            values = torch.arange(start, start + part, dtype=torch.float32)
            parameter: Any = SimpleNamespace(
                ds_shape=shape, ds_numel=numel, ds_tensor=SimpleNamespace(ds_numel=part), ds_process_group=group
            )
            found += list(audio_state._shards_of(name, parameter, {"param": values}, 1, saved_here=True))
    return found


def test_every_tensor_is_saved_completely_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shards = [held_by(rank, monkeypatch) for rank in range(WORLD)]
    entries = [entries_of(own, "audio", rank) for rank, own in enumerate(shards)]
    merged = merge_entries(entries, [sliced_elements(own) for own in shards])
    assert {name: list(entry.slices.ranks) for name, entry in merged.items() if entry.slices is not None} == {
        name: list(GROUPS[group]) for name, (_, group) in PARAMETERS.items()
    }
    assert merged.keys() == PARAMETERS.keys()
    for own in shards:
        for shard in own:
            whole = matrix_of(shard.shape)
            flat = torch.arange(float(whole.numel)).view(whole.rows, whole.cols)
            assert shard.values["param"].equal(flat[shard.rect.within(whole)]), shard
