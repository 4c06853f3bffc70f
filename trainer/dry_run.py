"""What a recipe means, before anything runs: layout, sizes, batch arithmetic. No process group, weights or network."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from model import lengths
from model.audio_tower import AudioTower
from model.config import EncoderConfig
from model.encoders.hf_config import resolve
from model.encoders.registry import encoder_flops
from model.errors import UserError
from model.llm.names import hf_shapes, padded_vocab_size
from trainer.config.checks import known_encoder, known_llm_config
from trainer.config.schema import Recipe
from trainer.engine.optim import check_patterns, setting_of
from trainer.engine.placement import place
from trainer.parallel.topology import Topology, build_topology


@dataclass(frozen=True)
class Size:
    """Parameters of a part."""

    total: int = 0
    learned: int = 0

    def __add__(self, other: Size) -> Size:
        return Size(self.total + other.total, self.learned + other.learned)


def describe(recipe: Recipe) -> str:
    """The report of `--dry-run`.

    Raises:
        UserError: a hub id without `config` (its sizes are then unknown here), or an idle pattern in `optim.parts`.
    """
    topology = build_topology(recipe.parallel, recipe.parallel.num_ranks)
    hf_config = _llm_config(recipe)
    audio = audio_sizes(recipe, hf_config)
    llm = {f"llm.{name}": _size(recipe, f"llm.{name}", shape) for name, shape in hf_shapes(hf_config).items()}
    check_patterns(recipe.optim, [*audio, *llm])
    places = _places(recipe, topology, audio)
    blocks = (
        [f"{recipe.name}: {recipe.train.steps} steps, {recipe.train.precision}, seed {recipe.seed}"],
        _layout(topology),
        *([_experts(places)] if topology.ep > 1 else []),
        _parts(audio | llm),
        _per_rank(recipe, topology, hf_config, _audio_share(audio, places, topology)),
        _batch(recipe, topology),
    )
    return "\n\n".join("\n".join(block) for block in blocks)


def audio_sizes(recipe: Recipe, hf_config: PretrainedConfig) -> dict[str, Size]:
    """Every parameter of the audio side (`audio.…`), which is built without memory.

    Raises:
        UserError: as `describe`.
    """
    model = recipe.model
    known = dataclasses.replace(
        model,
        primary=None if model.primary is None else _sized("model.primary", model.primary),
        experts=tuple(_sized(f"model.experts[{i}]", e) for i, e in enumerate(model.experts)),
    )
    with torch.device("meta"):
        tower = AudioTower(known, hf_config.hidden_size, hf_config.vocab_size)
    named = ((f"audio.{name}", p) for name, p in tower.named_parameters())
    return {name: _size(recipe, name, tuple(p.shape), p.requires_grad) for name, p in named}


def llm_stage_shapes(hf_config: PretrainedConfig, tp_size: int, pp_size: int, stage: int) -> dict[str, tuple[int, ...]]:
    """Hugging Face name and local shape of what one rank of a pipeline stage holds of the LLM."""
    per_stage = hf_config.num_hidden_layers // pp_size
    first, last = stage == 0, stage == pp_size - 1
    shapes = {}
    for name, shape in hf_shapes(hf_config).items():
        if name.startswith("model.layers."):
            here = int(name.split(".")[2]) // per_stage == stage
        elif name == "model.embed_tokens.weight":
            here = first or (last and hf_config.tie_word_embeddings)
        else:
            here = last
        if here:
            shapes[name] = _local(name, shape, hf_config, tp_size)
    return shapes


def _local(name: str, shape: tuple[int, ...], hf_config: PretrainedConfig, tp_size: int) -> tuple[int, ...]:
    if name in ("model.embed_tokens.weight", "lm_head.weight"):
        return (padded_vocab_size(hf_config, tp_size) // tp_size, *shape[1:])
    return (shape[0] // tp_size, *shape[1:]) if "_proj." in name else shape


def _llm_config(recipe: Recipe) -> PretrainedConfig:
    hf_config = known_llm_config(recipe.model.llm)
    if hf_config is None:
        raise _unknown_size("model.llm", recipe.model.llm.weights)
    return hf_config


def _sized(place: str, encoder: EncoderConfig) -> EncoderConfig:
    known = known_encoder(encoder)
    if known is None:
        raise _unknown_size(place, encoder.weights)
    if known.weights is None:
        return known
    stored = resolve(known).hf_config
    shared = {f.name for f in dataclasses.fields(PretrainedConfig)}
    own = [f.name for f in dataclasses.fields(stored) if f.name not in shared]
    return dataclasses.replace(known, weights=None, config={name: getattr(stored, name) for name in own})


def _unknown_size(place: str, weights: str | None) -> UserError:
    return UserError(
        f"{place}.weights = {weights}: a dry run does not download; repeat the checkpoint's sizes in {place}.config, "
        "or give a local directory"
    )


def _layout(topology: Topology) -> list[str]:
    over = "" if topology.ep == 1 else f", experts over {topology.world // topology.ep} each"
    head = (
        f"{topology.world} ranks = TP {topology.tp} x PP {topology.pp} x DP {topology.dp}; "
        f"encoders: ZeRO-3 over all ranks{over}"
    )
    rows = [["replica", *(f"stage {pp}" for pp in range(topology.pp))]]
    shown = list(range(topology.dp)) if topology.dp <= 8 else [*range(4), topology.dp - 1]
    for previous, dp in zip([-1, *shown], shown, strict=False):
        if dp > previous + 1:
            rows.append(["...", *("..." for _ in range(topology.pp))])
        rows.append([str(dp), *(_range(topology.stage_ranks(dp, pp)) for pp in range(topology.pp))])
    return [head, *_table(rows)]


@dataclass(frozen=True)
class Place:
    """What the ranks at one place of the expert-parallel groups hold."""

    ranks: tuple[int, ...]
    experts: tuple[str, ...]
    size: Size
    flops: float
    """Of ten seconds through each of them."""


def _places(recipe: Recipe, topology: Topology, audio: dict[str, Size]) -> list[Place]:
    encoders = [_sized(f"model.experts[{i}]", e) for i, e in enumerate(recipe.model.experts)]
    placement = place(dataclasses.replace(recipe.model, experts=tuple(encoders)), topology.ep)
    flops = {e.name: encoder_flops(e, lengths.num_samples(10)) for e in encoders}
    found = []
    for ranks in topology.expert_replica_groups:
        held = placement.held_by(ranks[0])
        size = sum((s for n, s in audio.items() if n.split(".")[1] == "experts" and n.split(".")[2] in held), Size())
        found.append(Place(ranks, held, size, sum(flops[name] for name in held)))
    return found


def _audio_share(audio: dict[str, Size], places: list[Place], topology: Topology) -> list[tuple[Size, int]]:
    """(parameters, ranks that share them) on the fullest rank: its experts, and all that is no expert."""
    fullest = max(places, key=lambda p: p.size.total).size
    rest = sum((s for n, s in audio.items() if n.split(".")[1] != "experts"), Size())
    return [(fullest, topology.world // topology.ep), (rest, topology.world)]


def _experts(places: list[Place]) -> list[str]:
    rows = [["ranks", "experts", "parameters", "GFLOP per 10 s"]]
    for p in places:
        ranks = _range(p.ranks) if len(p.ranks) <= 4 else f"{p.ranks[0]},{p.ranks[1]},...,{p.ranks[-1]}"
        rows.append([ranks, ", ".join(p.experts) or "none", _count(p.size.total), f"{p.flops / 1e9:.1f}"])
    return [f"Experts: every block of {len(places)} neighbouring ranks holds each of them once.", *_table(rows)]


def _parts(parameters: dict[str, Size]) -> list[str]:
    sizes: dict[str, Size] = {}
    for name, size in parameters.items():
        part = _part_of(name)
        sizes[part] = sizes.get(part, Size()) + size
    whole = sum(sizes.values(), Size())
    rows = [["part", "parameters", "learned"]]
    rows += [[part, _count(size.total), _count(size.learned)] for part, size in [*sizes.items(), ("all", whole)]]
    return _table(rows)


def _part_of(name: str) -> str:
    side, part, *rest = name.split(".")
    if side == "llm":
        return "llm"
    return f"{side}.{part}.{rest[0]}" if part == "experts" else f"{side}.{part}"


def _per_rank(
    recipe: Recipe, topology: Topology, hf_config: PretrainedConfig, audio: list[tuple[Size, int]]
) -> list[str]:
    """Model states. bf16: 2 bytes of a parameter, and in fp32 its master, gradient, two moments; fp32: no master."""
    half = recipe.train.precision == "bf16"
    weight, gradient, optimizer = (2, 4, 12) if half else (4, 4, 8)
    audio_bytes = sum((s.total * weight + s.learned * (gradient + optimizer)) / ranks for s, ranks in audio)
    stages: dict[tuple[str, ...], list[int]] = {}
    for stage in range(topology.pp):
        shapes = llm_stage_shapes(hf_config, topology.tp, topology.pp, stage)
        here = sum((_size(recipe, f"llm.{name}", shape) for name, shape in shapes.items()), Size())
        llm_bytes = here.total * weight + here.learned * (gradient + optimizer / topology.dp)
        row = (_count(here.total), _bytes(llm_bytes), _bytes(audio_bytes), _bytes(llm_bytes + audio_bytes))
        stages.setdefault(row, []).append(stage)
    rows = [["rank of", "LLM parameters", "LLM states", "audio states", "together"]]
    rows += [[f"stage {_range(alike)}", *row] for row, alike in stages.items()]
    return ["Bytes per rank for parameters, gradients and optimizer; activations come on top.", *_table(rows)]


def _batch(recipe: Recipe, topology: Topology) -> list[str]:
    data, train = recipe.data, recipe.train
    num_loading = min(data.num_lanes, topology.world)
    lines = [
        f"A step: {data.global_batch_samples} samples from {data.num_lanes} lanes, loaded by {num_loading} ranks "
        f"({_each(data.global_batch_samples, num_loading)} each), "
        f"{_each(data.global_batch_samples, topology.dp)} per LLM replica.",
        f"Encoder calls of up to {train.encoder_batch_sec:g} s of audio; LLM packs of up to "
        f"{train.llm_tokens_per_microbatch} tokens.",
    ]
    if data.max_audio_sec is not None:
        slots = lengths.slots_of_samples(lengths.num_samples(data.max_audio_sec), recipe.model.adapter.strides)
        lines.append(
            f"The longest clip, {data.max_audio_sec:g} s, takes {slots} LLM positions: "
            f"{train.llm_tokens_per_microbatch // max(1, slots)} of them, without text, fill a pack."
        )
    lines.append(f"{train.steps} steps read {train.steps * data.global_batch_samples:,} samples.")
    return lines


def _size(recipe: Recipe, name: str, shape: tuple[int, ...], learns: bool = True) -> Size:
    count = math.prod(shape)
    return Size(count, count if learns and not setting_of(recipe.optim, name, len(shape)).frozen else 0)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for first, *rest in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(rest, widths[1:], strict=True))]
        lines.append("  " + "  ".join(cells))
    return lines


def _range(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return str(ranks[0])
    contiguous = ranks[-1] - ranks[0] == len(ranks) - 1
    return f"{ranks[0]}-{ranks[-1]}" if contiguous else ",".join(map(str, ranks))


def _each(total: int, parts: int) -> str:
    return str(total // parts) if total % parts == 0 else f"{total // parts} to {-(-total // parts)}"


def _count(number: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(int(number))


def _bytes(number: float) -> str:
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{int(number)} B"
