"""The manifest of a checkpoint, `manifest.json`, which lists its tensors and files."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from model.errors import UserError
from model.json_text import parse_json
from trainer.checkpoint.layout import Slices, TensorEntry, files_of, frozen_folder_of
from trainer.checkpoint.rect import Rect, matrix_of
from trainer.checkpoint.signing import SHA256_CHARACTERS, VARIABLE, is_signed, sign

FORMAT_VERSION = 5
_READABLE_VERSIONS = (3, 4, 5)
"""Version 4 added `TensorEntry.slices`, and version 5 `FileEntry.stored_in`."""

_FILE_NAME = re.compile(r"(frozen-[0-9a-f-]+/)?[a-z]+(-\d+)?\.(safetensors|json)")
_JOINED_NAME = re.compile(r"(frozen-[0-9a-f-]+/)?node-\d+\.joined")
_CHECKSUM = re.compile(r"[0-9a-f]{32}|[0-9a-f]{64}")


@dataclass(frozen=True)
class FileEntry:
    """The manifest's entry for one file."""

    size_bytes: int
    checksum: str
    """The checksum in hexadecimal: an XXH3-128, which detects accidental damage, or a SHA-256 in signed checkpoints."""
    stored_in: str | None = None
    """The joined file of a node that contains this file; None if it is stored under its own name."""
    offset: int = 0
    """The position of the first byte in the joined file."""


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`, which is needed to read a checkpoint and to verify it."""

    step: int
    topology: Mapping[str, int]
    """The sizes `world`, `tp`, `pp` and `ep` of the topology that saved the checkpoint, and `cp` if it is above 1. The
    states of random generators are restored only on a topology with the same sizes."""
    files: Mapping[str, FileEntry]
    tensors: Mapping[str, TensorEntry]

    def dumps(self, key: bytes | None = None) -> str:
        """Return the manifest as JSON text, which includes a checksum of its contents.

        Args:
            key: The key with which the manifest is signed; None for no signature.
        """
        body = {
            "version": FORMAT_VERSION,
            "step": self.step,
            "topology": dict(self.topology),
            "files": {name: _file_to_json(f) for name, f in self.files.items()},
            "tensors": {name: _entry_to_json(entry) for name, entry in self.tensors.items()},
        }
        tree = {"sha256": _digest(body), "body": body}
        if key is not None:
            tree["hmac"] = sign(key, _canonical(body))
        return json.dumps(tree, separators=(",", ":"))

    @staticmethod
    def loads(text: str, key: bytes | None = None) -> Manifest:
        """Parse the text that `dumps` returned.

        Args:
            text: The text.
            key: The key with which the manifest must be signed. None accepts any signature, or none.

        Raises:
            ValueError: If the text was changed or is not a manifest.
            UserError: If the manifest has a format version that this program does not read, or is not signed.
        """
        tree = parse_json(text)
        if not isinstance(tree, dict) or set(tree) - {"hmac"} != {"sha256", "body"}:
            raise ValueError("it is not a manifest")
        body = tree["body"]
        if key is not None and not is_signed(key, _canonical(body), tree.get("hmac")):
            raise UserError(
                f"manifest.json is not signed with the key in {VARIABLE}; use another checkpoint, or, if you trust "
                "this one, sign it with `earshot checkpoints RUN sign`"
            )
        if tree["sha256"] != _digest(body):
            raise ValueError("its checksum differs")
        if not isinstance(body, dict):
            raise ValueError("its content is not a JSON object")
        if body.get("version") not in _READABLE_VERSIONS:
            known = " and ".join(map(str, _READABLE_VERSIONS))
            raise UserError(f"checkpoint format {body.get('version')!r}: this program reads {known}")
        try:
            manifest = Manifest._of(body)
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"malformed ({error!r})") from None
        if key is not None and any(len(f.checksum) != SHA256_CHARACTERS for f in manifest.files.values()):
            raise ValueError("it is signed, but not all of its files have a SHA-256")
        return manifest

    @staticmethod
    def _of(body: Mapping[str, Any]) -> Manifest:
        manifest = Manifest(
            step=int(body["step"]),
            topology={str(k): int(v) for k, v in body["topology"].items()},
            files={_file_name(name): _file_from_json(name, *entry) for name, entry in body["files"].items()},
            tensors={name: _entry_from_json(name, entry) for name, entry in body["tensors"].items()},
        )
        if missing := sorted(files_of(manifest.tensors.values()) - set(manifest.files)):
            raise ValueError(f"{missing[0]} contains a tensor but is not listed")
        return manifest


def _canonical(body: Any) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


def _digest(body: Any) -> str:
    return hashlib.sha256(_canonical(body)).hexdigest()


def _entry_to_json(entry: TensorEntry) -> dict[str, Any]:
    tree = {"shape": list(entry.shape), "kinds": list(entry.kinds), "step": entry.step}
    if entry.slices is None:
        return {**tree, "pieces": [[file, *rect] for file, rect in entry.listed]}
    ranks = entry.slices.ranks
    return {**tree, "slices": [entry.family, ranks.start, ranks.stop, ranks.step, entry.slices.numel]}


def _entry_from_json(name: str, tree: Mapping[str, Any]) -> TensorEntry:
    shape = tuple(int(n) for n in tree["shape"])
    step = None if tree["step"] is None else int(tree["step"])
    kinds, whole = tuple(map(str, tree["kinds"])), matrix_of(shape)
    if "slices" in tree:
        family, *numbers = tree["slices"]
        start, stop, stride, numel = map(int, numbers)
        slices = Slices(range(start, stop, stride), numel)
        entry = TensorEntry(shape, kinds, step, (), slices, str(family))
        if numel < 1 or start < 0 or stride < 1 or entry.num_slices > len(slices.ranks):
            raise ValueError(f"{name}: {tree['slices']} does not describe slices of the tensor")
        return entry
    pieces = tuple((str(file), Rect(*map(int, rect))) for file, *rect in tree["pieces"])
    for _, rect in pieces:
        if rect.overlap(whole) != rect:
            raise ValueError(f"{name}: piece {rect} is not in the tensor")
    return TensorEntry(shape, kinds, step, pieces)


def _file_to_json(entry: FileEntry) -> list[Any]:
    place = [] if entry.stored_in is None else [entry.stored_in, entry.offset]
    return [entry.size_bytes, entry.checksum, *place]


def _file_from_json(name: str, size: int, digest: str, stored_in: str | None = None, offset: int = 0) -> FileEntry:
    if stored_in is not None and (
        not _JOINED_NAME.fullmatch(stored_in) or frozen_folder_of(stored_in) != frozen_folder_of(name)
    ):
        raise ValueError(f"{stored_in!r} is not the name of a joined file next to {name}")
    if int(size) < 0 or not 0 <= int(offset) < 1 << 63:
        raise ValueError(f"{name} has {size} bytes from byte {offset}")
    return FileEntry(int(size), _checksum(digest), stored_in, int(offset))


def _file_name(name: str) -> str:
    # The name becomes a path, which must not leave the checkpoint's folder.
    if not _FILE_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not a checkpoint's file name")
    return name


def _checksum(digest: str) -> str:
    if not isinstance(digest, str) or not _CHECKSUM.fullmatch(digest):
        raise ValueError("a file's checksum is malformed")
    return digest
