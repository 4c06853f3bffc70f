"""Access to the weights from which a new run can start: a checkpoint, the newest checkpoint of a run, or an export.

The weights may be stored in a folder or in a bucket.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import yaml
from torch import Tensor

from model.config import LoraConfig
from model.errors import UserError
from model.llm.families import LLM_FAMILIES
from trainer.checkpoint.bucket_folder import BucketFolder
from trainer.checkpoint.catalog import find_checkpoint, read_extra
from trainer.checkpoint.folder import Folder, LocalFolder
from trainer.checkpoint.layout import PARAM
from trainer.checkpoint.reader import Reader, read_manifest
from trainer.checkpoint.rect import Rect, matrix_of
from trainer.checkpoint.signing import VARIABLE, signing_key
from trainer.checkpoint.tensor_file import TensorFile
from trainer.storage.open import open_store, scheme_of

if TYPE_CHECKING:
    from model.llm.stacked import Part  # This module imports transformers.

CONFIG = "config.json"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_KIND = "earshot"
_LLM = "llm."


def stored_adapters(recipe: str | None) -> tuple[LoraConfig, ...]:
    """Return the section `lora` of a recipe that is stored in a checkpoint.

    Args:
        recipe: The recipe as YAML. If it is None or empty, there are no adapters.

    Raises:
        UserError: If the text is not a recipe of this version.
    """
    try:
        tree = yaml.safe_load(recipe or "") or {}
        return tuple(LoraConfig(**entry) for entry in tree.get("lora") or ())
    except (yaml.YAMLError, TypeError, AttributeError) as error:
        raise UserError(f"the recipe in the checkpoint cannot be read ({error}); use another checkpoint") from None


class Origin(Protocol):
    """Saved weights, which are addressed by the names that checkpoints use."""

    url: str
    experts: tuple[str, ...]
    """The names of the encoder experts, in order."""
    lora: tuple[LoraConfig, ...]
    """The settings of the low-rank adapters in the weights; empty if there are no adapters, or if their settings are
    unknown."""

    def names(self) -> Collection[str]:
        """Return the names of all tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a whole tensor, or None if there is no such tensor."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """Return the stored dtype of a tensor."""
        ...

    def read(self, name: str, wanted: Rect, target: Tensor) -> None:
        """Read a rectangle of a tensor's matrix into `target` [rows, cols], converted to the dtype of `target`."""
        ...

    def learned(self) -> Mapping[str, int]:
        """Return the number of updates of each tensor that has moments."""
        ...

    def read_moment(self, name: str, kind: str, wanted: Rect, target: Tensor) -> None:
        """Read a rectangle of a moment into `target` [rows, cols]. The tensor must be in `learned`."""
        ...


class CheckpointOrigin:
    """The weights in a checkpoint; implements `Origin`. The caller must verify the files."""

    def __init__(self, folder: Folder) -> None:
        self.url = folder.url
        self._reader = Reader(folder, read_manifest(folder))
        extra = read_extra(folder)
        self.experts = _expert_names(extra.get("model"), folder.url)
        self.lora = stored_adapters(extra.get("recipe"))

    def names(self) -> Collection[str]:
        return self._reader.manifest.tensors

    def shape(self, name: str) -> tuple[int, ...] | None:
        entry = self._reader.manifest.tensors.get(name)
        return None if entry is None else entry.shape

    def dtype(self, name: str) -> torch.dtype:
        return self._reader.dtype(name, PARAM)

    def read(self, name: str, wanted: Rect, target: Tensor) -> None:
        self._reader.read_rect(name, PARAM, wanted, target)

    def learned(self) -> Mapping[str, int]:
        return self._reader.learned()

    def read_moment(self, name: str, kind: str, wanted: Rect, target: Tensor) -> None:
        self._reader.read_rect(name, kind, wanted, target)


