"""Open stores by URL or path."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit

from model.errors import UserError
from trainer.storage.store import LocalStore, Store

SCHEMES = ("s3", "gs", "az")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")


def scheme_of(url: str) -> str:
    """Return the scheme of `url`: `s3`, `gs`, `az`, or an empty string for a local path.

    Raises:
        UserError: If `url` has any other scheme. This includes `pipe:` URLs, which run commands.
    """
    found = _SCHEME.match(url)
    if found is None:
        return ""
    scheme = found[1].lower()
    if scheme not in SCHEMES or not url[found.end() :].startswith("//"):
        raise UserError(
            f"{url}: URLs with scheme '{scheme}:' are not supported; use a local path or "
            + ", ".join(f"{s}://BUCKET/PREFIX" for s in SCHEMES)
        )
    return scheme


def open_store(url: str, retry_sec: float | None = None) -> Store:
    """Return the store at `url`, without sending any request to it.

    Args:
        url: A local path, or `s3://BUCKET/PREFIX`, `gs://BUCKET/PREFIX`, `az://CONTAINER/PREFIX`.
        retry_sec: The time in seconds for which a bucket may be unreachable before a request fails; None for
            `bucket.RETRY_SEC`.

    Raises:
        UserError: If the scheme is unknown, the URL contains credentials or options, or no credentials are found in the
            environment.
    """
    scheme = scheme_of(url)
    if not scheme:
        return LocalStore(Path(url))
    parts = urlsplit(url)
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UserError(
            f"{scheme}://{parts.netloc.rpartition('@')[2]}: a URL must not contain credentials or options; "
            "set the credentials in the environment or in their standard files"
        )
    if not parts.netloc:
        raise UserError(f"{url}: the bucket's name is missing; use {scheme}://BUCKET/PREFIX")
    # obstore takes time to load, and runs with local data do not need it.
    from trainer.storage.bucket import RETRY_SEC, BucketStore
    from trainer.storage.credentials import find_access

    prefix = parts.path.strip("/")
    return BucketStore(scheme, parts.netloc, prefix, find_access(scheme), RETRY_SEC if retry_sec is None else retry_sec)


def join_url(root: str, path: str) -> str:
    """Append `path` to `root`. A `path` that is a URL or absolute is returned unchanged."""
    if scheme_of(path) or Path(path).is_absolute():
        return path
    return f"{root.rstrip('/')}/{path}" if scheme_of(root) else str(Path(root) / path)
