"""Reading a checkpoint back: what is damaged, and any rectangle of any tensor. Nothing is unpickled."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.errors import UserError
from trainer.checkpoint.layout import Manifest, Shard, key_of
from trainer.checkpoint.writer import hash_file

MANIFEST = "manifest.json"


class DamagedError(Exception):
    """A checkpoint that is not as it was written; names the file."""


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        DamagedError: it is missing or changed.
        UserError: it is of another format.
    """
    try:
        return Manifest.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DamagedError(f"{MANIFEST} is missing") from None
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise DamagedError(f"{MANIFEST} cannot be read ({error})") from None


def check_files(folder: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Compare files with the manifest.

    Raises:
        DamagedError: a file is missing, or has another size or content.
    """
    for name in names:
        wanted = manifest.files[name]
        try:
            size = (folder / name).stat().st_size
            if size != wanted.size_bytes:
                raise DamagedError(f"{name} has {size} bytes instead of {wanted.size_bytes}")
            if hash_file(folder / name) != wanted:
                raise DamagedError(f"{name} has another checksum than when it was written")
        except FileNotFoundError:
            raise DamagedError(f"{name} is missing") from None
        except OSError as error:
            raise DamagedError(f"{name} cannot be read ({error})") from None


class Reader:
    """Tensors of a verified checkpoint."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._open: dict[str, Any] = {}

    def check(self, shard: Shard) -> None:
        """Whether the checkpoint holds what `shard` needs.

        Raises:
            UserError: the checkpoint is of another model.
        """
        entry = self.manifest.tensors.get(shard.name)
        if entry is None:
            raise UserError(f"{self.folder}: holds no {shard.name}: it is of another model; restore the recipe")
        if entry.shape != shard.shape:
            raise UserError(
                f"{self.folder}: {shard.name} has shape {entry.shape}, the model's is {shard.shape}; restore the recipe"
            )
        if shard.step is not None and entry.step is None:
            raise UserError(
                f"{self.folder}: {shard.name} was frozen and has no optimizer state, and is to learn now; "
                "restore optim.parts, or start a new run"
            )

    def fill(self, shard: Shard) -> None:
        """Read the shard's rectangle, of every kind, into its memory; pieces are cut as needed."""
        found = []
        for file, rect in self.manifest.tensors[shard.name].pieces:
            common = rect.overlap(shard.rect)
            if common is not None:
                found.append((file, rect, common))
        covered = sum(common.numel for *_, common in found)
        assert covered == shard.rect.numel, f"{shard.name}: {covered} of {shard.rect.numel} elements are there"
        for kind, target in shard.values.items():
            for file, rect, common in found:
                part = self._slice(file, key_of(shard.name, kind, rect))[common.within(rect)]
                target[common.within(shard.rect)].copy_(part)

    def tensors(self, file: str) -> dict[str, Tensor]:
        """All tensors of one file."""
        handle = self._handle(file)
        return {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 (not a dict)

    def learned(self) -> dict[str, int]:
        """Updates made to each learned tensor."""
        return {n: e.step for n, e in self.manifest.tensors.items() if e.step is not None}

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            self._open[file] = safe_open(str(self.folder / file), framework="pt").__enter__()
        return self._open[file]

    def _slice(self, file: str, key: str) -> Any:
        try:
            return self._handle(file).get_slice(key)
        except SafetensorError as error:
            raise UserError(f"{self.folder / file}: {key} is not in it ({error})") from error
