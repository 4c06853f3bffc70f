"""The rules that involve several sections of a recipe. They are checked before any process group exists.

The rules within one section are in the `__post_init__` of its dataclass.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from transformers import PretrainedConfig

from model import lengths
from model.config import EncoderConfig, ModelConfig
from model.encoders.family import family_of
from model.encoders.hf_config import resolve as resolve_encoder
from model.errors import UserError
from model.llm.families import mixture_of
from model.llm.rotary import num_positions
from model.llm.stages import check_recompute
from model.lora import LLM, Adapters, llm_layers
from model.losses.base import AudioLoss
from model.losses.routing import RoutingLoss
from model.losses.table import LOSSES, active_losses, check_losses
from trainer.config.llm_checks import check_llm, check_router_losses, check_routers, known_llm_config
from trainer.config.schema import Recipe, TrainConfig
from trainer.config.shipped import shipped
from trainer.config.weights import check_present, check_weights
from trainer.engine.determinism import check_variables
from trainer.engine.ds_config import check_gathering, load_ds_json
from trainer.parallel.topology import ParallelConfig, build_topology, divisors
from trainer.plugins import package_with
from trainer.scoring.tasks import TASKS
from trainer.telemetry.trackers.table import check_trackers


def check_recipe(recipe: Recipe) -> None:
    """Check all rules that need neither weights nor data nor other ranks.

    Raises:
        UserError: If a rule is broken. The message contains the key, its value and the allowed values.
    """
    build_topology(recipe.parallel, recipe.parallel.num_ranks)
    if recipe.parallel.expert > 1 and not recipe.model.experts:
        raise UserError(f"parallel.expert = {recipe.parallel.expert}: the model has no encoder experts; set it to 1")
    _check_encoders(recipe)
    if recipe.train.gather_audio_weights == "per_module":
        for place, encoder in _places(recipe.model):
            if not family_of(encoder).gathers_per_module:
                raise UserError(
                    f"train.gather_audio_weights = per_module: {place} has the family {encoder.family}, whose modules "
                    "cannot be gathered one by one; set it to per_update"
                )
    for name in recipe.model.losses.keys() - LOSSES.keys():
        package = package_with("earshot.losses", name)
        if package is not None:
            raise UserError(
                f"model.losses.{name}: the installed package {package} defines this loss, but the recipe does not load "
                f"it; add {package} to plugins, e.g. plugins=[{package}]"
            )
    check_losses(recipe.model)
    _check_stage_losses(recipe)
    check_weights("model.llm.weights", recipe.model.llm.weights)
    hf_config = known_llm_config(recipe.model.llm)
    if hf_config is not None:
        check_llm(hf_config, recipe.parallel)
        if mixture_of(hf_config) is not None:
            check_recompute(recipe.train.recompute_llm)
        check_routers(recipe.model.llm)
        check_router_losses(recipe.model, hf_config)
        _check_lengths(recipe, hf_config)
        _check_vocabulary(recipe, hf_config)
        of_llm = [part for part in recipe.lora if part.pattern.startswith(LLM)]
        Adapters(tuple(of_llm)).check(llm_layers(hf_config))
    _check_data(recipe)
    _check_steps(recipe)
    check_trackers(recipe.telemetry.trackers)
    check_packs(recipe.train, recipe.parallel)
    check_reduction(recipe.train, recipe.parallel)
    if recipe.stages and recipe.parallel.overlap_grad_reduce:  # Megatron waits for the same gradients in every step
        raise UserError(
            "parallel.overlap_grad_reduce = true: the trained parameters differ between stages of training; set it "
            "to false, or remove stages"
        )
    check_gathering(deepspeed_json(recipe), load_ds_json(deepspeed_json(recipe)), recipe.train.gather_audio_weights)
    shard = recipe.parallel.audio_shard
    if recipe.train.gather_audio_weights == "per_module" and shard not in (None, recipe.parallel.num_ranks):
        raise UserError(
            f"parallel.audio_shard = {shard}: weights that are gathered per module are shared by all ranks; remove it, "
            "or set train.gather_audio_weights to per_update"
        )
    if recipe.train.deterministic:
        check_variables(os.environ)


def _check_stage_losses(recipe: Recipe) -> None:
    losses = [loss for loss in active_losses(recipe.model) if isinstance(loss, AudioLoss)]
    has_audio_loss = any(not isinstance(loss, RoutingLoss) and loss.weight(recipe.model) > 0 for loss in losses)
    for number, stage in enumerate(recipe.stages):
        if not stage.llm and not has_audio_loss:
            raise UserError(
                f"stages.{number}.llm = false: without the LLM, the stage has no loss; set model.ctc_weight, or remove "
                f"stages.{number}.llm"
            )


def deepspeed_json(recipe: Recipe) -> Path:
    """Return the path to the DeepSpeed JSON file.

    A relative path is resolved against the current folder, or against the project's folder if that file does not exist.
    """
    path = Path(recipe.train.deepspeed)
    return path if path.exists() or path.is_absolute() else shipped(recipe.train.deepspeed)


def check_folders(recipe: Recipe) -> None:
    """Check that the folders of weights exist. A training run needs them, but a dry run does not.

    The tokenizer's folder is not checked, because a run that resumes uses its own copy.

    Raises:
        UserError: If a folder is missing and its name cannot be a hub id.
    """
    for place, encoder in _places(recipe.model):
        check_present(f"{place}.weights", encoder.weights)
    check_present("model.llm.weights", recipe.model.llm.weights)


def warnings_of(model: ModelConfig) -> list[str]:
    """Return a warning for every setting of `model` that is valid but possibly unintended."""
    known = [(place, known_encoder(encoder)) for place, encoder in _places(model)]
    notes = [
        f"{place}: {note}"
        for place, encoder in known
        if encoder is not None
        for note in family_of(encoder).notes(resolve_encoder(encoder))
    ]
    return notes + [
        f"{place}.length_mode = trim: {encoder.weights} was pre-trained on windows of 30 s, and shorter ones change "
        "its features (see docs/finetune.md); set its length_mode to full or, for a smaller change, set its "
        "trailing_silence_sec to 1"
        for place, encoder in _places(model)
        if encoder.length_mode == "trim" and encoder.weights is not None
        if not encoder.trailing_silence_sec
    ]


def _places(model: ModelConfig) -> list[tuple[str, EncoderConfig]]:
    """Return all encoders with their recipe keys."""
    places = [("model.primary", model.primary)] if model.primary is not None else []
    return places + [(f"model.experts[{i}]", expert) for i, expert in enumerate(model.experts)]


def known_encoder(config: EncoderConfig) -> EncoderConfig | None:
    """Return a config of an encoder that can be resolved without network access.

    Returns:
        The config itself if it has no weights or they are a local folder; a copy without weights if it contains a hub
        id and a `config`; None if it contains only a hub id.
    """
    if config.weights is None or Path(config.weights).is_dir():
        return config
    return dataclasses.replace(config, weights=None) if config.config else None


def check_packs(train: TrainConfig, parallel: ParallelConfig) -> None:
    """Check that padded packs can be divided among ranks and do not exceed the tokens of a micro-batch.

    Raises:
        UserError: If one of these conditions is not met. The message lists the allowed values.
    """
    multiple, budget = train.pack_multiple_tokens, train.llm_tokens_per_microbatch
    rows = build_topology(parallel, parallel.num_ranks).row_multiple
    if multiple is None or (multiple % rows == 0 and budget % multiple == 0):
        return
    allowed = [d for d in divisors(budget) if d % rows == 0]
    what = "parallel.tensor" if parallel.context == 1 else "2 · parallel.context · parallel.tensor"
    remedy = "no number does both, so set it to null, or change one of the two"
    if allowed:
        remedy = f"set it to {', '.join(map(str, allowed))}, or null"
    raise UserError(
        f"train.pack_multiple_tokens = {multiple}: must be a multiple of {what} = {rows} and divide "
        f"train.llm_tokens_per_microbatch = {budget}; {remedy}"
    )


def check_reduction(train: TrainConfig, parallel: ParallelConfig) -> None:
    """Check the settings for the exchange of gradients and weights between replicas.

    Raises:
        UserError: If two settings exclude each other.
    """
    if parallel.overlap_param_gather and not parallel.overlap_grad_reduce:
        raise UserError("parallel.overlap_param_gather = true: set parallel.overlap_grad_reduce=true as well")
    if parallel.grad_reduce_dtype == "bf16" and train.precision != "bf16":
        raise UserError(
            f"parallel.grad_reduce_dtype = bf16: gradients have train.precision = {train.precision}; set "
            "train.precision=bf16, or parallel.grad_reduce_dtype=fp32"
        )


def _check_encoders(recipe: Recipe) -> None:
    model = recipe.model
    if not model.encoders:
        raise UserError("model.primary is missing: the model needs at least one encoder")
    for place, encoder in _places(model):
        _check_encoder(place, encoder)
    adapter = model.adapter
    if not adapter.strides or any(s < 1 for s in adapter.strides):
        raise UserError(f"model.adapter.strides = {list(adapter.strides)}: specify one positive stride per convolution")
    of_convolutions = adapter.strides[:-1] if adapter.kind == "stacked_convolutions" else adapter.strides
    if adapter.has_convolutions and adapter.kernel_size < max(of_convolutions, default=0):
        raise UserError(
            f"model.adapter.kernel_size = {adapter.kernel_size}: must be at least the largest stride, "
            f"{max(of_convolutions)}, so that no frames are skipped"
        )


def _check_encoder(place: str, encoder: EncoderConfig) -> None:
    if encoder.weights is None and not encoder.config:
        raise UserError(f"{place}: set weights (a directory or hub id), or config for random weights")
    allowed = family_of(encoder).length_modes
    if encoder.length_mode not in allowed:
        raise UserError(
            f"{place}.length_mode = {encoder.length_mode}: must be one of {', '.join(allowed)} for {encoder.family}"
        )
    silence = encoder.trailing_silence_sec
    if silence and encoder.length_mode != "trim":
        raise UserError(
            f"{place}.trailing_silence_sec = {silence}: needs length_mode = trim; set it, or remove the key"
        )
    if not 0 <= silence < encoder.window_sec:
        raise UserError(
            f"{place}.trailing_silence_sec = {silence}: must be 0 or more and below window_sec = {encoder.window_sec:g}"
        )
    check_weights(f"{place}.weights", encoder.weights)
    known = known_encoder(encoder)
    if known is not None:
        layers = resolve_encoder(known).hf_config.num_hidden_layers
        if layers < 1:
            raise UserError(f"{place}.config: {layers} layers; use at least 1")


def _check_lengths(recipe: Recipe, hf_config: PretrainedConfig) -> None:
    positions = num_positions(hf_config)
    if recipe.data.max_tokens is not None and recipe.data.max_tokens > positions:
        raise UserError(
            f"data.max_tokens = {recipe.data.max_tokens}: the LLM has only {positions} positions; lower it, or set it "
            "to null"
        )
    longest = recipe.data.max_audio_sec
    if longest is None:
        return
    audio_tokens = recipe.model.adapter.rate.tokens_of_samples(lengths.num_samples(longest))
    if audio_tokens >= positions:
        raise UserError(
            f"data.max_audio_sec = {longest}: such a clip takes {audio_tokens} of the LLM's {positions} positions "
            "(max_position_embeddings), which leaves none for text; lower it or raise model.adapter.strides"
        )


def _check_vocabulary(recipe: Recipe, hf_config: PretrainedConfig) -> None:
    tokenizer, rows = recipe.data.tokenizer, hf_config.vocab_size
    if tokenizer.path is None and tokenizer.train_vocab_size > rows:
        raise UserError(
            f"data.tokenizer.train_vocab_size = {tokenizer.train_vocab_size}: the LLM's vocab_size is {rows}; lower it"
        )


def _check_data(recipe: Recipe) -> None:
    data = recipe.data
    _check_lanes(recipe)
    if not data.datasets:
        raise UserError("data.datasets is empty: name at least one manifest or folder of shards")
    spoken = [task.name for task in TASKS.values() if task.is_transcription]
    may_hold_transcripts = any(not d.tasks or set(spoken) & set(d.tasks) for d in data.datasets)
    if recipe.model.ctc_weight > 0 and not may_hold_transcripts:
        raise UserError(
            f"model.ctc_weight = {recipe.model.ctc_weight}: CTC needs answers of the task {' or '.join(spoken)}, and "
            "none of data.datasets has it; add it or set model.ctc_weight=0"
        )
    _check_stop(recipe)
    read = {"final_split": recipe.eval.final_split}
    if recipe.eval.every_steps:
        read["split"] = recipe.eval.split
    for key, split in read.items():
        if split not in data.eval_splits:
            raise UserError(
                f"eval.{key} = {split}: must be one of data.eval_splits, which are {', '.join(data.eval_splits)}"
            )


def _check_stop(recipe: Recipe) -> None:
    after, metric, split = recipe.eval.stop_after, recipe.checkpoint.best_metric, recipe.eval.split
    without_llm = next((number for number, stage in enumerate(recipe.stages) if not stage.llm), None)
    if after and without_llm is not None:
        raise UserError(
            f"eval.stop_after = {after}: scores cannot improve in a stage without the LLM; remove it, or "
            f"stages.{without_llm}.llm"
        )
    if metric is not None and not any(metric.startswith(f"eval/{known}/") for known in recipe.data.eval_splits):
        raise UserError(
            f"checkpoint.best_metric = {metric}: must begin with eval/ and one of data.eval_splits: "
            f"e.g. {_example_metric(split)}"
        )
    _check_best_is(recipe)
    if not after:
        return
    if not recipe.eval.every_steps:
        raise UserError(f"eval.stop_after = {after}: needs evaluations; set eval.every_steps")
    if metric is None or not metric.startswith(f"eval/{split}/"):
        raise UserError(
            f"eval.stop_after = {after}: checkpoint.best_metric = {metric} must be a score of eval.split: "
            f"e.g. {_example_metric(split)}"
        )


def _example_metric(split: str) -> str:
    task = next(iter(TASKS.values()))
    return f"eval/{split}/{task.name}/{task.headlines[0]}"


def _check_best_is(recipe: Recipe) -> None:
    """Check that `checkpoint.best_is` fits a `checkpoint.best_metric` that is the main metric of a task."""
    metric, best_is = recipe.checkpoint.best_metric, recipe.checkpoint.best_is
    for task in TASKS.values() if metric is not None else ():
        right = "highest" if task.higher_is_better else "lowest"
        mains = {f"eval/{split}/{task.name}/{task.headlines[0]}" for split in recipe.data.eval_splits}
        if metric in mains and best_is != right:
            raise UserError(
                f"checkpoint.best_is = {best_is}: the best value of checkpoint.best_metric = {metric} is the {right}; "
                f"set checkpoint.best_is={right}"
            )


def _check_lanes(recipe: Recipe) -> None:
    data, parallel = recipe.data, recipe.parallel
    replicas = parallel.num_ranks // (parallel.tensor * parallel.context * parallel.pipeline)
    if data.global_batch_samples < replicas:
        raise UserError(
            f"data.global_batch_samples = {data.global_batch_samples}: {replicas} LLM replicas (parallel.num_ranks / "
            f"(tensor · context · pipeline)) would have less than one sample each; set it to a multiple of "
            f"data.num_lanes = {data.num_lanes}, at least {-(-replicas // data.num_lanes) * data.num_lanes}"
        )


def _check_steps(recipe: Recipe) -> None:
    steps, optim = recipe.train.steps, recipe.optim
    # In a run with stages, every stage has its own warm-up, which `staged_optim` checks.
    if optim.warmup_steps < 0 or (optim.warmup_steps > steps and not recipe.stages):
        raise UserError(f"optim.warmup_steps = {optim.warmup_steps}: must be within 0..{steps} (train.steps)")
    if len(recipe.profile.range) and recipe.profile.range[-1] > steps:
        raise UserError(f"profile.steps = {recipe.profile.steps}: ends after train.steps = {steps}; lower it")
    if recipe.eval.every_steps < 0:
        raise UserError(f"eval.every_steps = {recipe.eval.every_steps}: must be 0 (only at the end) or positive")
