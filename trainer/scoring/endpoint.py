"""JSON POST requests, with retries, to an HTTP service that may be slow, busy or broken."""

from __future__ import annotations

import email.utils
import http.client
import json
import logging
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from model.errors import UserError

log = logging.getLogger(__name__)

MAX_WAIT_SEC = 60.0
"""The longest pause between two attempts, even if the service asks for a longer one."""
_MAX_REPLY_BYTES = 8 << 20
_RETRIED = {408, 409, 425, 429, 500, 502, 503, 504}
_USERS = {401: "check the key", 403: "check the key", 404: "check the address and the model's name"}


class RequestFailed(Exception):
    """Raised when a request has no usable answer. `kind` is one word by which failures are counted."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None  # The key must not be sent to another address.


class _Deadline:
    """A limit on the total time of a request, whose connections are closed when the time is up.

    A socket's own timeout would restart with every byte.

    Use it as a context manager around the request.
    """

    def __init__(self, timeout_sec: float) -> None:
        self._sockets: list[socket.socket] = []
        self._lock = threading.Lock()
        self._timer = threading.Timer(timeout_sec, self._end)
        self._timer.daemon = True
        self.is_over = False

    def __enter__(self) -> _Deadline:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        with self._lock:
            for other in self._sockets:
                other.close()
            self._sockets.clear()

    @contextmanager
    def enforced(self) -> Iterator[None]:
        """Return a context manager that turns the errors of a closed connection into a TimeoutError."""
        try:
            yield
        except urllib.error.HTTPError:
            raise
        except (OSError, ValueError, http.client.HTTPException) as error:
            if self.is_over:
                raise TimeoutError from error
            raise
        if self.is_over:
            raise TimeoutError

    def connect(self, *arguments: Any, **options: Any) -> socket.socket:
        """Call `socket.create_connection`, and record the connection."""
        connection = socket.create_connection(*arguments, **options)
        with self._lock:
            # TLS takes over the socket's descriptor, so a duplicate is kept.
            self._sockets.append(connection.dup())
            if self.is_over:
                connection.shutdown(socket.SHUT_RDWR)
        return connection

    def _end(self) -> None:
        with self._lock:
            self.is_over = True
            for other in self._sockets:
                with suppress(OSError):
                    other.shutdown(socket.SHUT_RDWR)


class _Http(urllib.request.HTTPHandler):
    def __init__(self, deadline: _Deadline) -> None:
        super().__init__()
        self._deadline = deadline

    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(_connection(http.client.HTTPConnection, self._deadline), request)  # type: ignore[arg-type]


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, deadline: _Deadline) -> None:
        super().__init__()
        self._deadline = deadline

    def https_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(_connection(http.client.HTTPSConnection, self._deadline), request)  # type: ignore[arg-type]


def _connection(kind: type[http.client.HTTPConnection], deadline: _Deadline) -> Callable[..., Any]:
    def make(*arguments: Any, **options: Any) -> http.client.HTTPConnection:
        made = kind(*arguments, **options)
        made._create_connection = deadline.connect  # type: ignore[attr-defined]
        return made

    return make


def _is_here(host: str) -> bool:
    """Return whether a host is this machine."""
    return host == "localhost" or host == "::1" or host.startswith("127.")


@dataclass(frozen=True)
class Endpoint:
    """The address of a service, and settings for requests to it.

    A request is retried after a timeout, a broken connection, a reply that is not JSON, or a status code of a busy
    service (408, 409, 425, 429, 500, 502, 503, 504). The pause before the next attempt is the one that `Retry-After`
    requests, or 1, 2, 4, … seconds without this header, but at most `MAX_WAIT_SEC`.

    Raises:
        UserError: If the address is not an HTTP address or contains a password, or the key cannot be sent in a header.
    """

    url: str
    """The base address in the form that OpenAI's clients use, such as `http://localhost:8000/v1`."""
    key: str | None = field(default=None, repr=False)
    """The bearer token; None sends none. It never appears in a message."""
    timeout_sec: float = 60.0
    """The time limit for the whole answer to an attempt, in seconds."""
    num_attempts: int = 5

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"judge address {self.url}: must begin with http:// or https:// and name a host")
        if parts.username or parts.password:
            raise UserError("judge address: must not contain a password; pass the key in an environment variable")
        if self.key is not None and not re.fullmatch(r"[!-~]+", self.key):
            raise UserError(
                "judge key: contains a blank or another character that is not allowed in a header; set it again"
            )
        if self.key is not None and parts.scheme == "http" and not _is_here(parts.hostname):
            log.warning("judge address %s: the key is sent unencrypted; use https:// or an SSH tunnel", self.url)
        assert self.num_attempts >= 1, self.num_attempts

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """Send a request and return the parsed reply.

        Args:
            path: The path that is appended to the base address.
            body: The JSON value to send.

        Raises:
            RequestFailed: If all attempts failed, or an attempt failed in a way that a retry cannot fix.
            UserError: If the service rejects the key, or does not know the address or the model.
        """
        failure: Exception
        wait_sec: float | None
        for attempt in range(self.num_attempts):
            try:
                return self._post(path, body)
            except urllib.error.HTTPError as error:
                with error:
                    failure = self._failure(error)
                if error.code not in _RETRIED:
                    raise failure from None
                wait_sec = _retry_after_sec(error.headers.get("Retry-After"))
            except TimeoutError:
                failure = RequestFailed("timeout", f"no answer within {self.timeout_sec:g} s")
                wait_sec = None
            except ValueError as error:
                failure, wait_sec = RequestFailed("malformed", f"the reply is not JSON: {error}"), None
            except (OSError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", None)
                timed_out = isinstance(reason, TimeoutError)
                failure = RequestFailed("timeout" if timed_out else "connection", f"{reason or error}")
                wait_sec = None
            if attempt + 1 < self.num_attempts:
                time.sleep(min(MAX_WAIT_SEC, 2.0**attempt if wait_sec is None else wait_sec))
        raise failure

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(
            self.url.rstrip("/") + path, data=json.dumps(body).encode(), headers=headers, method="POST"
        )
        with _Deadline(self.timeout_sec) as deadline:
            opener = urllib.request.build_opener(_NoRedirects, _Http(deadline), _Https(deadline))
            with deadline.enforced(), opener.open(request, timeout=self.timeout_sec) as response:
                return json.loads(response.read(_MAX_REPLY_BYTES))

    def _failure(self, error: urllib.error.HTTPError) -> Exception:
        said = error.read(500).decode("utf-8", "replace").strip()
        if self.key:
            said = said.replace(self.key, "***")
        message = f"{self.url}: HTTP {error.code}: {' '.join(said.split())[:200]}"
        if error.code in _USERS:
            return UserError(f"{message}; {_USERS[error.code]}")
        return RequestFailed(f"http_{error.code}", message)


def _retry_after_sec(value: str | None) -> float | None:
    """Return the seconds that a `Retry-After` header asks for, or None if it is missing or cannot be parsed.

    The header contains a number of seconds or a date (RFC 9110).
    """
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None
