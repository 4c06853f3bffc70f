"""Rendering of a tokenizer's chat template within a time limit, since the template is not trusted.

transformers renders templates in a sandbox. A template in the sandbox cannot access files or other objects. It can
still run for an unlimited time, and raise any error.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from model.conversation import Message
from model.errors import UserError

LIMIT_SEC = 10.0
"""The time limit for rendering, in seconds. Templates of published models need less than a millisecond."""


class _Overdue(BaseException):
    """Raised in the rendering thread.

    It is not an Exception, so handlers in the template's code do not catch it.
    """


class ChatError(UserError):
    """Raised when a chat template cannot be used.

    Args:
        where: The template.
        reason: The problem, as the rest of a sentence whose subject is the template.
        remedy: The action that solves the problem.
    """

    def __init__(self, where: str, reason: str, remedy: str) -> None:
        super().__init__(f"{where} {reason}; {remedy}")
        self.reason = reason


def render_chat(
    tokenizer: Any, messages: Sequence[Message], *, prompts: bool = True, limit_sec: float = LIMIT_SEC
) -> str:
    """Return the text that a tokenizer's chat template renders for messages.

    Args:
        tokenizer: The transformers tokenizer.
        messages: The messages.
        prompts: Whether the text ends with the header of the next answer.
        limit_sec: The time limit for rendering, in seconds.

    Raises:
        ChatError: If the template raises an error, or rendering takes longer than the limit.
    """
    where = f"the chat template of the tokenizer {tokenizer.name_or_path!r:.200}"
    try:
        prompt: str = _within(
            limit_sec,
            lambda: tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompts),
        )
    except _Overdue:
        remedy = "use another tokenizer, or set data.tokenizer.chat_template to false"
        raise ChatError(where, f"was not rendered within {limit_sec:g} s", remedy) from None
    except Exception as error:  # noqa: BLE001 - the template may raise anything
        reason = f"fails: {type(error).__name__}: {error}"[:300]
        remedy = "correct it, or set data.tokenizer.chat_template to false"
        raise ChatError(where, reason, remedy) from None
    return prompt


def _within(limit_sec: float, work: Callable[[], Any]) -> Any:
    """Call `work` and return its result. If `work` takes longer than `limit_sec`, `_Overdue` is raised within it.

    `work` must run Python code, since a single long call of C code cannot be interrupted.
    """
    thread, lock, state = threading.get_ident(), threading.Lock(), {"done": False, "overdue": False}

    def interrupt() -> None:
        with lock:
            if not state["done"]:
                state["overdue"] = True
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_Overdue))

    timer = threading.Timer(limit_sec, interrupt)
    timer.daemon = True
    timer.start()
    try:
        return work()
    finally:
        timer.cancel()
        with lock:
            state["done"] = True
        if state["overdue"]:  # The exception is raised here if it has not been raised in `work` yet.
            for _ in range(100):
                time.sleep(0)
