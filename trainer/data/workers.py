"""Processes that make batches' pieces, and the memory through which arrays come back from them.

Each process runs a generator (`serve`) and sends what it yields, in order. Arrays travel through a ring of shared
memory; the pipe carries only their places and the small rest. The ring's size and `num_ahead` bound what waits.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import pickle
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from model.errors import UserError

_ALIGN_BYTES = 64


class Workers:
    """One process per element of `jobs`.

    Args:
        jobs: arguments of `serve`, plain values.
        serve: an importable function that yields lists.
        num_ahead: lists that a process may be ahead.
        buffer_bytes: shared memory of one process. A list that does not fit goes through the pipe.
    """

    def __init__(
        self,
        jobs: Sequence[tuple[Any, ...]],
        *,
        serve: Callable[..., Iterator[list[Any]]],
        num_ahead: int,
        buffer_bytes: int,
    ) -> None:
        # Not fork: the training process has threads, of gloo, NCCL and the store's client.
        context = multiprocessing.get_context("spawn")
        self._processes: list[BaseProcess] = []
        self._inboxes: list[_Inbox] = []
        for number, job in enumerate(jobs):
            ours, theirs = context.Pipe()
            inbox = _Inbox(ours, buffer_bytes)
            process = context.Process(
                target=_run, args=(theirs, inbox.path, num_ahead, serve, job), name=f"data-{number}", daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._inboxes.append(inbox)

    def lane_batches(self, batch: int) -> list[Any]:
        """The next list of every process, dealt out again as the jobs' lanes were: one of each in turn.

        Raises:
            UserError: a process met one, or died.
        """
        lists = [self._take(i) for i in range(len(self._inboxes))]
        longest = max(map(len, lists))
        return [part[i] for i in range(longest) for part in lists if i < len(part)]

    def close(self) -> None:
        """End the processes, whatever they do."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
            process.close()
        for inbox in self._inboxes:
            inbox.close()
        self._processes, self._inboxes = [], []

    def _take(self, number: int) -> list[Any]:
        try:
            found = self._inboxes[number].receive()
        except (EOFError, ConnectionResetError):
            process = self._processes[number]
            process.join()
            raise UserError(
                f"data.num_workers: decoding process {number} died (exit code {process.exitcode}; -9: out of memory?); "
                "start again, with fewer processes or a smaller data.buffer_mib and data.read_ahead_mib"
            ) from None
        if isinstance(found, _Failure):
            raise UserError(found.text) if found.of_user else RuntimeError(f"in a decoding process:\n{found.text}")
        return found


class _Failure:
    """What ended a process: a user's error, or the traceback of another."""

    def __init__(self, text: str, of_user: bool) -> None:
        self.text, self.of_user = text, of_user


class _Inbox:
    """The receiving end."""

    def __init__(self, connection: Connection, num_bytes: int) -> None:
        self._connection = connection
        self._file = os.memfd_create("decoded audio")
        os.ftruncate(self._file, num_bytes)
        self._memory = mmap.mmap(self._file, num_bytes)
        self.path = f"/proc/{os.getpid()}/fd/{self._file}"

    def receive(self) -> Any:
        header, places = self._connection.recv()
        if places is None:
            found = pickle.loads(header)
        else:
            start, sizes = places
            # One copy for all: the arrays of a list live and die together.
            with memoryview(self._memory) as ring:
                block = memoryview(bytearray(ring[start : start + sum(map(_aligned, sizes))]))
            buffers, at = [], 0
            for size in sizes:
                buffers.append(block[at : at + size])
                at += _aligned(size)
            found = pickle.loads(header, buffers=buffers)
        with suppress(BrokenPipeError, ConnectionResetError):  # it died since; the next `receive` says so
            self._connection.send(None)  # the memory is free again
        return found

    def close(self) -> None:
        self._connection.close()
        self._memory.close()
        os.close(self._file)


class _Outbox:
    """The sending end: lays lists into the ring, oldest first, and waits while there is no room."""

    def __init__(self, connection: Connection, path: str, num_ahead: int) -> None:
        self._connection, self._num_ahead = connection, num_ahead
        with open(path, "r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 0)
        self._waiting: list[tuple[int, int]] = []
        """First byte and end of what the other side has not taken yet; empty where the pipe carries it."""

    def send(self, value: Any) -> None:
        buffers: list[pickle.PickleBuffer] = []
        header = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
        views = [b.raw() for b in buffers]
        size = sum(_aligned(len(v)) for v in views)
        while len(self._waiting) >= self._num_ahead:
            self._wait()
        if size > len(self._memory):
            self._waiting.append((0, 0))
            self._connection.send((pickle.dumps(value, protocol=5), None))
            return
        start = self._room(size)
        self._waiting.append((start, start + size))
        at = start
        for view in views:
            self._memory[at : at + len(view)] = view
            at += _aligned(len(view))
        self._connection.send((header, (start, [len(v) for v in views])))

    def _room(self, size: int) -> int:
        while True:
            taken = [place for place in self._waiting if place[0] != place[1]]
            if not taken:
                return 0
            first, last = taken[0][0], taken[-1][1]
            if first < last:  # free: behind the newest, and before the oldest
                if last + size <= len(self._memory):
                    return last
                if size < first:
                    return 0
            elif last + size < first:
                return last
            self._wait()

    def _wait(self) -> None:
        self._connection.recv()
        self._waiting.pop(0)


def _aligned(size: int) -> int:
    return -(-size // _ALIGN_BYTES) * _ALIGN_BYTES


def _run(
    connection: Connection,
    path: str,
    num_ahead: int,
    serve: Callable[..., Iterator[list[Any]]],
    job: tuple[Any, ...],
) -> None:
    """The process. It ends with its generator, or when the other side is gone."""
    # These tell the training process to stop; it still needs its data until then, and ends this process itself.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    outbox = _Outbox(connection, path, num_ahead)
    try:
        try:
            for value in serve(*job):
                outbox.send(value)
        except UserError as error:
            outbox.send(_Failure(str(error), of_user=True))
        except (BrokenPipeError, EOFError, ConnectionResetError):
            raise
        except Exception:
            outbox.send(_Failure(traceback.format_exc(), of_user=False))
        while True:
            connection.recv()  # until the other side has taken everything and closes
    except (BrokenPipeError, EOFError, ConnectionResetError):
        # Not exit: threads that wait for a store would be waited for.
        os._exit(0)
