"""The tables that list, for each family and each property, the test that checks the property.

`python -m tests.family_table` prints the tables that docs/families.md contains. The families of a test are read from
the test's parameters, so the tables cannot list a family that the test does not cover. With `--list`, the command
prints only the tests, as arguments for pytest.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from model.encoders.families import ENCODER_FAMILIES
from model.llm.families import LLM_FAMILIES
from tests.distributed import test_encoder_families as sharded
from tests.distributed import test_ffn_experts, test_llm_parallel, test_parity
from tests.encoder_table import CASES, one_per_family
from tests.model import (
    test_encoder_families,
    test_encoders,
    test_encoders_registry,
    test_llm_experts,
    test_llm_import,
    test_llm_megatron,
)
from tests.tools import test_export, test_export_families, test_import_model
from trainer.export.published.table import PUBLISHED
from trainer.parity_cases import tiny_model


@dataclass(frozen=True)
class Fill:
    """A test, and the families for which it shows a property."""

    test: Callable[..., Any]
    families: frozenset[str]
    cases: tuple[str, ...] = ()
    """The ids of the test's cases that show the property; empty if all of them do."""

    @property
    def place(self) -> str:
        """The file and the name of the test."""
        return f"{self.test.__module__.replace('.', '/')}.py::{self.test.__name__}"


def fill(test: Callable[..., Any], families: Iterable[str], cases: Iterable[str] = ()) -> Fill:
    return Fill(test, frozenset(families), tuple(cases))


def parameters(test: Callable[..., Any], name: str) -> list[Any]:
    """Return the values of the parameter `name` of a test."""
    for mark in getattr(test, "pytestmark", ()):
        if mark.name == "parametrize":
            names = mark.args[0].split(",") if isinstance(mark.args[0], str) else list(mark.args[0])
            if name in names:
                place = names.index(name)
                return [row if len(names) == 1 else row[place] for row in mark.args[1]]
    raise LookupError(f"{test.__name__} has no parameter {name}")


def of_cases(test: Callable[..., Any]) -> Fill:
    """Return the families of the cases in `tests/encoder_table.py` that a test's parameter `name` selects."""
    return fill(test, (CASES[name].family for name in parameters(test, "name")))


def of_configs(test: Callable[..., Any], names: Iterable[str] | None = None) -> Fill:
    """Return the families of the configs in `tests/model/test_encoders.py` that a test's parameter `name` selects.

    If `names` is given, it replaces the values of the parameter.
    """
    return fill(test, (test_encoders.CONFIGS[name].family for name in names or parameters(test, "name")))


def tiny_encoders(*adapters: str) -> set[str]:
    """Return the families of all encoders of the tiny models with these adapters."""
    models = [tiny_model("llama", adapter) for adapter in adapters]
    return {e.family for m in models for e in (m.primary, *m.experts) if e is not None}


def model_types(test: Callable[..., Any], configs: dict[str, dict[str, Any]]) -> Fill:
    """Return the LLM families of those `configs` that a test's parameter `family` selects."""
    return fill(test, (configs[name]["model_type"] for name in parameters(test, "family")))