class ExportOrigin:
    """The weights in a folder that `tools.export` wrote; implements `Origin`.

    Raises:
        UserError: If files are missing or are not safetensors files, or if weights must be signed.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        if signing_key() is not None:
            raise UserError(f"{self.url}: exports are not signed; start from a signed checkpoint, or unset {VARIABLE}")
        config = read_export_config(url)
        self.lora: tuple[LoraConfig, ...] = ()  # In an export, the adapters are merged into the weights.
        self.experts = _expert_names(config, self.url)
        above, _, name = self.url.rpartition("/")
        remote = bool(scheme_of(url))
        folder: Folder = BucketFolder(open_store(above), self.url, name) if remote else LocalFolder(Path(self.url))
        store = open_store(self.url)
        names = [_WEIGHTS]
        if store.exists(_INDEX):
            names = sorted(set(json.loads(store.get(_INDEX))["weight_map"].values()))
        self._files: dict[str, TensorFile] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for file in (_open(folder, name) for name in names):
            for key, span in file.spans.items():
                matrix = matrix_of(span.shape)
                self._shapes[key], self._files[key] = span.shape, file
                file.spans[key] = replace(span, shape=(matrix.rows, matrix.cols))
        self._parts: dict[str, tuple[str, Part]] = {}
        """Name of a tensor of an expert → the name of the exported tensor that contains it, and its part in that
        tensor. The mapping is empty unless the LLM's experts are stored together."""
        self._separate_experts(config.get("text_config", {}))

    def _separate_experts(self, text_config: Mapping[str, Any]) -> None:
        family = LLM_FAMILIES.get(text_config.get("model_type", ""))
        if family is None or not family.stacks_experts:
            return
        from transformers import AutoConfig

        from model.llm.stacked import stacked_tensors

        for name, stacked in stacked_tensors(AutoConfig.for_model(**text_config)).items():
            shape = self._shapes.pop(_LLM + name, None)
            if shape != stacked.shape:
                raise UserError(f"{self.url}: {_LLM}{name} has shape {shape}, not {stacked.shape}; export it again")
            for part in stacked.parts:
                self._parts[_LLM + part.name] = (_LLM + name, part)
                self._shapes[_LLM + part.name] = tuple(part.of(torch.empty(shape, device="meta")).shape)

    def names(self) -> Collection[str]:
        return self._shapes

    def shape(self, name: str) -> tuple[int, ...] | None:
        return self._shapes.get(name)

    def dtype(self, name: str) -> torch.dtype:
        stored, _ = self._parts.get(name, (name, None))
        return self._files[stored].spans[stored].dtype

    def read(self, name: str, wanted: Rect, target: Tensor) -> None:
        whole = matrix_of(self._shapes[name])
        if name in self._parts:
            stored, part = self._parts[name]
            published = self._files[stored].spans[stored]
            row = torch.empty(1, published.shape[1], dtype=published.dtype)
            self._files[stored].copy_part(stored, (slice(part.expert, part.expert + 1), slice(None)), row)
            own = part.of_row(row[0], self._shapes[name]).reshape(whole.rows, whole.cols)
            target.copy_(own[wanted.within(whole)])
            return
        self._files[name].copy_part(name, wanted.within(whole), target)

    def learned(self) -> Mapping[str, int]:
        return {}

    def read_moment(self, name: str, kind: str, wanted: Rect, target: Tensor) -> None:
        raise AssertionError(f"{self.url}: an export has no moments")


def _expert_names(description: Any, where: str) -> tuple[str, ...]:
    """Return the names of the encoder experts in a model description.

    Raises:
        UserError: If the description has no valid names.
    """
    try:
        names = tuple(e["name"] for e in description["audio"]["experts"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{where}: does not describe its encoders ({error!r}); use another checkpoint") from None
    if not all(isinstance(name, str) for name in names):
        raise UserError(f"{where}: names encoders {names!r:.80}, which are not strings; use another checkpoint")
    return names


def _open(folder: Folder, name: str) -> TensorFile:
    try:
        return TensorFile(folder, name)
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder.url}/{name}: cannot be read ({error}); export it again") from None


def is_export(url: str) -> bool:
    """Return whether `url` is a folder that `tools.export` wrote, rather than a run or a checkpoint."""
    return open_store(url).exists(CONFIG)


def read_export_config(url: str) -> dict[str, Any]:
    """Return the config.json of an export.

    Raises:
        UserError: If the file is not JSON or describes a different kind of model.
    """
    content = open_store(url).get(CONFIG)
    try:
        config = json.loads(content)
    except (ValueError, RecursionError):
        raise UserError(f"{url}/{CONFIG}: is not JSON; export it again") from None
    if not isinstance(config, dict) or config.get("model_type") != _KIND:
        raise UserError(
            f"{url}: holds a model of a kind that this program does not train; use a run, a checkpoint or an export, "
            "and name the weights of an LLM without encoders in model.llm.weights"
        )
    return config


def open_origin(url: str, exported: bool) -> Origin:
    """Return the weights at `url`.

    Args:
        url: An export, or a checkpoint that has been verified.
        exported: Whether it is an export.

    Raises:
        UserError: If there are no weights, or they cannot be read.
    """
    return ExportOrigin(url) if exported else CheckpointOrigin(find_checkpoint(url))
