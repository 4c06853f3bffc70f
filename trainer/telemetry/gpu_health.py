"""Hardware faults of a node's GPUs during a training run: Xid errors, uncorrected memory errors and throttling.

One rank on each node looks for faults in a thread. A fault is recorded as an event of the run. If an attempt ends
because of it, the fault is not mistaken for a software fault, and the next attempt can avoid the node. This module does
not import torch.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import NamedTuple

_QUERY = (
    "index,ecc.errors.uncorrected.volatile.total,clocks_event_reasons.hw_thermal_slowdown,"
    "clocks_event_reasons.hw_power_brake_slowdown"
)
_ANSWER_SEC = 30.0
_XID = re.compile(r"NVRM: Xid \((PCI:[^)]*)\): (\d+)")
_OF_PROGRAMS = frozenset({13, 31, 43, 45, 68, 109})
"""The Xid errors that are caused by an error in a program or by its termination, according to NVIDIA's list of Xid
errors."""


class GpuFault(NamedTuple):
    """A fault of a GPU."""

    gpu: str
    """The index or the PCI address of the GPU."""
    what: str
    """A description of the fault."""
    is_broken: bool
    """True if the GPU must not be used until it is repaired or reset; False if it is only slow."""


Read = Callable[[Sequence[str]], str]
"""A function that runs a command and returns its output, or an empty string if the command is missing or fails."""


def read_command(command: Sequence[str]) -> str:
    """Run a command and return its output, or an empty string if it is missing, fails, or does not end in time."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_SEC, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def find_faults(read: Read = read_command) -> list[GpuFault]:
    """Return the faults of this node's GPUs that `nvidia-smi` and the kernel's log report.

    Both sources are optional. If `nvidia-smi` is missing or the kernel's log cannot be read, the faults from this
    source are not found.
    """
    faults = []
    for line in read(["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]).splitlines():
        index, errors, hot, power = (part.strip() for part in (*line.split(","), "", "", "")[:4])
        if errors.isdigit() and int(errors) > 0:
            faults.append(GpuFault(index, f"{errors} uncorrected memory errors", True))
        reasons = [name for name, value in (("heat", hot), ("the power brake", power)) if value == "Active"]
        if reasons:
            faults.append(GpuFault(index, f"clocks are reduced because of {' and '.join(reasons)}", False))
    for address, number in _XID.findall(read(["dmesg"])):
        if int(number) not in _OF_PROGRAMS:
            faults.append(GpuFault(address, f"Xid {number}", True))
    return faults


def node_name() -> str:
    """Return the name of this node, which is Slurm's name in a Slurm job, and the short host name otherwise."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname().partition(".")[0]


class GpuWatch:
    """A context manager that looks for new faults of this node's GPUs in a thread.

    Faults that exist at the start are not reported, since the preflight check has accepted the node despite them.

    Args:
        emit: A function that the thread calls once for each new fault.
        every_sec: The time between two checks, in seconds.
        find: A function that returns all faults.
    """

    def __init__(
        self,
        emit: Callable[[GpuFault], None],
        every_sec: float = 60.0,
        find: Callable[[], list[GpuFault]] = find_faults,
    ) -> None:
        self._emit, self._every_sec, self._find = emit, every_sec, find
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gpu-watch", daemon=True)

    def __enter__(self) -> GpuWatch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()

    def _run(self) -> None:
        known = set(self._find())
        while not self._ended.wait(self._every_sec):
            for fault in self._find():
                if fault not in known:
                    known.add(fault)
                    self._emit(fault)