SPLIT_EXPERTS = [
    case for case in test_ffn_experts.MORE_CASES if case[0].tp == case[0].pp == 2 and not case[2].get("lora")
]
"""The cases of LLMs with FFN experts at TP2·PP2, except those with low-rank adapters."""
ONE_PER_FAMILY = {CASES[name].family for name in one_per_family()}
ENCODERS: dict[str, list[Fill]] = {
    "features equal transformers'": [
        of_cases(test_encoder_families.test_loaded_weights_compute_what_transformers_computes),
        of_configs(test_encoders.test_whisper_full_equals_transformers),
        of_configs(test_encoders.test_conv_stacks_equal_transformers),
        fill(test_import_model.test_logits_equal_those_of_the_original, ["whisper_no_norm"]),
    ],
    "alone as in a padded batch": [
        of_cases(test_encoder_families.test_batch_changes_neither_features_nor_gradients),
        of_configs(test_encoders.test_batch_changes_neither_features_nor_gradients),
    ],
    "FLOPs": [
        of_cases(test_encoder_families.test_recipe_width_windows_and_flops),
        of_configs(test_encoders.test_dim_and_flops),
    ],
    "ZeRO-3 parity": [
        fill(sharded.test_every_family_trains_on_two_ranks_as_in_one_process, ONE_PER_FAMILY),
        fill(
            test_parity.test_every_kind_of_adapter_with_normalization_equals_the_oracle,
            tiny_encoders(
                *parameters(test_parity.test_every_kind_of_adapter_with_normalization_equals_the_oracle, "adapter")
            ),
        ),
    ],
    "export": [
        fill(test_export_families.test_an_export_computes_what_training_computes, ONE_PER_FAMILY),
        fill(
            test_export.test_every_family_generates_the_same_tokens_without_this_project,
            tiny_encoders(*test_export.ADAPTERS),
        ),
    ],
    "import of published weights": [
        of_cases(test_encoder_families.test_loaded_weights_compute_what_transformers_computes),
        fill(test_encoders_registry.test_loads_whisper_from_either_layout, ["whisper"]),
        fill(test_encoders_registry.test_loads_conv_stacks_with_their_normalisation, ["hubert", "wavlm"]),
        fill(test_import_model.test_logits_equal_those_of_the_original, ["whisper_no_norm"]),
    ],
}
LLMS: dict[str, list[Fill]] = {
    "logits equal transformers'": [
        model_types(test_llm_megatron.test_logits_and_gradients_equal_transformers, test_llm_megatron.FAMILIES)
    ],
    "TP2·PP2 parity": [
        fill(
            test_llm_parallel.test_loss_and_gradients_equal_the_reference,
            (
                test_llm_parallel.FAMILIES[case["family"]]["model_type"]
                for case in test_llm_parallel.CASES[4]
                if case.get("tp") == case.get("pp") == 2
            ),
            ["4"],
        ),
        fill(
            test_ffn_experts.test_more_topologies_equal_the_oracle,
            (family for _, family, _ in SPLIT_EXPERTS),
            map(test_ffn_experts.case_name, SPLIT_EXPERTS),
        ),
    ],
    "decoding with a cache": [
        model_types(test_llm_megatron.test_decoding_with_a_cache_equals_the_whole_forward, test_llm_megatron.FAMILIES)
    ],
    "export": [fill(test_export.test_every_family_generates_the_same_tokens_without_this_project, LLM_FAMILIES)],
    "import of published weights": [
        fill(
            test_llm_import.test_a_folder_of_transformers_gives_the_same_logits,
            parameters(test_llm_import.test_a_folder_of_transformers_gives_the_same_logits, "family"),
        ),
        model_types(test_llm_experts.test_a_stock_folder_is_read_and_computes_the_same, test_llm_experts.FAMILIES),
    ],
}
SPEECH_LLMS: dict[str, list[Fill]] = {
    "imported logits equal the original's": [
        fill(
            test_import_model.test_logits_equal_those_of_the_original,
            parameters(test_import_model.test_logits_equal_those_of_the_original, "name"),
        )
    ],
    "export in the original layout": [
        fill(
            test_import_model.test_the_original_layout_is_exported,
            parameters(test_import_model.test_the_original_layout_is_exported, "name"),
        )
    ],
}
TABLES: dict[str, tuple[Iterable[str], dict[str, list[Fill]]]] = {
    "Encoder families": (ENCODER_FAMILIES, ENCODERS),
    "LLM families": (LLM_FAMILIES, LLMS),
    "Published speech LLMs": (PUBLISHED, SPEECH_LLMS),
}


def empty_cells(families: Iterable[str], columns: dict[str, list[Fill]]) -> list[tuple[str, str]]:
    """Return the family and the property of every cell that no test fills."""
    return [
        (family, column)
        for family in families
        for column, fills in columns.items()
        if not any(family in one.families for one in fills)
    ]


def markdown() -> str:
    """Return all tables, with a letter for each test in a cell and a legend."""
    parts = []
    for title, (families, columns) in TABLES.items():
        tests = list(dict.fromkeys(one.test for fills in columns.values() for one in fills))
        places = {one.test: one.place for fills in columns.values() for one in fills}
        letters = {test: chr(ord("a") + number) for number, test in enumerate(tests)}
        lines = [f"## {title}", "", f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        for family in families:
            cells = [
                " ".join(letters[one.test] for one in fills if family in one.families) for fills in columns.values()
            ]
            lines.append(f"| `{family}` | {' | '.join(cells)} |")
        lines += ["", *(f"- {letters[test]}: `{places[test]}`" for test in tests)]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def tests() -> list[str]:
    """Return all tests of the tables, as arguments for pytest."""
    found = [one for _, columns in TABLES.values() for fills in columns.values() for one in fills]
    names = (f"{one.place}[{case}]" if case else one.place for one in found for case in one.cases or ("",))
    return list(dict.fromkeys(names))


if __name__ == "__main__":
    print("\n".join(tests()) + "\n" if "--list" in sys.argv[1:] else markdown(), end="")
