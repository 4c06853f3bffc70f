"""The command line that runs one of this project's modules in a new process."""

from __future__ import annotations

import sys
from pathlib import Path

_ROOT = Path(__file__).parents[2]
"""The folder that contains the packages `model`, `trainer` and `tools`: a checkout or site-packages."""

_RUN = (
    "import runpy, sys; root, module = sys.argv[1:3]; sys.path[0] = root; sys.argv[1:3] = []; "
    "runpy.run_module(module, run_name='__main__', alter_sys=True)"
)


def module_command(module: str, *arguments: str) -> list[str]:
    """Return a command like `python -m MODULE ARGUMENTS` that finds this project's modules from any folder.

    `python -m` searches the current folder first, where a user may have another `model.py` or `tools/`.

    Args:
        module: The dotted name of the module, such as `trainer`.
        arguments: The arguments of the module.
    """
    return [sys.executable, "-c", _RUN, str(_ROOT), module, *arguments]


def rank_command(module: str, *arguments: str) -> list[str]:
    """Return the command of a rank, which is like that of `module_command`.

    Until the rank handles signals itself, Ctrl-C ends it without a traceback.
    """
    quiet = "import signal; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    return [sys.executable, "-c", quiet + _RUN, str(_ROOT), module, *arguments]
