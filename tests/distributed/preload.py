"""The imports that the ranks of all tests need. They are executed once (`tests.distributed.harness`)."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # torch reads it when it is imported

from trainer.engine.imports import lean_imports

with lean_imports():
    import trainer.build
    import trainer.parity  # noqa: F401
