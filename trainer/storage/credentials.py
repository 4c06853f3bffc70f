"""Endpoints and credentials of object stores, which are read only from the standard environment variables and files.

No recipe key, URL or external command supplies credentials, and no metadata service is queried. Errors and logs mention
only `Access.source`, which contains names of variables, files and profiles, but never their values.
"""

from __future__ import annotations

import configparser
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from model.errors import UserError

_REREAD_AFTER = timedelta(minutes=5)
_S3_FROM_ENV = (
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
_GS_FROM_ENV = (
    "GOOGLE_APPLICATION_CREDENTIALS",
    "GOOGLE_SERVICE_ACCOUNT",
    "GOOGLE_SERVICE_ACCOUNT_PATH",
    "GOOGLE_SERVICE_ACCOUNT_KEY",
)
_AZ_FROM_ENV = (
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_ACCESS_KEY",
    "AZURE_STORAGE_SAS_KEY",
    "AZURE_STORAGE_SAS_TOKEN",
    "AZURE_STORAGE_TOKEN",
    "AZURE_STORAGE_CLIENT_SECRET",
    "AZURE_CLIENT_SECRET",
    "AZURE_FEDERATED_TOKEN_FILE",
)


@dataclass(frozen=True)
class Access:
    """The endpoint and the credentials with which a bucket is opened."""

    source: str
    """The origin of the credentials, as a phrase for messages."""
    endpoint: str | None = None
    """The URL of the server; None for the provider's default."""
    options: dict[str, Any] = field(default_factory=dict, repr=False)
    """Keyword arguments for obstore's store; they may contain secrets."""


def find_access(scheme: str, environ: Mapping[str, str] = os.environ) -> Access:
    """Find the endpoint and the credentials for a kind of object store.

    obstore itself reads most environment variables, and `Access.options` does not repeat them.

    Args:
        scheme: `s3`, `gs` or `az`.
        environ: The environment variables.

    Raises:
        UserError: If there are no credentials, or a file that should contain them is malformed.
    """
    if scheme == "s3":
        return _s3(environ)
    if scheme == "gs":
        default = Path(environ.get("HOME", "~")).expanduser() / ".config/gcloud/application_default_credentials.json"
        return _from_env("gs", environ, _GS_FROM_ENV, "GOOGLE_SKIP_SIGNATURE", default)
    return _from_env("az", environ, _AZ_FROM_ENV, "AZURE_SKIP_SIGNATURE", None)


def _from_env(
    scheme: str, environ: Mapping[str, str], names: tuple[str, ...], anonymous: str, default: Path | None
) -> Access:
    for name in names:
        if environ.get(name):
            return Access(f"credentials from {name} in the environment")
    if _is_true(environ.get(anonymous)):
        return Access(f"no credentials ({anonymous} is set)", options={"skip_signature": True})
    if default is not None and default.is_file():
        return Access(f"credentials from {default}")
    raise UserError(f"{scheme}://: no credentials: set one of {', '.join(names)}; or {anonymous}=true for public data")


def _s3(environ: Mapping[str, str]) -> Access:
    profile = environ.get("AWS_PROFILE", "default")
    settings = _profile_settings(environ, profile)
    endpoint = environ.get("AWS_ENDPOINT_URL_S3") or environ.get("AWS_ENDPOINT_URL") or settings.get("endpoint_url")
    region = environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION") or settings.get("region")
    options: dict[str, Any] = {"region": region} if region else {}
    if environ.get("AWS_ACCESS_KEY_ID") and environ.get("AWS_SECRET_ACCESS_KEY"):
        return Access("credentials from AWS_ACCESS_KEY_ID in the environment", endpoint, options)
    if _is_true(environ.get("AWS_SKIP_SIGNATURE")):
        return Access("no credentials (AWS_SKIP_SIGNATURE is set)", endpoint, {**options, "skip_signature": True})
    path = _credentials_path(environ)
    if "AWS_PROFILE" in environ or _section(path, profile):
        # The file is read again every few minutes, because other programs may write renewed short-lived keys to it.
        options["credential_provider"] = _profile_reader(path, profile)
        options["credential_provider"]()
        return Access(f"credentials from profile '{profile}' in {path}", endpoint, options)
    for name in _S3_FROM_ENV:
        if environ.get(name):
            return Access(f"credentials from {name} in the environment", endpoint, options)
    raise UserError(
        f"s3://: no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE for {path}, "
        "or AWS_SKIP_SIGNATURE=true for public data"
    )


def _profile_reader(path: Path, profile: str) -> Callable[[], dict[str, Any]]:
    def read() -> dict[str, Any]:
        keys = _section(path, profile)
        if "aws_access_key_id" not in keys or "aws_secret_access_key" not in keys:
            raise UserError(
                f"{path}: profile '{profile}' has no aws_access_key_id and aws_secret_access_key; "
                "set AWS_PROFILE to a profile that has both (credential_process is not supported)"
            )
        return {
            "access_key_id": keys["aws_access_key_id"],
            "secret_access_key": keys["aws_secret_access_key"],
            "token": keys.get("aws_session_token"),
            "expires_at": datetime.now(timezone.utc) + _REREAD_AFTER,
        }

    return read


def _credentials_path(environ: Mapping[str, str]) -> Path:
    return Path(environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials")).expanduser()


def _profile_settings(environ: Mapping[str, str], profile: str) -> dict[str, str]:
    path = Path(environ.get("AWS_CONFIG_FILE", "~/.aws/config")).expanduser()
    return _section(path, profile if profile == "default" else f"profile {profile}")


def _section(path: Path, name: str) -> dict[str, str]:
    parser = configparser.ConfigParser(interpolation=None, default_section="")
    try:
        parser.read(path, encoding="utf-8")
    except (OSError, UnicodeDecodeError, configparser.Error):
        # The parser's own message quotes lines of the file, which may contain secrets.
        raise UserError(
            f"{path}: cannot be read as an INI file; fix it or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ) from None
    return dict(parser[name]) if parser.has_section(name) else {}


def _is_true(value: str | None) -> bool:
    return (value or "").lower() in ("1", "true", "yes")
