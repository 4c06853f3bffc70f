"""The donors of FFN experts: the runs, checkpoints or exports from which the experts get their initial weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from model.config import LLMConfig
from model.errors import UserError
from model.llm.families import modules_of
from model.llm.mixture import BASE, ExpertConfig
from model.llm.names import Index
from model.llm.reference import dense_config, resolve_hf_config, weight_source
from model.llm.weights import RandomSource, WeightSource
from model.lora import LLM, NO_ADAPTERS, Adapters
from trainer.checkpoint.catalog import SUBFOLDER, find_checkpoint, open_checkpoints, read_extra
from trainer.checkpoint.folder import read_text
from trainer.checkpoint.llm_state import rect_of
from trainer.checkpoint.origin import Origin, is_export, open_origin, read_export_config
from trainer.checkpoint.reader import MANIFEST, STATE, DamagedError, check_files, read_manifest
from trainer.checkpoint.rect import matrix_of
from trainer.config.load import parse_stored_recipe
from trainer.config.provenance import Provenance
from trainer.config.schema import Recipe
from trainer.parallel.groups import Groups
from trainer.parallel.values import broadcast_value
from trainer.storage.open import join_url

_ARCHITECTURE = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers")


class DonorSource:
    """The LLM's weights in a run, checkpoint or export, with low-rank adapters merged. It implements `WeightSource`.

    Args:
        origin: The stored weights.
        adapters: The settings of the low-rank adapters that the stored weights contain.
    """

    def __init__(self, origin: Origin, adapters: Adapters) -> None:
        self._origin, self._adapters = origin, adapters

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Implement `WeightSource`."""
        return self._origin.shape(LLM + name)

    def read(self, name: str, index: Index) -> Tensor:
        """Implement `WeightSource`; the result is in fp32."""
        rows, columns = index if len(index) > 1 else (index[0], slice(None))
        weight = self._read(LLM + name, rows, columns)
        layer = LLM + name.removesuffix(".weight")
        if self._origin.shape(f"{layer}.lora_A") is not None:
            part = self._adapters.of_layer(layer)
            assert part is not None, f"{layer}: the recipe in the checkpoint has no adapter there"
            a = self._read(f"{layer}.lora_A", slice(None), columns)
            b = self._read(f"{layer}.lora_B", rows, slice(None))
            weight = weight.addmm(b, a, alpha=part.scale)
        return weight if len(index) > 1 else weight.flatten()

    def where(self, name: str) -> str:
        """Implement `WeightSource`."""
        return self._origin.url

    def _read(self, name: str, rows: slice, columns: slice) -> Tensor:
        shape = self._origin.shape(name)
        assert shape is not None, name
        rect = rect_of((rows, columns), matrix_of(shape))
        target = torch.empty(rect.rows, rect.cols)
        self._origin.read(name, rect, target)
        return target


@dataclass(frozen=True)
class Donors:
    """The initial weights of the FFN experts of a run."""

    sources: Mapping[str, WeightSource]
    """The weights, by the expert's name. Experts that are copied from `base` are not listed."""
    origins: list[dict[str, Any]]
    """The origin of every expert as `provenance` returns it; empty on ranks other than 0, and if the run resumes."""


def find_donors(recipe: Recipe, hf_config: PretrainedConfig, groups: Groups) -> Donors:
    """Return the initial weights of the FFN experts.

    Collective: every rank of the world must call it. Rank 0 checks the donors' files and hashes their tensors. This may
    take many minutes, so no watchdog may be active. If the run has a checkpoint, the experts are later read from it. In
    this case, the donors no longer need to exist, and the returned weights are random.

    Args:
        recipe: The recipe of the run.
        hf_config: The LLM's Hugging Face config, including its FFN experts.
        groups: The process groups of this rank.

    Raises:
        UserError: If a donor is missing or damaged, or its LLM has another architecture.
    """
    experts = [expert for expert in recipe.model.llm.experts if expert.from_ != BASE]
    if not recipe.model.llm.experts:
        return Donors({}, [])
    found: bool | str = False
    origins: list[dict[str, Any]] = []
    if groups.rank == 0:
        try:
            found = bool(open_checkpoints(join_url(recipe.run_url, SUBFOLDER)).steps())
            if not found:
                for expert in experts:
                    _check_files(expert)
                origins = provenance(recipe.model.llm, recipe.seed)
        except UserError as error:
            found = str(error)
    found = broadcast_value(found, groups.world)
    if isinstance(found, str):
        raise UserError(found)
    dense = dense_config(hf_config)
    if found:
        return Donors({expert.name: RandomSource(dense, recipe.seed) for expert in experts}, [])
    return Donors({expert.name: _open(expert, dense) for expert in experts}, origins)


