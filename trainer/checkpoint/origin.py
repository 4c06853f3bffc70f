"""What a new run may begin with: a checkpoint, the newest one of a run, or an export; in a folder or a bucket."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from model.errors import UserError
from trainer.checkpoint.bucket_folder import BucketFolder
from trainer.checkpoint.catalog import find_checkpoint, read_extra
from trainer.checkpoint.folder import Folder, LocalFolder
from trainer.checkpoint.layout import PARAM, Rect, matrix_of
from trainer.checkpoint.reader import Reader, read_manifest
from trainer.checkpoint.tensor_file import TensorFile
from trainer.storage.open import open_store, scheme_of

CONFIG = "config.json"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_KIND = "earshot"


class Origin(Protocol):
    """Weights by the names under which a checkpoint saves them."""

    url: str
    experts: tuple[str, ...]
    """Names of its encoders behind the router, in order."""

    def names(self) -> Collection[str]:
        """Return the names of all tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Of a whole tensor; None: there is no such tensor."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor, as it is stored."""
        ...

    def read(self, name: str, wanted: Rect, target: Tensor) -> None:
        """Read a rectangle of a tensor's matrix into `target` [rows, cols], brought to its dtype."""
        ...


class CheckpointOrigin:
    """See `Origin`. The files are to be verified by whoever makes this object."""

    def __init__(self, folder: Folder) -> None:
        self.url = folder.url
        self._reader = Reader(folder, read_manifest(folder))
        self.experts = tuple(e["name"] for e in read_extra(folder)["model"]["audio"]["experts"])

    def names(self) -> Collection[str]:
        return self._reader.manifest.tensors

    def shape(self, name: str) -> tuple[int, ...] | None:
        entry = self._reader.manifest.tensors.get(name)
        return None if entry is None else entry.shape

    def dtype(self, name: str) -> torch.dtype:
        return self._reader.dtype(name, PARAM)

    def read(self, name: str, wanted: Rect, target: Tensor) -> None:
        self._reader.read_rect(name, PARAM, wanted, target)


class ExportOrigin:
    """See `Origin`: a folder that `tools.export` made.

    Raises:
        UserError: files are missing or are no safetensors files.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.experts = tuple(e["name"] for e in read_export_config(url)["audio"]["experts"])
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

    def names(self) -> Collection[str]:
        return self._shapes

    def shape(self, name: str) -> tuple[int, ...] | None:
        return self._shapes.get(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._files[name].spans[name].dtype

    def read(self, name: str, wanted: Rect, target: Tensor) -> None:
        whole = matrix_of(self._shapes[name])
        self._files[name].copy_part(name, wanted.within(whole), target)


def _open(folder: Folder, name: str) -> TensorFile:
    try:
        return TensorFile(folder, name)
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder.url}/{name}: cannot be read ({error}); export it again") from None


def is_export(url: str) -> bool:
    """Whether a model folder of the kind that `tools.export` makes is at `url`, and no checkpoint."""
    return open_store(url).exists(CONFIG)


def read_export_config(url: str) -> dict[str, Any]:
    """Return the config.json of an export.

    Raises:
        UserError: it is of another kind of model.
    """
    content = open_store(url).get(CONFIG)
    try:
        config = json.loads(content)
    except ValueError:
        raise UserError(f"{url}/{CONFIG}: is not JSON; export it again") from None
    if not isinstance(config, dict) or config.get("model_type") != _KIND:
        raise UserError(
            f"{url}: holds another kind of model than this program trains; name an LLM alone in model.llm.weights, "
            "or give a run, a checkpoint, or a whole export"
        )
    return config


def open_origin(url: str, exported: bool) -> Origin:
    """Return the weights of the export, or the verified checkpoint, at `url`.

    Raises:
        UserError: there is none.
    """
    return ExportOrigin(url) if exported else CheckpointOrigin(find_checkpoint(url))
