"""Tests of sweeps over recipe keys: values, tables and plots."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from PIL import Image

from model.errors import UserError
from tests.browser import browse, measure, need_chromium
from trainer.config.load import load_recipe
from trainer.parallel.topology import build_topology
from trainer.plan.accelerator import parse_accelerator
from trainer.plan.plan import Plan
from trainer.plan.planner import Planner
from trainer.plan.report import WIDTH, duration_text, report
from trainer.plan.sweep import Sweep, as_tree, check_keys, fastest, parse_sweeps, sweep, sweep_table
from trainer.plan.sweep_plot import check_plot, plot
from trainer.plan.workload import typical_workload


def test_values_may_contain_commas_in_brackets() -> None:
    found = parse_sweeps(["a.b=1,2", "data.datasets=[{name: x, shards: y}],[]"])
    assert found == [("a.b", ["1", "2"]), ("data.datasets", ["[{name: x, shards: y}]", "[]"])]
    for wrong in ("a.b", "a.b=", "a.b=1,,2", "=1"):
        with pytest.raises(UserError, match=f"--sweep {wrong}: specify a key and its values"):
            parse_sweeps([wrong])
    with pytest.raises(UserError, match="the key a is given twice"):
        parse_sweeps(["a=1", "a=2"])


def test_a_key_without_a_valid_value_is_refused_before_any_plan() -> None:
    def load(override: str) -> None:
        load_recipe("debug", [override])

    check_keys(parse_sweeps(["parallel.tensor=1,two"]), load)  # The table says why the second value is invalid.
    with pytest.raises(UserError, match="--sweep parallel.tensr: unknown key"):
        check_keys(parse_sweeps(["parallel.num_ranks=1,2", "parallel.tensr=1,2"]), load)
    with pytest.raises(UserError, match="--sweep parallel.tensor = 'two': expected a whole number"):
        check_keys(parse_sweeps(["parallel.tensor=two"]), load)


@pytest.fixture(scope="module")
def found() -> Sweep:
    """Return a sweep of `debug` on a slow device, on which its plans are large enough for a forecast."""
    slow = parse_accelerator(
        "h100,fp32_tflops=0.01,memory_tb_s=0.001,kernel_us=0,network_latency_us=0,node_latency_us=0"
    )
    device = dataclasses.replace(slow, name="slow")

    def planned(overrides: list[str]) -> Plan:
        recipe = load_recipe("debug", overrides)
        workload = typical_workload(recipe, build_topology(recipe.parallel, recipe.parallel.num_ranks))
        return Planner(recipe, device).plan(recipe, workload)

    swept = parse_sweeps(["parallel.num_ranks=1,2,16", "train.llm_tokens_per_microbatch=256,2048"])
    whole = sweep("debug", "slow", swept, planned, 2.0)
    # The memory is chosen so that half of the plans fit.
    peaks = sorted(row.plan.worst.total for row in whole.rows if row.plan is not None)
    small = dataclasses.replace(device, memory_gib=(peaks[1] + peaks[2]) / 2**31 + device.reserve_gib)
    rows = [
        row if row.plan is None else dataclasses.replace(row, plan=dataclasses.replace(row.plan, accelerator=small))
        for row in whole.rows
    ]
    return dataclasses.replace(whole, rows=tuple(rows))


def test_the_table_has_all_combinations(found: Sweep) -> None:
    text = sweep_table(found)
    # Letters replace the names of the keys, which would make the table wider than 100 columns.
    assert text.startswith("  a: parallel.num_ranks\n  b: train.llm_tokens_per_microbatch\n")
    header, *lines = text.splitlines()[2:]
    assert header.split()[:4] == ["a", "b", "ranks", "fits"]
    assert header.split()[-1] == "cost" and max(map(len, text.splitlines())) <= WIDTH
    values = [tuple(line.split()[:2]) for line in lines[:6]]
    assert values == [(ranks, tokens) for ranks in ("1", "2", "16") for tokens in ("256", "2048")]
    assert {line.split()[3] for line in lines[:4]} == {"yes", "NO"}
    assert text.count("invalid") == 2 and "16 LLM replicas" in " ".join(text.split())
    fitting = [row.plan for row in found.rows if row.plan is not None and row.plan.fits]
    assert found.any_fits and f"after {duration_text(86400 * min(p.days for p in fitting))}." in fastest(found)


def test_the_cheapest_plan_and_the_amounts_of_data_are_named(found: Sweep) -> None:
    plans = [row for row in found.rows if row.plan is not None and row.plan.fits]
    assert plans[0].plan is not None and "costs" not in fastest(dataclasses.replace(found, rows=(plans[0],)))
    time = dataclasses.replace(plans[0].plan.time, encoders=plans[0].plan.time.encoders * 0.9)
    wide = dataclasses.replace(plans[0].plan.topology, world=1000)
    quick = dataclasses.replace(
        plans[0], values=("9", "9"), plan=dataclasses.replace(plans[0].plan, time=time, topology=wide)
    )
    both = dataclasses.replace(found, rows=(plans[0], quick))
    slow = " ".join(f"{key}={value}" for key, value in zip(found.keys, plans[0].values, strict=True))
    assert "parallel.num_ranks=9" in fastest(both).split(" finishes first")[0]
    assert f"{slow} costs least, " in fastest(both) and "less data" not in fastest(both)
    assert f"{slow} needs the fewest accelerator-hours, " in fastest(dataclasses.replace(both, price=None))
    assert quick.plan is not None
    longer = dataclasses.replace(quick.plan.recipe.train, steps=100)
    more = dataclasses.replace(quick.plan, recipe=dataclasses.replace(quick.plan.recipe, train=longer))
    assert "less data" in fastest(dataclasses.replace(both, rows=(plans[0], dataclasses.replace(quick, plan=more))))


def test_a_plan_with_little_free_memory_is_tight(found: Sweep) -> None:
    plan = next(row.plan for row in found.rows if row.plan is not None)

    def with_usable(usable_bytes: float) -> Plan:
        device = dataclasses.replace(plan.accelerator, memory_gib=usable_bytes / 2**30 + plan.accelerator.reserve_gib)
        return dataclasses.replace(plan, accelerator=device)

    verdicts = {1.2: "yes", 1.01: "tight", 0.99: "NO"}
    assert {k: with_usable(k * plan.worst.total).verdict for k in verdicts} == verdicts
    assert "fits        yes, but tightly: " in report(with_usable(1.01 * plan.worst.total))
    assert "7% higher" not in report(with_usable(1.2 * plan.worst.total))


def test_the_png_is_drawn(found: Sweep, tmp_path: Path) -> None:
    path = tmp_path / "sweep.png"
    plot(as_tree(found), path)
    with Image.open(path) as image:
        assert image.width > 1000 and image.height > 700
        assert len(set(image.convert("RGB").resize((200, 150)).getdata())) > 50  # neither blank nor of one color


@pytest.mark.slow
def test_the_page_shows_the_plans_on_all_screens(found: Sweep, tmp_path: Path) -> None:
    need_chromium()
    path = tmp_path / "sweep.html"
    plot(as_tree(found), path)
    page = browse(path)
    assert page.root["data-state"] == "ready" and page.root["data-errors"] == ""
    assert page.ids == {"time", "mfu", "memory", "cost", "plans"} and len(page.rows) == 6
    legal = [row.plan for row in found.rows if row.plan is not None]
    shown = [page.numbers[f"{n} MFU"] for n in range(len(legal))]
    assert shown == pytest.approx([plan.time.mfu for plan in legal])
    high = [plan.cost(plan.seconds_range[1], 2.0) for plan in legal]
    assert [page.numbers[f"{n} cost"] for n in range(len(legal))] == pytest.approx(high)
    for width, screen in measure(path).items():
        assert screen["overflow"] <= 0 and screen["state"] == "ready", (width, screen)


def test_the_name_of_the_plot_is_checked(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--plot x.pdf: the name must end with .png or .html"):
        check_plot(Path("x.pdf"))
    with pytest.raises(UserError, match="make it first"):
        check_plot(tmp_path / "no" / "x.png")
