"""URL → store."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit

from model.errors import UserError
from trainer.storage.store import LocalStore, Store

SCHEMES = ("s3", "gs", "az")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")


def scheme_of(url: str) -> str:
    """`s3`, `gs`, `az`, or empty for a local path.

    Raises:
        UserError: anything else that looks like a URL; `pipe:` and its like would run commands.
    """
    found = _SCHEME.match(url)
    if found is None:
        return ""
    scheme = found[1].lower()
    if scheme not in SCHEMES or not url[found.end() :].startswith("//"):
        raise UserError(
            f"{url}: URLs of kind '{scheme}:' are not read; give a local path or "
            + ", ".join(f"{s}://BUCKET/PREFIX" for s in SCHEMES)
        )
    return scheme


def open_store(url: str, retry_sec: float | None = None) -> Store:
    """The folder or bucket at `url`; nothing is asked of it yet.

    Args:
        url: local path, or `s3://BUCKET/PREFIX`, `gs://…`, `az://CONTAINER/PREFIX`.
        retry_sec: how long a bucket may be away before a request fails; null: `bucket.RETRY_SEC`.

    Raises:
        UserError: another kind of URL; credentials in the URL; no credentials where they belong.
    """
    scheme = scheme_of(url)
    if not scheme:
        return LocalStore(Path(url))
    parts = urlsplit(url)
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UserError(
            f"{scheme}://{parts.netloc.rpartition('@')[2]}: a URL must hold no credentials and no options; "
            "credentials come from the environment or their standard files"
        )
    if not parts.netloc:
        raise UserError(f"{url}: names no bucket; give {scheme}://BUCKET/PREFIX")
    # Only those who use a bucket pay for loading its client.
    from trainer.storage.bucket import RETRY_SEC, BucketStore
    from trainer.storage.credentials import find_access

    prefix = parts.path.strip("/")
    return BucketStore(scheme, parts.netloc, prefix, find_access(scheme), RETRY_SEC if retry_sec is None else retry_sec)


def join_url(root: str, path: str) -> str:
    """`path` as seen from `root`: itself if it is a URL or absolute."""
    if scheme_of(path) or Path(path).is_absolute():
        return path
    return f"{root.rstrip('/')}/{path}" if scheme_of(root) else str(Path(root) / path)
