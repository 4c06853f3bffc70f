"""The imports that ranks need in all tests. The server of `tests.distributed.harness` executes them once."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # torch reads the variable when it is imported

from trainer.engine.imports import lean_imports

with lean_imports():
    # The models of most tests.
    from transformers import HubertModel, LlamaForCausalLM, WavLMModel, WhisperModel  # noqa: F401

    import trainer.build
    import trainer.parity  # noqa: F401
