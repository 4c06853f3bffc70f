"""Tests of the store for buckets, with a real S3 server, and of its error messages."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from model.errors import UserError
from tests.services.swift import KEY_ID, Swift
from tests.trainer.data_corpus import clip_rows, write_manifest
from tools.inspect_shards import main as inspect_shards
from tools.make_shards import main as make_shards
from trainer.storage.open import open_store
from trainer.storage.store import ChangedError, LocalStore, MissingError, Store, UnreachableError


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_both_stores_do_the_same(swift: Swift, tmp_path: Path, kind: str) -> None:
    store: Store = LocalStore(tmp_path / "new") if kind == "local" else open_store("s3://bucket/same")
    big = os.urandom(20 << 20)  # uploaded in several parts
    assert store.list() == {} and not store.exists("a")
    store.put("a", [b"one", b"", b"two"])
    store.put("deep/b", (big[i : i + (1 << 20)] for i in range(0, len(big), 1 << 20)))
    assert store.list() == {"a": 6, "deep/b": len(big)} and store.list("deep/") == {"deep/b": len(big)}
    assert store.get("a") == b"onetwo" and store.get("deep/b") == big
    assert store.exists("a") and store.size_bytes("deep/b") == len(big)
    assert bytes(store.get_range("deep/b", 5 << 20, 1000)) == big[5 << 20 : (5 << 20) + 1000]
    assert bytes(store.get_range("a", 3, 3, total_bytes=6)) == b"two"
    for offset, num_bytes, total in ((0, 6, 7), (0, 3, 5), (4, 6, None), (100, 5, None)):
        with pytest.raises(ChangedError, match=r"/a: "):
            store.get_range("a", offset, num_bytes, total)
    store.put("a", [b"new"])
    assert store.get("a") == b"new"
    store.delete("a")
    store.delete("a")
    with pytest.raises(MissingError, match="/a: "):
        store.get("a")
    with pytest.raises(MissingError):
        store.size_bytes("a")


def test_shards_made_in_a_bucket_are_those_made_on_disk(
    swift: Swift, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = str(write_manifest(tmp_path, clip_rows(tmp_path, 5)))
    for out in (str(tmp_path / "out"), "s3://bucket/made/here"):
        assert make_shards([manifest, out, "--max-shard-samples", "2"]) == 0
    disk, bucket = open_store(str(tmp_path / "out")), open_store("s3://bucket/made/here")
    assert bucket.list() == disk.list() and len(bucket.list()) == 8
    assert all(bucket.get(name) == disk.get(name) for name in disk.list())
    assert "s3://bucket/made/here: 5 samples" in capsys.readouterr().out
    assert inspect_shards(["s3://bucket/made/here"]) == 0
    assert "all shards and samples match the index" in capsys.readouterr().out
    assert make_shards([manifest, "s3://bucket/made/here"]) == 2
    assert "s3://bucket/made/here: contains finished shards" in capsys.readouterr().err


def one_line(swift: Swift, error: UserError) -> str:
    """Check that an error is one line with the URL and the endpoint but without the secret, and return the line."""
    text = str(error)
    assert "\n" not in text and swift.secret not in text and "s3://" in text
    assert swift.endpoint in text
    return text


def test_a_wrong_secret_is_a_one_line_error(swift: Swift, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "no-such-secret")
    for work in (
        lambda s: s.get("x"),
        lambda s: s.get_range("x", 0, 1),
        lambda s: s.exists("x"),
        lambda s: s.list(),
        lambda s: s.put("x", [b"1"]),
        lambda s: s.delete("x"),
    ):
        with pytest.raises(UserError) as caught:
            work(open_store("s3://bucket/p"))
        text = one_line(swift, caught.value)
        assert "s3://bucket/p" in text and "access refused (403" in text and "no-such-secret" not in text
        assert "AWS_ACCESS_KEY_ID in the environment" in text


def test_missing_bucket_and_missing_key_have_different_errors(swift: Swift) -> None:
    for work in (lambda s: s.get("x"), lambda s: s.put("x", [b"1"]), lambda s: s.list()):
        with pytest.raises(MissingError) as caught:
            work(open_store("s3://no-such-bucket/p"))
        text = one_line(swift, caught.value)
        assert "no bucket s3://no-such-bucket (404 NoSuchBucket" in text
    with pytest.raises(MissingError) as caught:
        open_store("s3://bucket/p").get("nothing")
    assert "s3://bucket/p/nothing: no such object (404 NoSuchKey" in one_line(swift, caught.value)


def test_a_profile_is_read_and_named(swift: Swift, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_REGION"):
        monkeypatch.delenv(name)
    with pytest.raises(UserError, match="no credentials: set AWS_ACCESS_KEY_ID"):
        open_store("s3://bucket/p")
    folder = tmp_path / ".aws"
    folder.mkdir()
    keys = "[store]\naws_access_key_id = {}\naws_secret_access_key = {}\n"
    (folder / "credentials").write_text(keys.format(KEY_ID, swift.secret))
    (folder / "config").write_text(f"[profile store]\nregion = us-east-1\nendpoint_url = {swift.endpoint}\n")
    monkeypatch.setenv("AWS_PROFILE", "store")
    store = open_store("s3://bucket/profile")
    store.put("x", [b"1"])
    assert store.get("x") == b"1"
    (folder / "credentials").write_text(keys.format(KEY_ID, "no-such-secret"))
    with pytest.raises(UserError) as caught:
        open_store("s3://bucket/profile").get("x")
    assert f"profile 'store' in {folder / 'credentials'}" in one_line(swift, caught.value)
    monkeypatch.setenv("AWS_PROFILE", "other")
    with pytest.raises(UserError, match="profile 'other' has no aws_access_key_id"):
        open_store("s3://bucket/profile")
    (folder / "credentials").write_text("secret-in-a-broken-file\n")
    with pytest.raises(UserError, match="cannot be read as an INI file") as caught:
        open_store("s3://bucket/profile")
    assert "secret-in-a-broken-file" not in str(caught.value)


def test_credentials_that_expire_while_they_are_used(server: Swift, swift: Swift) -> None:
    """Check an expired key. The server's key is changed, so that it refuses the client's requests."""
    store = open_store("s3://bucket/expire")
    store.put("x", [b"1"])
    old = server.secret
    server.kill_proxy()
    server.start_proxy(secret="f" * 32)
    try:
        with pytest.raises(UserError) as caught:
            store.get("x")
        assert "access refused (403 SignatureDoesNotMatch" in one_line(swift, caught.value)
        text = str(caught.value)
        assert "is correct, has not expired, and grants access" in text and old not in text
    finally:
        server.kill_proxy()
        server.start_proxy(secret=old)
    assert store.get("x") == b"1"


def test_short_outage_is_waited_for_and_a_long_one_is_an_error(server: Swift, swift: Swift) -> None:
    store = open_store("s3://bucket/away")
    store.put("x", [b"1"])
    server.kill_proxy()
    back = threading.Timer(2.0, server.start_proxy)
    back.start()
    try:
        start = time.monotonic()
        assert store.get("x") == b"1"
        assert time.monotonic() - start > 1.5
    finally:
        back.join()
    server.kill_proxy()
    try:
        with pytest.raises(UnreachableError) as caught:
            open_store("s3://bucket/away", retry_sec=1.0).get("x")
        assert "no usable answer within 1 s (Connection refused" in one_line(swift, caught.value)
    finally:
        server.start_proxy()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("pipe:curl -s http://host/x.tar", "pipe:' are not supported"),
        ("PIPE:cat x", "pipe:' are not supported"),
        ("http://host/x", "http:' are not supported"),
        ("file:///etc", "file:' are not supported"),
        ("s3:/bucket/x", "s3:' are not supported"),
        ("s3://key:secret@bucket/x", "must not contain credentials"),
        ("s3://bucket/x?secret=1", "must not contain credentials or options"),
        ("s3:///x", "the bucket's name is missing"),
    ],
)
def test_other_urls_are_refused_by_name(swift: Swift, url: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        open_store(url)
    assert words in str(caught.value) and "secret@" not in str(caught.value) and "secret=1" not in str(caught.value)


@pytest.mark.parametrize("scheme", ["gs", "az"])
def test_other_clouds_need_their_own_variables(swift: Swift, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=f"{scheme}://: no credentials: set one of"):
        open_store(f"{scheme}://bucket/p")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/no/such/file")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "not base64, and not to be shown")
    with pytest.raises(UserError) as caught:
        open_store(f"{scheme}://bucket/p", retry_sec=0.1).get("x")
    text = str(caught.value)
    assert text.startswith(f"{scheme}://bucket/p") and "\n" not in text and "not to be shown" not in text
    assert ("GOOGLE_APPLICATION_CREDENTIALS" if scheme == "gs" else "AZURE_STORAGE_ACCOUNT_KEY") in text
