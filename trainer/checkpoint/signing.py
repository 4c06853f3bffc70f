"""Optional signatures of checkpoints, for storage to which other users can write.

If the environment variable `EARSHOT_CHECKPOINT_KEY` is set, checkpoints are saved with an HMAC of the manifest, and the
manifest contains a SHA-256 of every file. Checkpoints without a valid HMAC are then refused. Everyone who has the key
can sign, so all runs that share a key trust each other.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Mapping
from typing import Protocol

import xxhash

from model.errors import UserError

VARIABLE = "EARSHOT_CHECKPOINT_KEY"
_LEAST_CHARACTERS = 32
SHA256_CHARACTERS = 64
"""The length of a SHA-256 in hexadecimal. The other checksum, XXH3-128, has half as many characters."""


class Digest(Protocol):
    """A hash that is being computed."""

    def update(self, data: bytes | memoryview, /) -> None: ...

    def hexdigest(self) -> str: ...


def signing_key(environ: Mapping[str, str] = os.environ) -> bytes | None:
    """Return the key with which checkpoints are signed, or None if checkpoints are not signed.

    Raises:
        UserError: If the key is too short.
    """
    text = environ.get(VARIABLE)
    if text is None:
        return None
    if len(text) < _LEAST_CHARACTERS:
        raise UserError(
            f"{VARIABLE}: has {len(text)} characters, which is too short; make one of at least {_LEAST_CHARACTERS} "
            "with `openssl rand -hex 32`, or unset it"
        )
    return text.encode()


def sign(key: bytes, content: bytes) -> str:
    """Return the signature of the canonical form of a manifest."""
    return hmac.new(key, b"earshot checkpoint manifest\n" + content, hashlib.sha256).hexdigest()


def is_signed(key: bytes, content: bytes, signature: object) -> bool:
    """Return whether `signature` is a valid signature of `content`."""
    return isinstance(signature, str) and hmac.compare_digest(sign(key, content).encode(), signature.encode())


def new_digest(cryptographic: bool) -> Digest:
    """Return a hash for the content of a file.

    Args:
        cryptographic: True for SHA-256. False for XXH3-128, which is much faster but detects only accidental damage.
    """
    return hashlib.sha256() if cryptographic else xxhash.xxh3_128()
