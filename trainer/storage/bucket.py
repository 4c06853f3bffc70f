"""A store in S3, Google Cloud Storage or Azure, accessed through obstore."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from datetime import timedelta
from itertools import chain
from typing import Any, TypeVar
from urllib.parse import urlsplit

import obstore.store
from obstore.exceptions import AlreadyExistsError, BaseError, PermissionDeniedError, UnauthenticatedError

from model.errors import UserError
from trainer.storage.credentials import Access
from trainer.storage.store import MissingError, UnreachableError, check_size

T = TypeVar("T")

RETRY_SEC = 120.0
"""The time in seconds for which a request is retried while the server is unreachable. It must be below five minutes,
after which the signature of a request may expire."""
PART_BYTES = 16 << 20
"""The size of one part of a multipart upload; the last part may be smaller."""
_CONCURRENT_PARTS = 4
_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w+)</Code>")
_EXPIRED = ("ExpiredToken", "TokenRefreshRequired", "RequestTimeTooSkewed", "RequestExpired", "InvalidToken")


class BucketStore:
    """A `Store` in a bucket, or below a prefix of one.

    Args:
        scheme: `s3`, `gs` or `az`.
        bucket: The name of the bucket (for Azure, of the container).
        prefix: The path below which all objects are stored; empty for the whole bucket.
        access: The endpoint and credentials.
        retry_sec: The time in seconds for which a request is retried while the server does not answer, or answers with
            a 5xx status.

    Raises:
        UserError: If obstore does not accept the endpoint or the credentials.
    """

    def __init__(self, scheme: str, bucket: str, prefix: str, access: Access, retry_sec: float = RETRY_SEC) -> None:
        self._url = "/".join(filter(None, [f"{scheme}://{bucket}", prefix]))
        self._bucket, self._access, self._retry_sec = f"{scheme}://{bucket}", access, retry_sec
        kind: Any = {
            "s3": obstore.store.S3Store,
            "gs": obstore.store.GCSStore,
            "az": obstore.store.AzureStore,
        }[scheme]
        options = dict(access.options)
        if access.endpoint:
            options["endpoint"] = access.endpoint
        client = {
            "allow_http": bool(access.endpoint and access.endpoint.startswith("http://")),
            "connect_timeout": timedelta(seconds=5),
            # This is the limit of one attempt, which transfers only a small part or range.
            "timeout": timedelta(seconds=60),
        }
        retry = {
            "max_retries": 1000,  # A high number makes retry_timeout the limit.
            "retry_timeout": timedelta(seconds=retry_sec),
            "backoff": {"init_backoff": timedelta(seconds=0.25), "max_backoff": timedelta(seconds=5), "base": 3},
        }
        try:
            self._store = kind(bucket, prefix=prefix or None, client_options=client, retry_config=retry, **options)
        except (BaseError, ValueError):
            # obstore's own message may quote credentials, so it is not shown.
            raise UserError(f"{self._url}: cannot be opened with {access.source}; check these settings") from None

    @property
    def url(self) -> str:
        return self._url

    def get(self, name: str) -> bytes:
        return self._do(name, lambda: self._store.get(name).bytes().to_bytes())

    def get_range(self, name: str, offset: int, num_bytes: int, total_bytes: int | None = None) -> memoryview:
        end = offset + num_bytes

        def read() -> memoryview:
            found = self._store.get(name, options={"range": (offset, end)})
            check_size(f"{self._url}/{name}", found.meta["size"], end, total_bytes)
            return memoryview(found.bytes())

        try:
            return self._do(name, read)
        except _RangeError:
            check_size(f"{self._url}/{name}", self.size_bytes(name), end, total_bytes)
            raise

    def size_bytes(self, name: str) -> int:
        return self._do(name, lambda: self._store.head(name)["size"])

    def exists(self, name: str) -> bool:
        try:
            self.size_bytes(name)
        except MissingError:
            return False
        return True

    def put(self, name: str, parts: Iterable[bytes | memoryview]) -> None:
        rest, first, size = iter(parts), list[bytes | memoryview](), 0
        while size <= PART_BYTES and (part := next(rest, None)) is not None:
            first.append(part)
            size += len(part)
        if size <= PART_BYTES:  # One request is enough, whereas a multipart upload needs at least three.
            self._do(name, lambda: self._store.put(name, b"".join(first)))
            return
        content = chain(first, rest)
        self._do(name, lambda: self._store.put(name, content, chunk_size=PART_BYTES, max_concurrency=_CONCURRENT_PARTS))

    def put_if_absent(self, name: str, content: bytes) -> bool:
        try:
            self._do(name, lambda: self._store.put(name, content, mode="create"))
        except _ExistsError:
            # If the response to the first request was lost, a retry finds the object that the first request wrote.
            return self._holds(name, content)
        return True

    def _holds(self, name: str, content: bytes) -> bool:
        try:
            return self.get(name) == content
        except MissingError:
            return False

    def list(self, prefix: str = "") -> dict[str, int]:
        assert not prefix or prefix.endswith("/"), prefix

        def read() -> dict[str, int]:
            pages = self._store.list(prefix or None)
            return {item["path"]: item["size"] for page in pages for item in page}

        return dict(sorted(self._do(prefix, read).items()))

    def delete(self, name: str) -> None:
        try:
            self._do(name, lambda: self._store.delete(name))
        except MissingError:
            pass

    def _do(self, name: str, work: Callable[[], T]) -> T:
        try:
            return work()
        except AlreadyExistsError:
            raise _ExistsError(f"{self._url}/{name}: exists") from None
        except (BaseError, FileNotFoundError, PermissionError) as error:
            raise self._error(name, error) from None

    def _error(self, name: str, error: Exception) -> UserError:
        """Return the one-line error for `error`.

        obstore's own message has many lines and quotes the server's answer, so only its status and error code are used.
        """
        text = str(error)
        status, code = _STATUS.search(text), _CODE.search(text)
        answer = " ".join(m[1] for m in (status, code) if m)
        where = f"{self._url}/{name}".rstrip("/")
        source = self._access.source + (f", endpoint {_public(self._access.endpoint)}" if self._access.endpoint else "")
        if code and code[1] == "NoSuchBucket":
            return MissingError(
                f"{where}: no bucket {self._bucket} ({answer}; {source}); check the name, or create the bucket"
            )
        if isinstance(error, FileNotFoundError) or (status and status[1] == "404"):
            return MissingError(f"{where}: no such object ({answer or 'not found'}; {source}); check the URL")
        if code and code[1] in _EXPIRED:
            return UserError(f"{where}: credentials have expired ({answer}; {source}); renew them")
        if isinstance(error, PermissionDeniedError | UnauthenticatedError | PermissionError) or (
            status and status[1] in ("401", "403")
        ):
            return UserError(
                f"{where}: access refused ({answer}; {source}); "
                "check that the key is correct, has not expired, and grants access"
            )
        if status and status[1] == "416":
            return _RangeError(f"{where}: the range ends beyond the object's last byte ({answer}; {source})")
        if status and status[1].startswith("4"):
            return UserError(
                f"{where}: the store refused the request ({answer}; {source}); check the URL and the endpoint"
            )
        return UnreachableError(
            f"{where}: no usable answer within {self._retry_sec:g} s ({answer or _reason(text)}; {source}); "
            "check that the store is running and the endpoint is correct"
        )


class _ExistsError(UserError):
    """Raised when an object with the same name already exists."""


class _RangeError(UserError):
    """Raised when the store cannot return the requested range."""


def _reason(text: str) -> str:
    for phrase in ("Connection refused", "dns error", "timed out", "TimedOut", "Connection reset", "IncompleteMessage"):
        if phrase in text:
            return phrase
    return "connection failed"


def _public(endpoint: str | None) -> str:
    parts = urlsplit(endpoint or "")
    return f"{parts.scheme}://{parts.hostname}" + (f":{parts.port}" if parts.port else "")
