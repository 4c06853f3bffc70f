"""Ranges of local files: what was read stays as it was while anything refers to it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from model.errors import UserError
from trainer.storage.store import ChangedError, LocalStore


def test_views_keep_what_was_read_and_free_memory_is_used_again(tmp_path: Path) -> None:
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


def test_a_file_that_ends_early_is_told(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"123")
    with pytest.raises(ChangedError, match="ends at byte 3, before 5"):
        LocalStore(tmp_path).get_range("x", 1, 4)


def test_a_file_in_the_place_of_the_folder_takes_nothing(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"mine")
    store = LocalStore(tmp_path / "x")
    for put in (lambda: store.put("a", [b"1"]), lambda: store.put_if_absent("a", b"1")):
        with pytest.raises(UserError, match=r"x: is no folder; choose another place"):
            put()
    store.delete("a")
    assert (tmp_path / "x").read_bytes() == b"mine"


def test_of_two_who_put_one_succeeds(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "new")
    assert store.put_if_absent("a", b"1") and store.put_if_absent("a", b"1") and not store.put_if_absent("a", b"2")
    assert store.list() == {"a": 1} and store.get("a") == b"1"
