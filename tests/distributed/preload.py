"""What every rank of the tests needs, imported once; see `tests.distributed.harness`."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is loaded

from trainer.engine.imports import lean_imports

with lean_imports():
    import trainer.build
    import trainer.parity  # noqa: F401
