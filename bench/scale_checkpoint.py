"""The metadata of a checkpoint in a run with many ranks: the data that ranks send to rank 0, and the manifest.

`bench.scale` uses this module. The tensors of a recipe's model are sharded in the same way as by DeepSpeed and
Megatron. Their values are not needed, so one process can compute the metadata of ten thousand ranks, with the code that
saves checkpoints.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig

from model.llm.megatron import build_megatron
from model.llm.names import hf_shapes, local_pieces, tp_dim
from model.llm.weights import global_parameters
from trainer.checkpoint.background import SENT_KINDS, Written
from trainer.checkpoint.layout import (
    EXP_AVG,
    EXP_AVG_SQ,
    MOMENTS,
    PARAM,
    Shard,
    Slices,
    entries_of,
    file_of,
    joined_file,
    merge_entries,
    sliced_elements,
)
from trainer.checkpoint.llm_state import rect_of
from trainer.checkpoint.manifest import FileEntry, Manifest
from trainer.checkpoint.reader import MANIFEST, STATE
from trainer.checkpoint.rect import Rect, matrix_of, rects_of_range
from trainer.engine.placement import place
from trainer.parallel.topology import Topology
from trainer.parallel.values import decode, encode
from trainer.plan.fake_ranks import fake_rank
from trainer.plan.sizes import SizedModel

Shape = tuple[int, ...]

_VALUES: Mapping[str, Any] = dict.fromkeys((PARAM, EXP_AVG, EXP_AVG_SQ))
RANKS_PER_NODE = 8


@dataclass(frozen=True)
class Metadata:
    """The sizes and times of a checkpoint's metadata."""

    sent_bytes: int
    """The maximum number of bytes that one rank sends."""
    gathered_bytes: int
    """The number of bytes that rank 0 receives."""
    manifest_bytes: int
    num_files: int
    """The number of files if a node has `RANKS_PER_NODE` ranks, including the manifest and the trainer's state."""
    merge_sec: float
    """The CPU seconds that rank 0 needs to merge the data of all ranks and format the manifest."""
    parse_sec: float
    """The CPU seconds that a rank needs to parse the manifest."""


def measure(model: SizedModel, topology: Topology) -> Metadata:
    """Return the sizes and times of the metadata of a model's checkpoint on a topology.

    Args:
        model: The model.
        topology: The topology. The audio modules use its size `ep`, and the LLM uses its other sizes.
    """
    sent = [encode((None, _written(rank, shards)), SENT_KINDS) for rank, shards in _ranks(model, topology)]
    parts: list[Written] = [decode(text, SENT_KINDS)[1] for text in sent]
    start = time.thread_time()
    files = {name: entry for part in parts for name, entry in part.files.items()}
    tensors = merge_entries([part.tensors for part in parts], [part.sliced for part in parts])
    text = Manifest(1, {}, files, tensors).dumps()
    merged = time.thread_time()
    Manifest.loads(text)
    parsed = time.thread_time()
    num_files = len({entry.stored_in or name for name, entry in files.items()} | {MANIFEST, STATE})
    return Metadata(max(map(len, sent)), sum(map(len, sent)), len(text), num_files, merged - start, parsed - merged)


def _written(rank: int, shards: Mapping[str, list[Shard]]) -> Written:
    place = FileEntry(1 << 30, "0" * 32, joined_file(None, rank // RANKS_PER_NODE), 1 << 33)
    files = {file_of(family, rank): place for family in (*shards, MOMENTS, "rng")}
    tensors = {name: entry for family, own in shards.items() for name, entry in entries_of(own, family, rank).items()}
    return Written(files, tensors, sliced_elements([shard for own in shards.values() for shard in own]))


def _ranks(model: SizedModel, topology: Topology) -> Iterator[tuple[int, dict[str, list[Shard]]]]:
    """Yield each rank and its shards by family of files."""
    audio = [_audio_parameters(model, topology, position) for position in range(topology.ep)]
    names, shapes = _megatron_names(model.llm), hf_shapes(model.llm)
    boxes = {
        (stage, tp): _stage_boxes(model.llm, names, topology, stage, tp)
        for stage in range(topology.pp)
        for tp in range(topology.tp)
    }
    for rank in range(topology.world):
        at = topology.coordinates(rank)
        yield (
            rank,
            {
                "audio": [shard for parameter in audio[rank % topology.ep] for shard in _slice_of(*parameter, rank)],
                "llm": list(_llm_shards(boxes[at.pp, at.tp], shapes, topology.dp, at.dp)),
            },
        )


def _audio_parameters(model: SizedModel, topology: Topology, position: int) -> list[tuple[str, Shape, Slices]]:
    """Return the audio parameters of the rank at `position` in its expert-parallel group."""
    found = []
    tower = model.tower(place(model.config, topology.ep).held_by(position))
    for name, parameter in tower.named_parameters():
        is_expert = name.startswith("experts.") and topology.ep > 1
        ranks = range(position, topology.world, topology.ep) if is_expert else range(topology.world)
        slices = Slices(ranks, -(-parameter.numel() // len(ranks)))
        found.append((f"audio.{name}", tuple(parameter.shape), slices))
    return found


def _slice_of(name: str, shape: Shape, slices: Slices, rank: int) -> Iterator[Shard]:
    for _, rect in slices.rect_of(matrix_of(shape), slices.ranks.index(rank)):
        yield Shard(name, shape, rect, _VALUES, 1, slices=slices)


def _megatron_names(config: PretrainedConfig) -> list[str]:
    """Return Megatron's names of all parameters of an LLM."""
    topology = Topology(8, 8, 1)
    with fake_rank(topology, 0):
        gpt = build_megatron(
            config, tp_size=8, pp_size=1, first_stage=True, last_stage=True, dtype=torch.bfloat16, recompute="full"
        )
        return [name for name, _ in global_parameters(gpt)]


def _stage_boxes(
    config: PretrainedConfig, names: list[str], topology: Topology, stage: int, tp: int
) -> list[tuple[str, Rect, bool]]:
    """Return the slices of Hugging Face tensors on a rank of a stage, and whether the rank saves each slice."""
    per_stage, shapes, found = -(-config.num_hidden_layers // topology.pp), hf_shapes(config), []
    for name in names:
        words = name.split(".")
        if words[:2] == ["decoder", "layers"]:
            own = int(words[2]) // per_stage
        else:
            own = 0 if words[0] == "embedding" else topology.pp - 1
        for piece in local_pieces(name, config, tp, topology.tp) if own == stage else ():
            if piece.hf_name is not None:
                box = rect_of(piece.index, matrix_of(shapes[piece.hf_name]))
                found.append((piece.hf_name, box, tp_dim(name) is not None or tp == 0))
    return found


def _llm_shards(
    boxes: list[tuple[str, Rect, bool]], shapes: Mapping[str, Shape], num_replicas: int, replica: int
) -> Iterator[Shard]:
    """Yield one replica's part of a stage's parameters. Their common buffer is divided equally among replicas."""
    part = -(-sum(box.numel for _, box, _ in boxes) // num_replicas)
    base = 0
    for name, box, saved_here in boxes:
        low, high = max(part * replica - base, 0), min(part * (replica + 1) - base, box.numel)
        if low < high and saved_here:
            for _, rect in rects_of_range(box, low, high):
                yield Shard(f"llm.{name}", shapes[name], rect, _VALUES, 1)
        base += box.numel
