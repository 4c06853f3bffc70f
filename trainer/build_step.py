"""Functions that build both engines with their initial weights, and the training step that uses them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PretrainedConfig

from model.audio_tower import AudioTower
from model.errors import UserError
from model.llm.names import Index
from model.llm.reference import resolve_hf_config, weight_source
from model.llm.weights import WeightSource, embedding_rms, symbol_embeddings
from model.lora import Adapters, adaptable_layers, add_adapters, llm_layers
from trainer.config.checks import deepspeed_json
from trainer.config.llm_checks import check_llm, check_router_losses
from trainer.config.schema import Recipe
from trainer.donors import Donors, find_donors
from trainer.engine.ds_config import build_ds_config
from trainer.engine.encoders import AudioEngine
from trainer.engine.llm import LLMEngine
from trainer.engine.llm_optimizer import Reduction
from trainer.engine.optim import check_patterns
from trainer.engine.placement import place
from trainer.engine.stages import check_stages
from trainer.parallel.exchange import gather_distinct
from trainer.parallel.groups import Groups
from trainer.telemetry.token_load import SampleKinds
from trainer.training.step import Step

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class WatchedSource:
    """A source of weights that calls `heartbeat` before each read."""

    def __init__(self, source: WeightSource, heartbeat: Callable[[str], None]) -> None:
        self._source, self._heartbeat = source, heartbeat
        self.shape, self.where = source.shape, source.where

    def read(self, name: str, index: Index) -> Tensor:
        """Implement `WeightSource.read`."""
        self._heartbeat(f"the read of {name}")
        return self._source.read(name, index)


def build_step(
    recipe: Recipe,
    groups: Groups,
    vocab_size: int,
    heartbeat: Callable[[str], None] = lambda what: None,
    kinds: SampleKinds | None = None,
    donors: Donors | None = None,
    piece_ids: Sequence[int] | None = None,
) -> Step:
    """Build both engines with their initial weights, and return the training step that uses them.

    Collective: every rank of the world must call it.

    Args:
        recipe: The recipe of the run.
        groups: The process groups of this rank.
        vocab_size: The size of the tokenizer's vocabulary.
        heartbeat: A function that is called with a description of each part before it is built.
        kinds: The kinds of samples whose tokens are counted separately; None to count tokens only by task.
        donors: The initial weights of the FFN experts; None to call `find_donors`.
        piece_ids: The ids of the pieces whose token embeddings `model.ctc_feedback` starts with (`Pieces.token_ids`);
            None to start with random weights.

    Raises:
        UserError: If weights are missing or do not fit, the tokenizer has more tokens than the LLM, or a pattern of
            `optim.parts` or `lora` matches nothing.
    """
    hf_config = resolve_hf_config(recipe.model.llm)
    check_llm(hf_config, recipe.parallel)
    check_router_losses(recipe.model, hf_config)
    if vocab_size > hf_config.vocab_size:
        raise UserError(
            f"data.tokenizer: has {vocab_size} tokens, but model.llm.config.vocab_size is only {hf_config.vocab_size}; "
            "use the LLM's own tokenizer, or a smaller data.tokenizer.train_vocab_size"
        )
    donors = donors or find_donors(recipe, hf_config, groups)
    source = WatchedSource(weight_source(recipe.model.llm, hf_config, recipe.seed, donors.sources), heartbeat)
    train, adapters = recipe.train, Adapters.of(recipe.lora, recipe.seed)
    llm = LLMEngine(
        hf_config,
        source,
        recipe.staged_optim,
        groups,
        _DTYPES[train.precision],
        train.recompute_llm,
        adapters,
        Reduction.of(recipe.parallel),
    )
    heartbeat("the encoders")
    torch.manual_seed(recipe.seed)
    held = place(recipe.model, groups.topology.ep).held_by(groups.rank)
    rms = embedding_rms(source, hf_config)
    symbols = None if piece_ids is None else symbol_embeddings(source, piece_ids)
    tower = AudioTower(recipe.model, hf_config.hidden_size, vocab_size, held, rms, symbols)
    layers = [name for name, _ in adaptable_layers(tower, "audio.")]
    add_adapters(tower, "audio.", adapters)
    audio = _audio_engine(recipe, tower, groups)
    held_names = [n for n, _ in audio.named_parameters()] + [llm.hf_name(n) for n, _ in llm.parameters()]
    _check_patterns(recipe, adapters, hf_config, layers, held_names, groups)
    # If a config enables dropout, the dropped values must differ between ranks.
    torch.manual_seed(recipe.seed + 1000 * groups.rank)
    return Step(
        recipe.model,
        recipe.staged_optim,
        audio,
        llm,
        groups,
        num_steps=train.steps,
        tokens_per_microbatch=train.llm_tokens_per_microbatch,
        seed=recipe.seed,
        pack_multiple_tokens=train.pack_multiple_tokens,
        debug_plan=train.debug_plan,
        spike=recipe.spike,
        kinds=kinds,
    )


def _audio_engine(recipe: Recipe, tower: AudioTower, groups: Groups) -> AudioEngine:
    """Return the engine that trains `tower`.

    Collective: every rank of the world must call it.
    """
    train = recipe.train
    tower.set_recompute(train.recompute_encoders)
    return AudioEngine(
        tower,
        recipe.staged_optim,
        build_ds_config(deepspeed_json(recipe), precision=train.precision),
        groups,
        train.encoder_batch_sec,
        train.debug_plan,
        gathering=train.gather_audio_weights,
        recompute_calls=train.recompute_encoder_calls,
    )


def _check_patterns(
    recipe: Recipe,
    adapters: Adapters,
    hf_config: PretrainedConfig,
    audio_layers: Sequence[str],
    parameters: Sequence[str],
    groups: Groups,
) -> None:
    """Check that every pattern of the recipe matches a layer or a parameter of the whole model.

    Collective: every rank of the world must call it.

    Args:
        recipe: The recipe of the run.
        adapters: The low-rank adapters.
        hf_config: The LLM's Hugging Face config.
        audio_layers: The layers of this rank's part of the audio side that adapters can be added to.
        parameters: The names of the parameters that this rank holds.
        groups: The process groups of this rank.

    Raises:
        UserError: If a pattern of `optim.parts`, of a stage or of `lora` matches nothing.
    """
    all_layers = gather_distinct(audio_layers, groups.world)
    all_names = gather_distinct(parameters, groups.world)
    adapters.check([*llm_layers(hf_config), *(name for names in all_layers for name in names)])
    everyones = [name for names in all_names for name in names]
    check_patterns(recipe.optim, everyones)
    check_stages(recipe.staged_optim, everyones)
