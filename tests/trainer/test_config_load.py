"""Tests of loading recipes: conversion, overrides, inheritance and errors."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from model.errors import UserError
from trainer.config.convert import from_tree, to_tree
from trainer.config.load import dump, load_recipe, recipe_names


@dataclass(frozen=True)
class Inner:
    size: int
    name: str = "a"


@dataclass(frozen=True)
class Outer:
    rate: float = 1.0
    flag: bool = False
    kind: Literal["x", "y"] = "x"
    inner: Inner | None = None
    items: tuple[Inner, ...] = ()
    pair: tuple[float, float] = (0.0, 1.0)
    extra: dict[str, Any] = field(default_factory=dict)
    weight: float | tuple[tuple[float, float], ...] = 1.0
    limit: int | None = 3


def test_a_tree_becomes_a_dataclass_by_its_annotations() -> None:
    tree = {
        "rate": 2,
        "flag": True,
        "kind": "y",
        "inner": {"size": 1},
        "items": [{"size": 2, "name": "b"}],
        "pair": [1, 2],
        "extra": {"a": [1, {"b": None}]},
        "weight": [[0, 1], [0.5, 2]],
        "limit": None,
    }
    built = from_tree(Outer, tree)
    assert built == Outer(
        2.0, True, "y", Inner(1), (Inner(2, "b"),), (1.0, 2.0), {"a": [1, {"b": None}]}, ((0.0, 1.0), (0.5, 2.0)), None
    )
    assert isinstance(built.rate, float)
    assert from_tree(Outer, to_tree(built)) == built


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"rat": 1}, "rat: unknown key; did you mean rate?"),
        ({"inner": {"sise": 1}}, "inner.sise: unknown key; did you mean size?"),
        ({"items": [{"size": 1}, {"NAME": "b", "size": 1}]}, "items[1].NAME: unknown key; did you mean name?"),
        ({"inner": {"zzz": 1}}, "inner.zzz: unknown key; known keys are size, name"),
        ({"inner": {}}, "inner.size: missing; expected a whole number"),
        ({"inner": 3}, "inner = 3: expected a mapping of Inner's keys"),
        ({"rate": "fast"}, "rate = 'fast': expected a number"),
        ({"rate": True}, "rate = true: expected a number"),
        ({"rate": float("nan")}, "rate = nan: expected a number"),
        ({"rate": None}, "rate = null: expected a number"),
        ({"flag": 1}, "flag = 1: expected true or false"),
        ({"kind": "z"}, "kind = 'z': expected one of x, y"),
        ({"limit": 1.5}, "limit = 1.5: expected a whole number"),
        ({"limit": False}, "limit = false: expected a whole number"),
        ({"pair": [1]}, "pair = [1]: expected a list of 2: a number, a number"),
        ({"items": {"size": 1}}, "items = {'size': 1}: expected a list of a mapping"),
        ({"extra": []}, "extra = []: expected a mapping"),
        ({"weight": "a"}, "weight = 'a': expected a number or a list of a list of 2: a number, a number"),
    ],
)
def test_a_wrong_tree_is_refused_with_path_value_and_expectation(tree: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        from_tree(Outer, tree)
    assert str(error.value) == message


def write(folder: Path, text: str, name: str = "r.yaml") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def test_yaml_numbers_and_words_mean_what_they_look_like(tmp_path: Path) -> None:
    llm = "{config: {a: 12:30, b: yes, c: 1.5, d: -3, e: 0x1}}"
    text = f"name: no\noptim: {{lr: 5e-4, eps: 1e-8}}\nmodel: {{primary: {{name: a}}, llm: {llm}}}"
    recipe = load_recipe(write(tmp_path, text))
    assert recipe.name == "no"
    assert (recipe.optim.lr, recipe.optim.eps) == (5e-4, 1e-8)
    assert recipe.model.llm.config == {"a": "12:30", "b": "yes", "c": 1.5, "d": -3, "e": "0x1"}


def test_a_duplicate_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="key 'lr' is given twice.*line 3"):
        load_recipe(write(tmp_path, "name: a\noptim:\n  {lr: 1, lr: 2}"))


@pytest.mark.parametrize("text", ["", "- a", "name: [", "name: !!python/object/apply:os.getcwd []", "? [a]\n: b"])
def test_yaml_other_than_a_mapping_of_plain_values_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"r\.yaml"):
        load_recipe(write(tmp_path, text))


def test_overrides_reach_mappings_lists_and_absent_sections() -> None:
    recipe = load_recipe(
        "debug",
        [
            "optim.lr=3e-4",
            "model.experts.1.name=other",
            "model.routing_loss.weight=0.2",
            "data.max_audio_sec=null",
            "optim.parts=[{pattern: 'llm.*', frozen: true}]",
            "name=a=b",
            "name=mine",
        ],
    )
    assert recipe.optim.lr == 3e-4
    assert [e.name for e in recipe.model.experts] == ["hubert", "other"]
    assert recipe.model.routing_loss.weight == 0.2
    assert recipe.data.max_audio_sec is None
    assert recipe.optim.parts[0].frozen
    assert recipe.name == "mine"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr", "optim.lr: an override has the form key=value, e.g. optim.lr=3e-4"),
        ("=3", "=3: an override has the form key=value, e.g. optim.lr=3e-4"),
        ("optim..lr=3", "optim..lr=3: an override has the form key=value, e.g. optim.lr=3e-4"),
        ("optim.Ir=3", "optim.Ir: unknown key; did you mean lr?"),
        ("optin.lr=3", "optin: unknown key; did you mean optim?"),
        ("optim.lr=fast", "optim.lr = 'fast': expected a number"),
        (
            "model.experts.2.name=a",
            "model.experts.2.name=a: 2 is not an item of the list; use 0..1",
        ),
        ("model.experts.first.name=a", "model.experts.first.name=a: first is not an item of the list; use 0..1"),
        ("seed.a=1", "seed.a=1: seed is 0, which has no keys"),
        ("name=../x", "name = '../x': use letters, digits, '.', '_' and '-' (it names the run's folder)"),
    ],
)
def test_a_wrong_override_is_refused(override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_recipe("debug", [override])
    assert str(error.value) == message


def test_a_recipe_inherits_from_its_base(tmp_path: Path) -> None:
    model = "model: {primary: {name: a}}"
    write(
        tmp_path, f"name: old\nseed: 3\noptim: {{lr: 1, eps: 0.5}}\ndata: {{eval_splits: [a, b]}}\n{model}", "old.yaml"
    )
    recipe = load_recipe(
        write(tmp_path, "base: ./old.yaml\nname: new\noptim: {lr: 2}\ndata: {eval_splits: [c]}", "new.yaml")
    )
    assert (recipe.name, recipe.seed, recipe.optim.lr, recipe.optim.eps) == ("new", 3, 2.0, 0.5)
    assert recipe.data.eval_splits == ("c",)


def test_cycle_of_bases_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "base: ./b.yaml", "a.yaml")
    with pytest.raises(UserError, match="in a circle"):
        load_recipe(write(tmp_path, "base: ./a.yaml", "b.yaml"))


def test_an_unknown_recipe_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=f"recipe nope: not one of {', '.join(recipe_names())}"):
        load_recipe("nope")
    with pytest.raises(UserError, match=r"recipe nope\.yaml: no such file"):
        load_recipe("nope.yaml")


@pytest.mark.parametrize("name", recipe_names())
def test_a_dumped_recipe_loads_as_the_same_recipe(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert load_recipe(write(tmp_path, dump(recipe))) == recipe


def test_dump_contains_no_credentials(tmp_path: Path) -> None:
    recipe = dataclasses.replace(load_recipe("debug"), name="x")
    data = dataclasses.replace(recipe.data, root="s3://key:secret@host/bucket")
    assert "secret" not in dump(dataclasses.replace(recipe, data=data))
    assert "s3://***@host/bucket" in dump(dataclasses.replace(recipe, data=data))


def test_every_field_of_every_section_can_be_converted() -> None:
    # An annotation that the loader cannot convert would otherwise fail only when a user sets the key.
    recipe = load_recipe("debug")
    assert from_tree(type(recipe), to_tree(recipe)) == recipe
