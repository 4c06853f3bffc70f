"""Tests of a recipe's section `stages`: its checks, and its effect on parameters, learning rates and data."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from model.errors import UserError
from trainer.config.checks import check_recipe
from trainer.config.load import dump, load_recipe, parse_stored_recipe
from trainer.config.schema import Recipe
from trainer.dry_run import describe
from trainer.engine.optim import OptimConfig, PartConfig, param_groups, set_rates, setting_of
from trainer.engine.stages import StageConfig, check_stages, stage_at, staged_optim, stages_of

TWO = "stages=[{name: a, steps: 3, train: [connector], lr: 1.0e-3}, {name: b, steps: 5}]"
DATASETS = "data.datasets=[{name: asr, manifest: a.jsonl, weight: [[0, 1], [0.75, 3]]}, {name: sqa, manifest: b.jsonl}]"


def recipe(*overrides: str) -> Recipe:
    return load_recipe("finetune_cpu", ["optim.warmup_steps=0", *overrides])


def test_the_stages_decide_the_number_of_steps() -> None:
    found = recipe(TWO)
    assert found.train.steps == 8
    assert parse_stored_recipe(dump(found), "stored") == found
    stages = stages_of(found.staged_optim, 8)
    assert [(s.name, s.start, s.steps, s.optim.lr) for s in stages] == [("a", 0, 3, 1e-3), ("b", 3, 5, found.optim.lr)]
    assert [stage_at(found.staged_optim, step, 8) for step in range(8)] == [0, 0, 0, 1, 1, 1, 1, 1]
    plain = recipe("stages=[]", "train.steps=7")
    assert plain.staged_optim is plain.optim and plain.staged_data is plain.data
    assert stage_at(plain.optim, 6, 7) == 0


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ((TWO, "train.steps=9"), "train.steps = 9: the stages have 8 steps together; set it to 8, remove it, "),
        (("stages=[{name: a, steps: 0}]",), "stages 'a'.steps = 0: must be at least 1"),
        (("stages=[{name: a, steps: 2}, {name: a, steps: 2}]",), "stages: names ['a', 'a'] must be unique"),
        (("stages=[{name: a, steps: x}]",), "stages[0].steps = 'x': expected a whole number"),
        (
            ("stages=[{name: a, steps: 2, warmup_steps: 3}]",),
            "= 3: must be within 0..2, the steps of the stage; set stages.0.w",
        ),
        (("stages=[{name: a, steps: 2, lr: 0.0}]",), "stages 'a'.lr = 0.0: must be positive"),
        (("stages=[{name: a, steps: 2, min_lr_ratio: 2.0}]",), "optim.min_lr_ratio = 2.0: must be within 0..1"),
        (("stages=[{name: a, steps: 2, weights: {x: 1}}]", DATASETS), "stages 'a'.weights.x: no such dataset"),
        (("stages=[{name: a, steps: 2, weights: {asr: 0, sqa: 0}}]", DATASETS), "all weights are 0 at progress 0"),
        (("stages=[{name: a, steps: 2, train: connector}]",), "stages[0].train = 'connector': expected a list"),
    ],
)
def test_an_illegal_stage_is_a_one_line_error(overrides: tuple[str, ...], words: str) -> None:
    with pytest.raises(UserError) as caught:
        recipe(*overrides)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_the_warm_up_of_a_run_with_stages_is_that_of_its_stages() -> None:
    short = "stages=[{name: a, steps: 2, warmup_steps: 1}, {name: b, steps: 2, warmup_steps: 0}]"
    check_recipe(load_recipe("debug", [short, "optim.warmup_steps=9"]))
    with pytest.raises(UserError, match="stages 'a'.warmup_steps = 9"):
        load_recipe("debug", ["stages=[{name: a, steps: 4}]", "optim.warmup_steps=9"])


def staged(*stages: StageConfig) -> OptimConfig:
    frozen = (PartConfig("audio.primary.*", frozen=True), PartConfig("llm.*", lr=0.5))
    return staged_optim(OptimConfig(lr=0.25, weight_decay=0.1, parts=frozen), stages)


CONNECTOR = StageConfig(name="connector", steps=2, train=("connector",), lr=1.0)
LORA = StageConfig(
    name="lora", steps=2, train=("connector", "lora"), parts=(PartConfig("*.lora_?", lr=0.125, weight_decay=0.0),)
)


def test_a_parameter_learns_in_the_stages_that_name_it() -> None:
    optim = staged(CONNECTOR, LORA)
    projector = setting_of(optim, "audio.projector.weight", 2)
    assert not projector.frozen and [projector.in_stage(i).lr for i in (0, 1)] == [1.0, 0.25]
    factor = setting_of(optim, "llm.model.layers.0.mlp.up_proj.lora_A", 2)
    assert [factor.in_stage(i).frozen for i in (0, 1)] == [True, False] and factor.in_stage(1).lr == 0.125
    assert setting_of(optim, "llm.model.norm.weight", 1).frozen, "no stage names it"
    assert setting_of(optim, "audio.primary.encoder.conv1.weight", 3).frozen, "optim.parts freezes it"
    assert setting_of(staged(StageConfig(name="all", steps=1)), "audio.primary.encoder.conv1.weight", 3).frozen
    head = setting_of(optim, "audio.ctc_head.weight", 2)
    assert not head.frozen and setting_of(optim, "audio.experts.hubert.encoder.x.weight", 2).frozen
    assert not setting_of(optim, "audio.experts.hubert.projection.weight", 2).frozen


def test_a_group_that_is_frozen_in_a_stage_does_not_move() -> None:
    torch.manual_seed(0)
    parameters: dict[str, Any] = {"audio.projector.weight": nn.Parameter(torch.ones(2, 2))}
    parameters["llm.x.lora_A"] = nn.Parameter(torch.ones(2, 2))
    groups = param_groups(staged(CONNECTOR, LORA), [(n, p, 2) for n, p in parameters.items()])
    optimizer = torch.optim.AdamW(groups)
    for stage, moves in ((0, (True, False)), (1, (True, True))):
        before = [p.detach().clone() for p in parameters.values()]
        set_rates(optimizer.param_groups, stage, 0.5)
        for parameter in parameters.values():
            parameter.grad = torch.randn(2, 2)
        optimizer.step()
        assert tuple(not torch.equal(a, b) for a, b in zip(before, parameters.values(), strict=True)) == moves


def test_a_stage_without_a_match_or_without_audio_is_an_error() -> None:
    names = ["audio.projector.weight", "llm.model.norm.weight"]
    check_stages(staged(CONNECTOR), names)
    with pytest.raises(UserError, match=r"stages 'x': pattern llm\.\*\.q_prj matches no parameter; use one of conn"):
        check_stages(staged(StageConfig(name="x", steps=1, train=("connector", "llm.*.q_prj"))), names)
    with pytest.raises(UserError, match="stages 'x': every audio parameter is frozen"):
        check_stages(staged(StageConfig(name="x", steps=1, train=("llm",))), names)


def test_a_stage_without_the_llm_must_not_train_it_and_needs_a_loss() -> None:
    names = ["audio.projector.weight", "audio.adapter.x", "llm.x.lora_A"]
    check_stages(staged(replace(CONNECTOR, llm=False)), names)
    with pytest.raises(UserError, match=r"every audio parameter is frozen; train at least audio.adapter.\*"):
        check_stages(staged(StageConfig(name="x", steps=1, train=("audio.projector.*",), llm=False)), names)
    with pytest.raises(UserError, match=r"stages 'lora'.llm = false: the stage would also train llm.x.lora_A"):
        check_stages(staged(replace(LORA, llm=False)), names)
    stage = "stages=[{name: a, steps: 4, train: [connector], llm: false, warmup_steps: 0}]"
    check_recipe(load_recipe("debug", [stage, "model.ctc_weight=1"]))
    stop = ["eval.every_steps=2", "eval.stop_after=2", "checkpoint.best_metric=eval/dev/asr/wer"]
    with pytest.raises(
        UserError, match=r"eval.stop_after = 2: scores cannot improve in a stage without the LLM; remove"
    ):
        check_recipe(load_recipe("debug", [stage, "model.ctc_weight=1", *stop]))
    frozen = staged(replace(CONNECTOR, llm=False))
    assert (
        setting_of(frozen, "audio.projector.weight", 2).frozen and not setting_of(frozen, "audio.adapter.x", 2).frozen
    )
    with pytest.raises(UserError, match=r"stages.0.llm = false: without the LLM, the stage has no loss; set model.ctc"):
        check_recipe(load_recipe("debug", [stage, "model.ctc_weight=0"]))


def test_weights_of_datasets_by_stage() -> None:
    stages = (
        "stages=[{name: a, steps: 2}, {name: b, steps: 2, weights: {sqa: 5}}, {name: c, steps: 4, weights: {asr: 0}}]"
    )
    asr, sqa = recipe(stages, DATASETS).staged_data.datasets
    assert asr.schedule == ((0.0, 1.0), (0.25, 1.0), (0.5, 0.0))
    assert sqa.schedule == ((0.0, 1.0), (0.25, 5.0), (0.5, 1.0))
    asr, _ = recipe(stages.replace("weights: {asr: 0}", "weights: {sqa: 2}"), DATASETS).staged_data.datasets
    assert asr.schedule == ((0.0, 1.0), (0.25, 1.0), (0.5, 1.0), (0.75, 3.0)), "its own schedule must continue"


def test_the_dry_run_lists_what_each_stage_trains() -> None:
    text = describe(recipe(TWO, "optim.parts=[{pattern: 'llm.*', frozen: true}]"))
    lines = [line.split() for line in text.splitlines()]
    a, b = (next(words for words in lines if words[:1] == [name]) for name in "ab")
    assert a[1:4] == ["1", "to", "3"] and b[1:4] == ["4", "to", "8"] and "connector" in a
    assert a[4] != b[4]
