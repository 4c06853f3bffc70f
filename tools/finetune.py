"""Fine-tune Whisper base and SmolLM2-135M on real recordings, and compare the scores before and after.

earshot finetune data.root=DIR               trains on the kit of real recordings in DIR
earshot finetune --seed 2 data.root=DIR      the same with a different seed, in a run of its own
earshot finetune stages.1.steps=1000         trains for more steps

The command downloads the models, synthesizes the additional training data, trains the recipe finetune_kit, evaluates
the test split before and after training, and appends the results to finetune_kit.jsonl in the folder of runs. Rerun an
interrupted command to resume it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from model.errors import UserError
from tools.demo import read_jsonl, report, run_command
from tools.fetch_models import MODELS, fetch
from tools.spoken_text import MANIFEST, write
from trainer.config.load import load_recipe
from trainer.config.schema import Recipe
from trainer.run.command import module_command

RECIPE = "finetune_kit"
SPLIT = "test"
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**32)}
"""Variables that make glibc keep freed memory. Otherwise, every step returns memory to the kernel and requests it
again."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code: 2 after printing a UserError, else the exit code of the training run.
    """
    parser = argparse.ArgumentParser(
        prog="earshot finetune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="seed for the run (default: 1)")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help=f"keys of the recipe {RECIPE} to change, e.g. data.root=DIR"
    )
    options = parser.parse_args(arguments)
    name = RECIPE if options.seed == 1 else f"{RECIPE}-seed{options.seed}"
    keys = [f"name={name}", f"seed={options.seed}", f"eval.final_split={SPLIT}", "eval.before=true", *options.overrides]
    try:
        recipe = load_recipe(RECIPE, keys)
        rows = rows_of(recipe)
        fetch_weights(recipe)
        keys += precision(recipe, options.overrides) + speak(recipe)
        print(f"training: earshot train {RECIPE} {' '.join(keys)}", flush=True)
        start_sec, start_cpu_sec = time.perf_counter(), _cpu_sec()
        code = run_command(module_command("trainer", RECIPE, *keys), KEEP_MEMORY | os.environ)
        if code == 0:
            run_dir = Path(recipe.train.run_dir) / recipe.name
            took = {"wall_sec": time.perf_counter() - start_sec, "cpu_sec": _cpu_sec() - start_cpu_sec}
            print("\n" + report(run_dir, rows, next_steps(recipe, run_dir), recipe.eval.final_split))
            print(f"\nthis call took {took['wall_sec'] / 60:.0f} minutes and {took['cpu_sec']:.0f} CPU seconds")
            print(f"results         {append_results(recipe, run_dir, took)}")
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def rows_of(recipe: Recipe) -> list[dict[str, Any]]:
    """Return the rows of all manifests of a recipe, except the one that this command writes.

    Raises:
        UserError: If a manifest does not exist.
    """
    found = []
    manifests = (dataset.manifest for dataset in recipe.data.datasets)
    for manifest in dict.fromkeys(name for name in manifests if name is not None and name != MANIFEST):
        path = Path(recipe.data.root) / manifest
        if not path.is_file():
            raise UserError(f"{path}: no such manifest; set data.root=DIR to the folder of the kit")
        found += read_jsonl(path)
    return found


def fetch_weights(recipe: Recipe) -> None:
    """Download the missing weights of a recipe that `earshot models` can download.

    Raises:
        UserError: If a download fails.
    """
    by_name = {model.name: model for model in MODELS}
    weights = [*(encoder.weights for encoder in recipe.model.encoders), recipe.model.llm.weights]
    for folder in dict.fromkeys(Path(name) for name in weights if name is not None):
        if not folder.exists() and folder.name in by_name:
            print(f"models: earshot models {folder.name} --out {folder.parent}", flush=True)
            fetch(by_name[folder.name], folder.parent)


def speak(recipe: Recipe) -> list[str]:
    """Write the synthetic speech that a dataset of the recipe refers to, unless it exists.

    Returns:
        Overrides with the path of its manifest; empty if no dataset refers to it, or if it is in `data.root`.

    Raises:
        UserError: If the kit has no texts, or a synthesizer is missing.
    """
    root = Path(recipe.data.root)
    numbers = [i for i, dataset in enumerate(recipe.data.datasets) if dataset.manifest == MANIFEST]
    if not numbers or (root / MANIFEST).is_file():
        return []
    folder = Path(recipe.train.run_dir).absolute() / "spoken"
    if not (folder / MANIFEST).is_file():
        print(f"speech: earshot spoken-text {root} {folder}", flush=True)
        write(root, folder)
    return [f"data.datasets.{i}.manifest={folder / MANIFEST}" for i in numbers]


def precision(recipe: Recipe, overrides: Sequence[str], cpu_flags: str | None = None) -> list[str]:
    """Return the override that trains in fp32 on a CPU that multiplies bf16 more slowly; empty if not needed.

    CPUs with AMX or AVX512_BF16 multiply bf16 faster than fp32.

    Args:
        recipe: The recipe, with the overrides.
        overrides: The user's overrides. If one of them sets the precision, it is kept.
        cpu_flags: The contents of Linux's /proc/cpuinfo; None to read it. An unknown CPU counts as one without them.
    """
    if recipe.train.precision != "bf16" or torch.cuda.is_available():
        return []
    if any(key.startswith("train.precision=") for key in overrides):
        return []
    source = Path("/proc/cpuinfo")
    if cpu_flags is None:
        cpu_flags = source.read_text(encoding="utf-8") if source.exists() else ""
    if {"amx_bf16", "avx512_bf16"} & set(cpu_flags.split()):
        return []
    print("precision: fp32, since this CPU has neither AMX nor AVX512_BF16, without which bf16 is slower", flush=True)
    return ["train.precision=fp32"]


def append_results(recipe: Recipe, run_dir: Path, took: Mapping[str, float]) -> Path:
    """Append the scores of a finished run to a JSONL file in the folder of runs, and return its path."""
    pattern = rf"scores-{recipe.eval.final_split}-step(\d+)\.json"
    steps = {int(m[1]): path for path in run_dir.iterdir() if (m := re.fullmatch(pattern, path.name))}
    scores = json.loads(steps[max(steps)].read_text(encoding="utf-8"))
    line = {
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "run": recipe.name,
        "seed": recipe.seed,
        "versions": {name: version(name) for name in ("torch", "transformers", "deepspeed", "megatron-core")},
        **{key: round(value) for key, value in took.items()},
        **{key: scores[key] for key in ("split", "step", "num_samples", "scores")},
    }
    results = run_dir.parent / f"{RECIPE}.jsonl"
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return results


def next_steps(recipe: Recipe, run_dir: Path) -> str:
    """Return a text with the run's files and the commands that a user may want to try next."""
    return "\n".join(
        [
            f"files           {run_dir}/  (summary.json, metrics.jsonl, predictions, checkpoints)",
            f"with a page     earshot evaluate {run_dir} --data {recipe.data.root}/asr.jsonl --split test",
            f"export          earshot export {run_dir} my_model",
            "train longer    earshot finetune stages.1.steps=1000 name=longer",
            "your data       docs/finetune.md",
        ]
    )


def _cpu_sec() -> float:
    """Return the CPU time of all child processes that have ended, in seconds."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    sys.exit(main())
