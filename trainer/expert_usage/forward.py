"""The profile of a dataset. One process routes its clips with the router of a checkpoint, without training.

The weights of the checkpoint are loaded in fp32 into the single-process `AudioTower`. Only the primary encoder and the
router process all clips. The encoder experts process a few clips, on which they are timed.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.audio_tower import AudioTower
from model.batch import Ragged
from model.config import LoraConfig, ModelConfig
from model.connectors.base import adapter_class
from model.conversation import clip_texts
from model.errors import UserError
from model.lengths import SAMPLE_RATE, WHOLE, num_samples
from model.lora import Adapters, add_adapters
from trainer.checkpoint.catalog import SUBFOLDER, open_checkpoints, read_extra
from trainer.checkpoint.layout import PARAM, Shard, files_of
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.reader import STATE, DamagedError, Reader, check_files, read_manifest
from trainer.checkpoint.rect import matrix_of
from trainer.config.load import load_stored_recipe, parse_stored_recipe
from trainer.config.schema import Recipe
from trainer.data.decode import decode_audio
from trainer.data.errors import SampleError
from trainer.data.metadata import check_metadata, prompt_turns
from trainer.data.stored import CHUNK_SAMPLES, Encoded, StoredData, open_stored
from trainer.expert_usage.analysis import Profile
from trainer.expert_usage.history import RunPath, primary_name
from trainer.expert_usage.placement import advise
from trainer.parallel.dispatch import CALL_COST_SAMPLES, group_by_length
from trainer.run_tokenizer import of_checkpoint
from trainer.storage.open import join_url
from trainer.telemetry.expert_load import ClipGroup, ExpertLoad, add_up, group_of

_CHUNK_CLIPS = 128
_TIMED_SEC = 20.0
"""The duration of the audio on which each encoder expert is timed."""

Encode = Callable[[str], list[int]]


def profile_data(where: RunPath, data: Path, split: str | None) -> Profile:
    """Return the profile of `data`, as a checkpoint routes it.

    Args:
        where: A run, whose newest undamaged checkpoint is used, or one of its checkpoints.
        data: A manifest or a folder of shards.
        split: The split to use; None for all splits.

    Raises:
        UserError: If there is no checkpoint or no such data, or the model has no encoder experts.
    """
    reader, recipe = open_checkpoint(where)
    if not recipe.model.experts:
        raise UserError(f"{where.run_dir}: the model has no encoder experts, so there is nothing to route")
    encode = _prompt_encoder(reader, recipe, where.run_dir)
    tower = load_tower(recipe.model, reader, recipe.lora)
    skipped: Counter[str] = Counter()
    loads, timed = [], None
    for clips, prompts, groups in _chunks(_decoded(data, split, recipe, encode, skipped)):
        loads.append(_route(tower, recipe, clips, prompts, groups))
        timed = timed or _time_experts(tower, clips)
    load = add_up(loads)
    experts = [e.name for e in recipe.model.experts]
    advice = None
    if timed is not None:
        costs = [rate * float(sec) for rate, sec in zip(timed, load.total().routed_sec, strict=True)]
        advice = advise(experts, costs, recipe.parallel.expert, recipe.parallel.num_ranks, None)
    origin = f"{data}{f', split {split}' if split else ''}, routed by the checkpoint of step {reader.manifest.step}"
    return Profile(recipe.name, origin, primary_name(recipe), load, (), None, advice, dict(skipped))


# ---- the checkpoint


def open_checkpoint(where: RunPath) -> tuple[Reader, Recipe]:
    """Open the named checkpoint, or the newest undamaged checkpoint of the run.

    Returns:
        The reader of the checkpoint, and the recipe of its run.

    Raises:
        UserError: If there is no checkpoint, or all candidates are damaged.
    """
    kept = where.run_dir / "recipe.yaml"
    root = load_stored_recipe(kept).checkpoint.root if kept.is_file() else None
    found = open_checkpoints(join_url(root or str(where.run_dir.parent), f"{where.run_dir.name}/{SUBFOLDER}"))
    damages = []
    for step in reversed(found.steps()) if where.step is None else [where.step]:
        folder = found.folder(step)
        try:
            manifest = read_manifest(folder)
            # These files include the frozen parts of the tower, which are stored in a separate folder.
            audio = (entry for name, entry in manifest.tensors.items() if name.startswith("audio."))
            check_files(folder, manifest, sorted({STATE, *files_of(audio)}))
        except DamagedError as error:
            damages.append(f"{folder.url}: {error}")
            continue
        return Reader(folder, manifest), parse_stored_recipe(read_extra(folder)["recipe"], f"{folder.url}/{STATE}")
    if damages:
        raise UserError(f"{damages[0]}; no checkpoint can be read; restore one from a copy")
    raise UserError(f"{found.url}: contains no checkpoint; wait until the run has saved one")


def load_tower(model: ModelConfig, reader: Reader, lora: Sequence[LoraConfig] = ()) -> AudioTower:
    """Build the `AudioTower` for inference with the checkpoint's weights and the adapters `lora`, in fp32."""
    llm_dim = reader.manifest.tensors["audio.projector.weight"].shape[0]
    tower = AudioTower(model, llm_dim, _vocab_size(reader.manifest, model))
    add_adapters(tower, "audio.", Adapters(tuple(lora)))
    kept = {name for name in tower.state_dict()}
    named = [*tower.named_parameters(), *((n, b) for n, b in tower.named_buffers() if n in kept)]
    with torch.no_grad():
        for name, tensor in named:
            rect = matrix_of(tuple(tensor.shape))
            shard = Shard(f"audio.{name}", tuple(tensor.shape), rect, {PARAM: tensor.view(rect.rows, rect.cols)}, None)
            reader.check(shard)
            reader.fill(shard)
    return tower.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def _vocab_size(manifest: Manifest, model: ModelConfig) -> int:
    """Return the vocabulary size of the tokenizer, or 1 if no tensor of the tower depends on it."""
    shapes = {name: entry.shape for name, entry in manifest.tensors.items()}
    if "audio.ctc_head.weight" in shapes and model.ctc_vocabulary == "tokens":
        num_parts = adapter_class(model.adapter).num_parts(model.adapter)
        return shapes["audio.ctc_head.weight"][0] * num_parts // model.ctc_outputs - 1
    return shapes.get("audio.router.prompt_embedding.weight", (1,))[0]


