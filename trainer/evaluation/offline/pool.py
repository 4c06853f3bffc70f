"""The pool of worker processes that answer the samples of an evaluation."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from model.errors import UserError
from trainer.evaluation.offline.worker import Outcome, Request, Worker, serve

AnswerJobs = Callable[[Sequence[Sequence[int]]], Iterator[list[Outcome]]]
"""A function that takes batches of sample indices and returns an iterator over the outcomes of each batch.

Batches are yielded in the order in which they are finished. The iterator must be exhausted before the function is
called again.
"""
_AHEAD = 2
"""The number of batches assigned to each worker: the one that it is answering and the one whose audio it is reading."""
_JOIN_SEC = 10.0
"""The time in seconds to wait for a worker to exit after its connection was lost. Its exit code is not known until
then.
"""


@contextmanager
def open_workers(request: Request, num: int) -> Iterator[AnswerJobs]:
    """Return a context manager that starts `num` worker processes and stops them when the block ends.

    Each process loads the model. The processes share the devices of this machine.

    Args:
        request: The evaluation.
        num: The number of processes. If it is 1, no process is started, and the current process loads the model.

    Raises:
        UserError: If the data or the model cannot be used, or a worker process ended unexpectedly.
    """
    if num == 1:
        yield Worker(request).answer_jobs
        return
    context = multiprocessing.get_context("spawn")
    workers: dict[Connection, BaseProcess] = {}
    try:
        for index in range(num):
            ours, theirs = context.Pipe()
            process: BaseProcess = context.Process(target=serve, args=(theirs, request, index, num), daemon=True)
            process.start()
            theirs.close()  # Only the worker keeps this end open, so that the connection closes when the worker dies.
            workers[ours] = process
        yield lambda jobs: _outcomes(workers, jobs)
    finally:
        for connection, ended in workers.items():
            connection.close()
            ended.terminate()
        for ended in workers.values():
            ended.join()


def _outcomes(workers: Mapping[Connection, BaseProcess], jobs: Sequence[Sequence[int]]) -> Iterator[list[Outcome]]:
    todo = list(jobs)[::-1]
    num_given = dict.fromkeys(workers, 0)

    def give(connection: Connection) -> None:
        # If the worker is dead, `_received` raises the error.
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.send(todo[-1] if todo else None)
            if todo:
                todo.pop()
                num_given[connection] += 1

    for connection in list(workers) * _AHEAD:
        give(connection)
    while busy := [connection for connection, num in num_given.items() if num]:
        for ready in wait(busy):
            assert isinstance(ready, Connection)
            outcomes = _received(ready, workers[ready])
            num_given[ready] -= 1
            give(ready)
            yield outcomes
    if todo:  # Every worker is dead.
        raise _ended(next(iter(workers.values())))


def _received(connection: Connection, process: BaseProcess) -> list[Outcome]:
    try:
        message: list[Outcome] | str = connection.recv()
    except (EOFError, ConnectionResetError):
        # A connection is reset if the worker died before it had read all of its batches.
        raise _ended(process) from None
    if isinstance(message, str):
        raise UserError(message)
    return message


def _ended(process: BaseProcess) -> UserError:
    process.join(_JOIN_SEC)
    return UserError(
        f"a worker ended with exit code {process.exitcode}; if it ran out of memory, lower --nproc or --batch-size; "
        "rerun the same command to resume with the predictions made so far"
    )
