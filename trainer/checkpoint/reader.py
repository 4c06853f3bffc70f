"""Verify checkpoints, and read rectangles of their tensors. No data is unpickled."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from model.config import is_factor
from model.errors import UserError
from trainer.checkpoint.folder import Folder, read_text
from trainer.checkpoint.layout import Shard, file_of_kind, key_of
from trainer.checkpoint.manifest import FileEntry, Manifest
from trainer.checkpoint.rect import Rect
from trainer.checkpoint.signing import SHA256_CHARACTERS, new_digest, signing_key
from trainer.checkpoint.tensor_file import TensorFile

MANIFEST, STATE = "manifest.json", "state.json"
_CHUNK_BYTES = 1 << 19  # A chunk of this size is still in the CPU's cache when it is hashed.
_NUM_HASHERS = 4
_ON_ITS_OWN = FileEntry(0, "")
"""The entry of a file that is stored under its own name."""


class DamagedError(Exception):
    """Raised when a file of a checkpoint is missing or was changed. The message names the file."""


def read_manifest(folder: Folder, check_signature: bool = True) -> Manifest:
    """Return the manifest of a checkpoint.

    Args:
        folder: The checkpoint.
        check_signature: Whether to refuse a manifest without a valid signature if a key is set.

    Raises:
        DamagedError: If the manifest is missing or was changed.
        UserError: If the manifest has a different format version, or is not signed although a key is set.
    """
    return parse_manifest(folder, manifest_text(folder), check_signature)


def manifest_text(folder: Folder) -> str:
    """Return the text of a checkpoint's manifest.

    Raises:
        DamagedError: If it cannot be read.
    """
    try:
        return read_text(folder, MANIFEST)
    except FileNotFoundError:
        raise DamagedError(f"{MANIFEST} is missing") from None
    except (ValueError, OSError, EOFError) as error:
        raise DamagedError(f"{MANIFEST} cannot be read ({error})") from None


def parse_manifest(folder: Folder, text: str, check_signature: bool = True) -> Manifest:
    """Return a manifest from the text that `manifest_text` returned; see `read_manifest`."""
    try:
        return Manifest.loads(text, signing_key() if check_signature else None)
    except UserError as error:
        raise UserError(f"{folder.url}: {error}") from None
    except (
        ValueError,
        ArithmeticError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        OSError,
        EOFError,
    ) as error:
        raise DamagedError(f"{MANIFEST} cannot be read ({error})") from None


def check_files(
    folder: Folder, manifest: Manifest, names: Iterable[str], heartbeat: Callable[[str], None] = lambda what: None
) -> None:
    """Check that the sizes and contents of files match the manifest.

    Args:
        folder: The checkpoint.
        manifest: Its manifest.
        names: The files to check.
        heartbeat: A function that is called with a description of each file before it is read.

    Raises:
        DamagedError: If a file is missing, or its size or content differs.
    """

    def damage(name: str) -> str | None:
        wanted = manifest.files[name]
        heartbeat(f"the check of {name}")
        try:
            size = _stored_bytes(folder, name, wanted)
            if size != wanted.size_bytes:
                return f"{name} has {size} bytes instead of {wanted.size_bytes}"
            found = hash_file(folder, name, len(wanted.checksum) == SHA256_CHARACTERS, wanted)
            if found.checksum != wanted.checksum:
                return f"{name} has a different checksum than when it was written"
        except FileNotFoundError:
            return f"{name} is missing"
        except (OSError, EOFError) as error:
            return f"{name} cannot be read ({error})"
        return None

    with ThreadPoolExecutor(_NUM_HASHERS) as pool:
        for found in pool.map(damage, names):
            if found is not None:
                raise DamagedError(found)


def hash_file(folder: Folder, name: str, cryptographic: bool = False, stored: FileEntry = _ON_ITS_OWN) -> FileEntry:
    """Return the current size and checksum of a file.

    Args:
        folder: The folder that contains the file.
        name: The name of the file.
        cryptographic: True for the SHA-256, False for the XXH3-128.
        stored: The manifest's entry for the file, if it may be stored in a joined file.
    """
    digest, size = new_digest(cryptographic), _stored_bytes(folder, name, stored)
    buffer = memoryview(bytearray(min(_CHUNK_BYTES, size)))
    for at in range(0, size, _CHUNK_BYTES):
        part = buffer[: min(_CHUNK_BYTES, size - at)]
        folder.read_into(stored.stored_in or name, stored.offset + at, part)
        digest.update(part)
    return replace(stored, size_bytes=size, checksum=digest.hexdigest())


def _stored_bytes(folder: Folder, name: str, stored: FileEntry) -> int:
    """Return the current size of a file, which is less than `stored.size_bytes` if the file was truncated."""
    if stored.stored_in is None:
        return folder.size_bytes(name)
    return min(stored.size_bytes, max(0, folder.size_bytes(stored.stored_in) - stored.offset))


class Reader:
    """A reader of the tensors of a verified checkpoint."""

    def __init__(self, folder: Folder, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._open: dict[str, TensorFile] = {}

    def check(self, shard: Shard) -> None:
        """Check that the checkpoint contains what `shard` needs.

        Raises:
            UserError: If the checkpoint belongs to a different model.
        """
        entry = self.manifest.tensors.get(shard.name)
        if entry is None and is_factor(shard.name):
            raise UserError(
                f"{self.folder.url}: holds no {shard.name}: the run was trained without this adapter; restore the "
                "section lora, or start a new run with checkpoint.start_from"
            )
        if entry is None:
            raise UserError(
                f"{self.folder.url}: holds no {shard.name}, so it belongs to another model; restore the recipe"
            )
        if entry.shape != shard.shape:
            raise UserError(
                f"{self.folder.url}: {shard.name} has shape {entry.shape}, but the model's is {shard.shape}; "
                "restore the recipe"
            )
        if shard.step is not None and entry.step is None:
            raise UserError(
                f"{self.folder.url}: {shard.name} was frozen, so there is no optimizer state to train it with; "
                "restore optim.parts, or start a new run"
            )

    def fill(self, shard: Shard) -> None:
        """Read the shard's rectangle of every kind of value into the shard's memory."""
        for kind, target in shard.values.items():
            self.read_rect(shard.name, kind, shard.rect, target)

    def read_rect(self, name: str, kind: str, wanted: Rect, target: Tensor) -> None:
        """Read a rectangle of a tensor's matrix into `target` [rows, cols], converted to the dtype of `target`."""
        found = []
        for file, rect in self.manifest.tensors[name].pieces(wanted):
            common = rect.overlap(wanted)
            assert common is not None
            found.append((file, rect, common))
        covered = sum(common.numel for *_, common in found)
        assert covered == wanted.numel, f"{name}: {covered} of {wanted.numel} elements are saved"
        for file, rect, common in found:
            file = file_of_kind(file, kind)
            key = self._key(file, name, kind, rect)
            self.file(file).copy_part(key, common.within(rect), target[common.within(wanted)])

    def dtype(self, name: str, kind: str) -> torch.dtype:
        """Return the saved dtype of a tensor's values of one kind."""
        file, rect = next(self.manifest.tensors[name].pieces())
        file = file_of_kind(file, kind)
        return self.file(file).spans[self._key(file, name, kind, rect)].dtype

    def tensors(self, file: str) -> dict[str, Tensor]:
        """Return all tensors of one file by key."""
        found = self.file(file)
        return {key: found.read(key) for key in found.spans}

    def learned(self) -> dict[str, int]:
        """Return the number of updates of each trained tensor."""
        return {n: e.step for n, e in self.manifest.tensors.items() if e.step is not None}

    def file(self, name: str) -> TensorFile:
        """Open a safetensors file, or return it if it is already open."""
        if name not in self._open:
            try:
                self._open[name] = TensorFile(self.folder, name, self.manifest.files[name])
            except UserError:
                raise
            except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
                raise DamagedError(f"{name} cannot be read ({error})") from error
        return self._open[name]

    def _key(self, file: str, name: str, kind: str, rect: Rect) -> str:
        key = key_of(name, kind, rect)
        if key not in self.file(file).spans:
            raise UserError(
                f"{self.folder.url}: {file} holds no {key}, which the manifest lists; use another checkpoint"
            )
        return key