def _prompt_encoder(reader: Reader, recipe: Recipe, run_dir: Path) -> Encode:
    """Return a function that turns an instruction into tokens. If no gate reads instructions, it returns no tokens."""
    router = recipe.model.router
    if router.input != "prompt" or "data_dependent" not in router.gates:
        return lambda text: []
    owned = of_checkpoint(reader.folder, str(run_dir))
    with tempfile.TemporaryDirectory() as scratch:
        return owned.load(owned.put_into(scratch)).encode


# ---- the data


def _decoded(
    data: Path, split: str | None, recipe: Recipe, encode: Encode, skipped: Counter[str]
) -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor], dict[str, Any]]]:
    """Yield the clips of each sample, the tokens of each clip's instruction, and the sample's manifest fields.

    Clips are decoded as in training, but without augmentation. Samples that cannot be used are skipped and counted, by
    reason, in `skipped`.
    """
    shortest = num_samples(recipe.data.min_audio_sec)
    stored = open_stored(str(data), split)
    for item in (i for start in range(0, len(stored.items), CHUNK_SAMPLES) for i in _part(stored, start)):
        try:
            if isinstance(item, SampleError):
                raise item
            files, meta = item
            check_metadata(meta, len(files))
            clips = [decode_audio(file, recipe.data.max_audio_sec) for file in files]
            texts = clip_texts(prompt_turns(meta, len(files)))
            prompts = [torch.tensor(encode(text), dtype=torch.int64) for text in texts]
        except SampleError as error:
            skipped[error.reason] += 1
            continue
        yield [torch.from_numpy(np.pad(c, (0, max(0, shortest - len(c))))) for c in clips], prompts, meta


def _part(stored: StoredData, start: int) -> list[Encoded | SampleError]:
    return stored.read(range(start, min(start + CHUNK_SAMPLES, len(stored.items))))


def _chunks(
    samples: Iterator[tuple[list[torch.Tensor], list[torch.Tensor], dict[str, Any]]],
) -> Iterator[tuple[Ragged, Ragged, list[ClipGroup]]]:
    """Yield chunks of about `_CHUNK_CLIPS` clips, with the prompt and the group of each clip."""
    clips: list[torch.Tensor] = []
    prompts: list[torch.Tensor] = []
    groups: list[ClipGroup] = []
    for own, own_prompts, meta in samples:
        clips += own
        prompts += own_prompts
        groups += [group_of(meta["task"], meta, len(clip) / SAMPLE_RATE) for clip in own]
        if len(clips) >= _CHUNK_CLIPS:
            yield Ragged.of(clips), Ragged.of(prompts), groups
            clips, prompts, groups = [], [], []
    if clips:
        yield Ragged.of(clips), Ragged.of(prompts), groups


# ---- the router


@torch.no_grad()
def _route(
    tower: AudioTower, recipe: Recipe, clips: Ragged, prompts: Ragged, groups: Sequence[ClipGroup]
) -> ExpertLoad:
    device = next(tower.parameters()).device
    loads = []
    budget = num_samples(recipe.train.encoder_batch_sec)
    windowing = WHOLE if tower.primary is None else tower.primary.windowing
    for members in group_by_length(clips.lengths, budget, CALL_COST_SAMPLES[device.type], windowing):
        part = clips.select(members).to(device)
        primary = None if tower.primary is None else tower.primary(part)
        routing = tower.router(part, primary, prompts.select(members).to(device))
        seconds = [n / SAMPLE_RATE for n in part.lengths]
        loads.append(ExpertLoad.of(routing, [groups[i] for i in members], seconds, list(tower.experts)))
    return add_up(loads)


@torch.no_grad()
def _time_experts(tower: AudioTower, clips: Ragged) -> list[float]:
    """Return the seconds that the forward pass of each encoder expert takes per second of audio, on the first clips."""
    device = next(tower.parameters()).device
    num = 1
    while num < len(clips) and sum(clips.lengths[: num + 1]) <= num_samples(_TIMED_SEC):
        num += 1
    some = clips.select(range(num)).to(device)
    rates = []
    for expert in tower.experts.values():
        expert(some.select([0]))  # a warm-up call
        _synchronise(device)
        start_sec = time.perf_counter()
        expert(some)
        _synchronise(device)
        rates.append((time.perf_counter() - start_sec) * SAMPLE_RATE / sum(some.lengths))
    return rates


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