def provenance(config: LLMConfig, seed: int) -> list[dict[str, Any]]:
    """Return the fields of `Provenance` for every FFN expert. All weights of the experts are read and hashed.

    Args:
        config: The recipe's section `model.llm`.
        seed: The seed of the recipe.

    Raises:
        UserError: If the weights of a donor cannot be used.
    """
    hf_config = resolve_hf_config(config)
    donors = {e.name: _open(e, dense_config(hf_config)) for e in config.experts if e.from_ != BASE}
    source = weight_source(config, hf_config, seed, donors)
    return [asdict(_provenance(expert, hf_config, source)) for expert in config.experts]


def _check_files(expert: ExpertConfig) -> None:
    """Check that the files of a donor are undamaged."""
    if is_export(expert.from_):
        return
    folder = find_checkpoint(expert.from_)
    try:
        manifest = read_manifest(folder)
        check_files(folder, manifest, {f for e in manifest.tensors.values() for f, _ in e.pieces()} | {STATE})
    except DamagedError as error:
        raise UserError(f"{_key(expert)} = {expert.from_}: {folder.url}: {error}; name another checkpoint") from None


def _provenance(expert: ExpertConfig, hf_config: PretrainedConfig, source: WeightSource) -> Provenance:
    tensors = _digest(expert, hf_config, source)
    if expert.from_ == BASE or is_export(expert.from_):
        return Provenance(expert.name, expert.from_, "", None, "", (), "", tensors)
    folder = find_checkpoint(expert.from_)
    recipe = _recipe_of(expert)
    return Provenance(
        name=expert.name,
        origin=expert.from_,
        run=recipe.name,
        step=read_manifest(folder).step,
        recipe=hashlib.sha256(read_extra(folder)["recipe"].encode()).hexdigest(),
        datasets=tuple(str(d.manifest or d.shards) for d in recipe.data.datasets),
        checkpoint=hashlib.sha256(read_text(folder, MANIFEST).encode()).hexdigest(),
        tensors=tensors,
    )


def _digest(expert: ExpertConfig, hf_config: PretrainedConfig, source: WeightSource) -> str:
    modules, found = modules_of(hf_config), hashlib.sha256()
    for n in hf_config.ffn_experts["layers"]:
        for role in ("expert_gate", "expert_up", "expert_down"):
            name = f"{modules['layer'].format(n=n)}.{modules[role].format(e=expert.name)}.weight"
            found.update(source.read(name, (slice(None), slice(None))).float().contiguous().numpy().data)
    return found.hexdigest()


def _open(expert: ExpertConfig, hf_config: PretrainedConfig) -> WeightSource:
    url = expert.from_
    exported = is_export(url)
    described = read_export_config(url) if exported else read_extra(find_checkpoint(url))["model"]
    for key in _ARCHITECTURE:
        found, wanted = described["text_config"].get(key), getattr(hf_config, key)
        if found != wanted:
            raise UserError(
                f"{_key(expert)} = {url}: its LLM has {key} = {found} instead of {wanted}; name a run of the same LLM"
            )
    adapters = NO_ADAPTERS if exported else Adapters(_recipe_of(expert).lora)
    return DonorSource(open_origin(url, exported), adapters)


def _recipe_of(expert: ExpertConfig) -> Recipe:
    folder = find_checkpoint(expert.from_)
    return parse_stored_recipe(read_extra(folder)["recipe"], f"{folder.url}/{STATE}")


def _key(expert: ExpertConfig) -> str:
    return f"model.llm.experts ({expert.name}): from"
