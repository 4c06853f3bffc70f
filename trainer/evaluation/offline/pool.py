"""Processes that share an evaluation's samples."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from model.errors import UserError
from trainer.evaluation.offline.worker import Outcome, Request, Worker, serve

AnswerJobs = Callable[[Sequence[Sequence[int]]], Iterator[list[Outcome]]]
"""Answers jobs (places in the data); gives the outcomes of each job, in the order in which they are ready. Take all of
them before the next call."""
_AHEAD = 2
"""Jobs that a worker has: one that it answers, one whose audio it reads."""
_LAST_WORDS_SEC = 10.0


@contextmanager
def open_workers(request: Request, num: int) -> Iterator[AnswerJobs]:
    """Load the model `num` times, in as many processes that share the machine's devices; 1: in this one.

    None of them outlives the block, or this process.

    Raises:
        UserError: see `Worker`; a worker died.
    """
    if num == 1:
        yield Worker(request).answer_jobs
        return
    context = multiprocessing.get_context("spawn")
    workers: dict[Connection, BaseProcess] = {}
    try:
        for place in range(num):
            ours, theirs = context.Pipe()
            process: BaseProcess = context.Process(target=serve, args=(theirs, request, place, num), daemon=True)
            process.start()
            theirs.close()  # so that the end of the process is the end of the connection
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
        # A worker that is gone is noticed where its answer is waited for.
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
    if todo:  # no worker was there to take them
        raise _ended(next(iter(workers.values())))


def _received(connection: Connection, process: BaseProcess) -> list[Outcome]:
    try:
        message: list[Outcome] | str = connection.recv()
    except (EOFError, ConnectionResetError):  # the latter if it left jobs unread
        raise _ended(process) from None
    if isinstance(message, str):
        raise UserError(message)
    return message


def _ended(process: BaseProcess) -> UserError:
    process.join(_LAST_WORDS_SEC)
    return UserError(
        f"a worker ended with exit code {process.exitcode}; what is predicted is kept, the same command goes on; "
        "if memory was short, lower --nproc or --batch-size"
    )
