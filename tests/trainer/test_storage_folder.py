"""Tests of reading and writing a local folder. A view of a file's range keeps its content while it is referenced."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from model.errors import UserError
from trainer.storage.store import ChangedError, LocalStore


def test_views_keep_their_content_and_free_memory_is_reused(tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes(300_000)
    (tmp_path / "x").write_bytes(data)
    store = LocalStore(tmp_path)
    held = [store.get_range("x", start, 1000 + start)[start // 2 :] for start in range(0, 100_000, 1000)]
    for number, start in enumerate(range(0, 100_000, 1000)):
        assert bytes(held[number]) == data[start + start // 2 : start + 1000 + start]
    address = np.frombuffer(held[-1].obj, dtype=np.uint8).ctypes.data
    del held[-1]
    again = store.get_range("x", 7, 10)
    assert bytes(again) == data[7:17] and np.frombuffer(again.obj, dtype=np.uint8).ctypes.data == address
    with pytest.raises(TypeError):
        again[0] = 1


def test_a_truncated_file_is_reported(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"123")
    with pytest.raises(ChangedError, match="truncated at byte 3, but 5 bytes are needed"):
        LocalStore(tmp_path).get_range("x", 1, 4)


def test_a_file_in_place_of_the_folder_is_refused_and_left_unchanged(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"mine")
    store = LocalStore(tmp_path / "x")
    for put in (lambda: store.put("a", [b"1"]), lambda: store.put_if_absent("a", b"1")):
        with pytest.raises(UserError, match=r"x: is a file, not a folder; choose another path"):
            put()
    store.delete("a")
    assert (tmp_path / "x").read_bytes() == b"mine"


def test_one_of_two_conflicting_writers_succeeds(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "new")
    assert store.put_if_absent("a", b"1") and store.put_if_absent("a", b"1") and not store.put_if_absent("a", b"2")
    assert store.list() == {"a": 1} and store.get("a") == b"1"
