"""The summary of a recipe that `--dry-run` prints: ranks, sizes of parts, and batches. `earshot plan` prints more."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from model import lengths
from model.encoders.registry import encoder_flops
from model.errors import UserError
from trainer.config.checks import deepspeed_json
from trainer.config.llm_checks import known_llm_config
from trainer.config.schema import Recipe, TrainConfig
from trainer.data.config_files import place_of
from trainer.data.prepare import check_loss_turns, check_stored
from trainer.data.tokenizer import load_tokenizer
from trainer.engine.ds_config import load_ds_json
from trainer.engine.llm_optimizer import Reduction
from trainer.engine.placement import place
from trainer.engine.stages import stages_of
from trainer.parallel.topology import Topology, build_topology
from trainer.plan.ranks import rank_states
from trainer.plan.sizes import Size, SizedModel, parameter_sizes, sized_model, stage_sizes
from trainer.plan.states import States
from trainer.plan.tables import bytes_text, count_text, ranks_text, table
from trainer.storage.open import scheme_of
from trainer.telemetry.jsonl import write_atomically


def describe(recipe: Recipe, memory: bool = True) -> str:
    """Return the text that `--dry-run` prints.

    Args:
        recipe: The recipe.
        memory: Whether to include the memory per rank, which cannot be computed in a process that is a rank.

    Raises:
        UserError: If the sizes of a model are unknown because the recipe names a hub id without `config`, or if a
            pattern in `optim.parts` matches no parameter.
    """
    topology = build_topology(recipe.parallel, recipe.parallel.num_ranks)
    model = sized_model(recipe)
    sizes = parameter_sizes(model, recipe.staged_optim)
    blocks = (
        _head(recipe),
        _layout(topology),
        *([_experts(_places(model, topology, sizes))] if topology.ep > 1 else []),
        _parts(sizes),
        *([_stages(recipe, model)] if recipe.stages else []),
        *([_per_rank(recipe, model, topology)] if memory else []),
        _batch(recipe, topology),
    )
    return "\n\n".join("\n".join(block) for block in blocks)


def check_tokenizer(recipe: Recipe) -> None:
    """Check the tokenizer of a recipe if it is a file or a folder on this machine.

    Raises:
        UserError: If the tokenizer cannot be read, lacks the placeholder or the end token, or has more tokens than the
            LLM, if its chat template does not allow the labels that `data.loss_turns` needs, or if it has no pieces for
            the CTC head.
    """
    path = recipe.data.tokenizer.path
    if path is None or not Path(path).exists():
        return
    tokenizer = load_tokenizer(path, recipe.data.tokenizer)
    vocab_size = tokenizer.vocab_size
    config = known_llm_config(recipe.model.llm)
    if config is not None and vocab_size > config.vocab_size:
        raise UserError(
            f"data.tokenizer.path = {path}: has {vocab_size} tokens, but the LLM has {config.vocab_size}; "
            "use the LLM's own tokenizer"
        )
    check_loss_turns(recipe.data, tokenizer)
    if recipe.model.num_pieces is not None:
        tokenizer.pieces(recipe.model.num_pieces)


def check_data(recipe: Recipe) -> None:
    """Check the datasets of a recipe that are in folders of this machine. Datasets in buckets are not read.

    Raises:
        UserError: If a manifest or an index is missing or cannot be read, or shards contain no samples to train on.
    """
    data = recipe.staged_data
    local = tuple(part for part in data.datasets if not scheme_of(place_of(data, part)))
    try:
        if len(local) == len(data.datasets):
            check_stored(data)
        elif local:
            check_stored(replace(data, datasets=local, eval_splits=()))
    except UserError as error:
        raise UserError(f"{error}; --no-data skips this check if the data is on another machine") from None


def write_plan(recipe: Recipe, path: Path) -> None:
    """Write the summary to `path`, unless a job has already written its plan there.

    Nothing is written if the sizes of the model are unknown.
    """
    if path.exists():
        return
    try:
        write_atomically(path, describe(recipe, memory=False) + "\n")
    except UserError:
        return


def _head(recipe: Recipe) -> list[str]:
    same = "on CPUs and equal up to rounding on CUDA"
    if recipe.train.deterministic:
        same = "on CPUs, and on CUDA for the operations that its libraries document as deterministic"
    return [
        f"{recipe.name}: {recipe.train.steps} steps, {recipe.train.precision}, seed {recipe.seed}",
        f"train.deterministic = {str(recipe.train.deterministic).lower()}: a resumed run is bit-identical {same}.",
    ]


def _layout(topology: Topology) -> list[str]:
    over = "" if topology.ep == 1 else f" (each encoder expert over {topology.num_sharers(of_experts=True)} ranks)"
    sharers = "all ranks" if topology.shard is None else f"blocks of {topology.shard} ranks"
    context = f" x CP {topology.cp}" if topology.cp > 1 else ""
    head = (
        f"{topology.world} ranks = TP {topology.tp}{context} x PP {topology.pp} x DP {topology.dp}; "
        f"encoders: ZeRO-3 over {sharers}{over}"
    )
    rows = [["replica", *(f"stage {pp}" for pp in range(topology.pp))]]
    shown = list(range(topology.dp)) if topology.dp <= 8 else [*range(4), topology.dp - 1]
    for previous, dp in zip([-1, *shown], shown, strict=False):
        if dp > previous + 1:
            rows.append(["...", *("..." for _ in range(topology.pp))])
        rows.append([str(dp), *(ranks_text(topology.stage_ranks(dp, pp)) for pp in range(topology.pp))])
    return [head, *table(rows)]


@dataclass(frozen=True)
class Place:
    """The ranks at one place of the expert-parallel groups, and the encoder experts that they hold."""

    ranks: tuple[int, ...]
    experts: tuple[str, ...]
    """The names of the encoder experts."""
    size: Size
    """The parameters of these experts."""
    flops: float
    """The FLOPs of these experts for ten seconds of audio."""


def _places(model: SizedModel, topology: Topology, sizes: dict[str, Size]) -> list[Place]:
    placement = place(model.config, topology.ep)
    flops = {e.name: encoder_flops(e, lengths.num_samples(10)) for e in model.config.experts}
    found = []
    for ranks in topology.expert_replica_groups:
        held = placement.held_by(ranks[0])
        own = (s for n, s in sizes.items() if n.startswith("audio.experts.") and n.split(".")[2] in held)
        found.append(Place(ranks, held, sum(own, Size()), sum(flops[name] for name in held)))
    return found


def _experts(places: list[Place]) -> list[str]:
    rows = [["ranks", "encoder experts", "parameters", "GFLOP per 10 s"]]
    for p in places:
        ranks = ranks_text(p.ranks) if len(p.ranks) <= 4 else f"{p.ranks[0]},{p.ranks[1]},...,{p.ranks[-1]}"
        rows.append([ranks, ", ".join(p.experts) or "none", count_text(p.size.total), f"{p.flops / 1e9:.1f}"])
    return [f"Every block of {len(places)} neighboring ranks holds each encoder expert once.", *table(rows)]


def _parts(parameters: dict[str, Size]) -> list[str]:
    sizes: dict[str, Size] = {}
    for name, size in parameters.items():
        part = _part_of(name)
        sizes[part] = sizes.get(part, Size()) + size
    whole = sum(sizes.values(), Size())
    rows = [["part", "parameters", "trainable", "frozen"]]
    for part, size in [*sizes.items(), ("all", whole)]:
        rows.append([part, *map(count_text, (size.total, size.learned, size.total - size.learned))])
    return table(rows)


def _stages(recipe: Recipe, model: SizedModel) -> list[str]:
    rows = [["stage", "steps", "trainable", "learning rate", "trains", "weights of datasets"]]
    for stage, given in zip(stages_of(recipe.staged_optim, recipe.train.steps), recipe.stages, strict=True):
        last = stage.start + stage.steps
        count = sum(size.learned for size in stage_sizes(model, stage).values())
        weights = ", ".join(f"{name} {weight:g}" for name, weight in given.weights.items())
        steps = f"{stage.start + 1} to {last}" + ("" if stage.runs_llm else ", without the LLM")
        rows.append(
            [
                stage.name,
                steps,
                count_text(count),
                f"{stage.optim.lr:g}",
                ", ".join(given.train) or "all",
                weights or "-",
            ]
        )
    return ["The run consists of these stages. Adam's moments start from zero in each of them.", *table(rows)]


def _part_of(name: str) -> str:
    side, part, *rest = name.split(".")
    if side == "llm":
        return "llm"
    return f"{side}.{part}.{rest[0]}" if part == "experts" else f"{side}.{part}"


def _per_rank(recipe: Recipe, model: SizedModel, topology: Topology) -> list[str]:
    ds_json = load_ds_json(deepspeed_json(recipe))
    reduction = Reduction.of(recipe.parallel)
    states = rank_states(model, topology, recipe.staged_optim, recipe.train.precision, ds_json, reduction)
    audio = max((s for blocks in states.audio for s in blocks), key=lambda s: s.total)
    stages: dict[States, list[int]] = {}
    for stage, replicas in enumerate(states.llm):
        stages.setdefault(max(replicas, key=lambda s: s.total), []).append(stage)
    rows = [["ranks of", "weights", "gradients", "optimizer", "audio states", "total"]]
    for llm, members in stages.items():
        parts = (llm.weights, llm.gradients, llm.optimizer, audio.total, llm.total + audio.total)
        rows.append([f"stage {ranks_text(members)}", *map(bytes_text, parts)])
    return [
        "Memory per rank for the LLM's weights, gradients and optimizer and for the audio side, without activations:",
        *table(rows),
    ]


def _batch(recipe: Recipe, topology: Topology) -> list[str]:
    data, train = recipe.data, recipe.train
    num_loading = min(data.num_lanes, topology.world)
    lines = [
        f"A step takes {data.global_batch_samples} samples from {data.num_lanes} lanes, loaded by {num_loading} ranks "
        f"({_each(data.global_batch_samples, num_loading)} each), "
        f"{_each(data.global_batch_samples, topology.dp)} per LLM replica.",
        f"An encoder call takes up to {train.encoder_batch_sec:g} s of audio, an LLM pack up to "
        f"{train.llm_tokens_per_microbatch} tokens, {_lengths(train, topology)}.",
    ]
    if data.max_audio_sec is not None:
        audio_tokens = recipe.model.adapter.rate.tokens_of_samples(lengths.num_samples(data.max_audio_sec))
        lines.append(
            f"The longest clip ({data.max_audio_sec:g} s) becomes {audio_tokens} audio tokens; "
            f"{train.llm_tokens_per_microbatch // max(1, audio_tokens)} such clips without text fill a pack."
        )
    lines.append(f"{train.steps} steps read {train.steps * data.global_batch_samples:,} samples.")
    return lines


def _lengths(train: TrainConfig, topology: Topology) -> str:
    """Return the end of a sentence that says to which multiple packs are padded."""
    multiple = train.pack_multiple_tokens
    if multiple is None:
        if topology.cp > 1:
            return f"padded to a multiple of {topology.row_multiple} (2 · the context- and tensor-parallel ranks)"
        return f"padded to a multiple of {topology.tp} (the tensor-parallel ranks)"
    num_lengths = train.llm_tokens_per_microbatch // multiple
    return f"padded to a multiple of {multiple}, which gives {num_lengths} different lengths"


def _each(total: int, parts: int) -> str:
    """Return how many of `total` items each part has, as text such as `4` or `4 to 5`."""
    return str(total // parts) if total % parts == 0 else f"{total // parts} to {-(-total // parts)}"
