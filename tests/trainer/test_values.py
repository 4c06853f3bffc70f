"""Tests that values from other ranks arrive unchanged, and that nothing in them is executed."""

from __future__ import annotations

import ast
import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.distributed.harness import run_ranks
from tools.demo_corpus import write_corpus
from trainer.parallel.groups import connect
from trainer.parallel.tree import gather_bytes
from trainer.parallel.values import all_gather_values, broadcast_value, decode, encode, gather_values

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Thing:
    name: str
    inner: Any = None


class Pair(NamedTuple):
    first: int
    second: Any


PLAIN = (
    st.none()
    | st.just(range(1, 9, 2))
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(max_size=9)
)
KEYS = st.text(max_size=3) | st.integers() | st.tuples(st.integers(), st.text(max_size=2))
VALUES = st.recursive(
    PLAIN,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=3)
        | st.integers().map(lambda n: {n})
        | st.builds(Thing, st.text(max_size=3), inner)
        | st.builds(Pair, st.integers(), inner)
    ),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None)
@given(VALUES)
def test_a_value_arrives_unchanged(value: Any) -> None:
    found = decode(encode(value, (Thing, Pair)), (Thing, Pair))
    assert found == value and repr(found) == repr(value)


@pytest.mark.parametrize("dtype", ["f8", "f4", "i8", "u1", "?", "i2"])
def test_an_array_arrives_unchanged(dtype: str) -> None:
    for array in (np.arange(6).astype(dtype).reshape(2, 3).T, np.zeros((0, 4), dtype), np.array(1, dtype)):
        found = decode(encode([array, b"x", array]))
        assert found[1] == b"x"
        for other in (found[0], found[2]):
            assert other.dtype == array.dtype and other.shape == array.shape and np.array_equal(other, array)


@pytest.mark.parametrize("value", [object(), Thing("a"), np.array([object()]), {"a": {1: print}}, Path("a"), 1j])
def test_what_is_not_data_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="cannot be sent to other ranks"):
        encode(value, (Pair,))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60) | st.tuples(st.integers(0, 60), st.integers(0, 255)))
def test_malformed_bytes_are_a_value_error(change: bytes | tuple[int, int]) -> None:
    data = bytearray(encode({"a": [1, (2, b"abc")], "b": np.arange(3), "c": Thing("x")}, (Thing,)))
    if isinstance(change, bytes):
        data = bytearray(change)
    else:
        data[change[0] % len(data)] = change[1]
    try:
        decode(bytes(data), (Thing,))
    except ValueError as error:
        assert "from another rank is malformed" in str(error)


class Evil:
    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (self.mark,)


def impostor(mark: str) -> str:
    """Send a pickle from rank 1 in place of a value. Unpickling it would create the folder `mark`."""
    rank, _, _ = connect(timeout_sec=60)
    if rank == 1:
        gather_bytes(pickle.dumps(Evil(mark)), None)
        return "sent"
    try:
        return str(gather_values(0, None))
    except ValueError as error:
        return str(error)


@pytest.mark.slow
def test_a_pickle_of_another_rank_is_not_executed(tmp_path: Path) -> None:
    found = run_ranks(2, impostor, {"mark": str(tmp_path / "executed")})
    assert "from another rank is malformed" in found[0] and found[1] == "sent"
    assert not (tmp_path / "executed").exists()


def exchange() -> list[Any]:
    rank, _, _ = connect(timeout_sec=60)
    mine = Thing("x" * (1000 if rank == 1 else 1), {rank: np.full(rank, rank)})
    everyone = all_gather_values(mine, None, (Thing,))
    assert [t.name for t in everyone] == ["x", "x" * 1000, "x"] and everyone[2].inner[2].tolist() == [2, 2]
    first = gather_values(mine, None, (Thing,))
    assert (first is None) == (rank != 0)
    group = dist.new_group([1, 2])  # its first rank is not the first of the world
    if rank:
        found = gather_values(rank, group)
        assert found == ([1, 2] if rank == 1 else None)
        assert broadcast_value(rank, group) == 1
    return [broadcast_value("" if rank else "value of 0", None), broadcast_value(None, None)]


@pytest.mark.slow
def test_all_ranks_get_the_values() -> None:
    assert run_ranks(3, exchange) == [["value of 0", None]] * 3


def train_without_pickles(folder: str) -> str:
    """Train, evaluate and save while every collective that pickles raises an error."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a collective for objects was called")

    for module in (dist, dist.distributed_c10d):
        for name in ("all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list"):
            setattr(module, name, refuse)
    from trainer.build import run_training
    from trainer.config.load import load_recipe
    from trainer.run.launch import RankEnv

    rank = int(os.environ["RANK"])
    options = [f"data.root={folder}/corpus", f"data.cache_dir={folder}/cache", f"train.run_dir={folder}"]
    options += ["train.steps=2", "checkpoint.every_steps=1", "profile.steps=1:2"]
    options += ["eval.every_steps=1", "eval.split=test", "eval.max_samples=4"]
    assert run_training(load_recipe("debug", options), RankEnv(rank, rank, 2)) == 0
    return "trained"


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_nothing_in_a_run_unpickles_what_other_ranks_sent(tmp_path: Path) -> None:
    """Check that a run never calls the collectives of DeepSpeed and Megatron-core that pickle."""
    write_corpus(tmp_path / "corpus", scale=0.05)
    assert run_ranks(2, train_without_pickles, {"folder": str(tmp_path)}, timeout_sec=240) == ["trained"] * 2


def test_no_code_of_ours_unpickles_what_another_process_sent() -> None:
    """Check all sources. Only data workers may send pickles, because their reader is the process that started them."""
    allowed = {"trainer/data/workers.py"}
    for folder in ("trainer", "model", "tools", "bench"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if str(path.relative_to(ROOT)) in allowed:
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                name = node.attr if isinstance(node, ast.Attribute) else ""
                assert not name.endswith(("_object", "_object_list")) or not name.startswith(
                    ("all_gather", "gather", "broadcast", "scatter", "send", "recv")
                ), f"{path}:{node.lineno}: dist.{name} pickles"  # type: ignore[attr-defined]
                modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                unsafe = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"} & set(modules)
                assert not unsafe, f"{path}: imports {unsafe}"
                if name == "load" and isinstance(node, ast.Attribute):
                    assert not (isinstance(node.value, ast.Name) and node.value.id == "torch"), f"{path}: torch.load"
