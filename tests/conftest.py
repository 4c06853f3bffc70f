"""Configuration of pytest: which folders and files have slow tests, and the handling of Ctrl-C.

The tests in `SLOW_PLACES` start ranks, servers or a cluster, or trace large models. Other slow tests are marked with
`@pytest.mark.slow`.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SLOW_PLACES = (
    "cluster",
    "distributed",
    "golden",
    "model/test_encoder_families.py",
    "model/test_llm_context.py",
    "model/test_pretended_device.py",
    "real_weights",
    "services",
    "test_end_to_end.py",
    "test_host_syncs.py",
    "test_lora_run.py",
    "test_run_tokenizer.py",
    "test_seam_encoder_family.py",
    "test_seam_llm_family.py",
    "test_seam_loss.py",
    "test_seam_task.py",
    "test_seam_tracker.py",
    "test_survive.py",
    "test_wheel.py",
    "tools/test_export.py",
    "tools/test_export_lora.py",
    "tools/test_export_trust.py",
    "tools/test_import_model.py",
    "tools/test_kill_test.py",
    "tools/test_profile_experts.py",
    "tools/test_serve.py",  # starts a browser
    "tools/test_vllm_plugin.py",
    "trainer/test_audiobench.py",
    "trainer/test_expert_usage_page.py",  # starts a browser
    "trainer/test_plan_formulas.py",  # these three trace many layers
    "trainer/test_plan_llm_families.py",
    "trainer/test_plan_published.py",
    "trainer/test_plan_sweep.py",
    "trainer/test_scorecard_page.py",
)
_SLOW_PATHS = frozenset(TESTS / place for place in SLOW_PLACES)


def pytest_configure() -> None:
    """Let the processes that tests start receive Ctrl-C.

    A shell without job control starts background commands with SIGINT ignored, and all their processes inherit this.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Skip the import of files whose tests are all slow if only fast tests are run (`-m "not slow"`)."""
    return True if config.option.markexpr == "not slow" and collection_path in _SLOW_PATHS else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests below `SLOW_PLACES` as slow, and move the files with slow tests before all others.

    If several processes run the files in this order, none of them still runs a long file when the others have finished.
    """
    for item in items:
        if not _SLOW_PATHS.isdisjoint((item.path, *item.path.parents)):
            item.add_marker(pytest.mark.slow)
    slow_files = {item.path for item in items if item.get_closest_marker("slow") is not None}
    items.sort(key=lambda item: item.path not in slow_files)
