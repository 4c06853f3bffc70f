"""Checks and tokenization of conversations (`messages`).

A conversation is tokenized in segments: the prompt up to the first answer, the first answer, the prompt up to the
second answer, and so on. Training (`trainer/data`) and the exported processor share this code, so that both produce
the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from model.prompt import render

AUDIO_TAG = "<audio>"
"""The text that stands for a clip in a message whose content is a string."""
ROLES = ("system", "user", "assistant")
MAX_MESSAGES = 512
"""The largest number of messages in a conversation. It limits the cost of rendering the chat template, which happens
once for each answer."""
_KEYS = {"role", "content", "loss"}
_ANSWER = "Yes, 7 is what was said."
"""An answer with which chat templates are tested. It must not occur in a chat template."""
_BLOCK_KEYS = {"text": {"type", "text"}, "audio": {"type", "audio"}}

Message = dict[str, str]
"""A message with the keys `role` and `content`, as chat templates read it."""
Chat = Callable[[Sequence[Message], bool], str]
"""A function that renders messages with a chat template. If the flag is true, the generation prompt (the
header of the next answer) is appended.
"""


class ConversationError(ValueError):
    """Raised when messages are not a conversation, or when a chat template does not preserve them."""


@dataclass(frozen=True)
class Turn:
    """One message."""

    role: str
    """`system`, `user` or `assistant`."""
    texts: tuple[str, ...]
    """The pieces of text before, between and after the clips."""
    loss: bool | None = None
    """Whether the answer has labels; None to use the recipe's setting."""

    @property
    def num_clips(self) -> int:
        """The number of clips in the message."""
        return len(self.texts) - 1

    @property
    def text(self) -> str:
        """The text without the clips."""
        return "".join(self.texts)


def question(instruction: str, num_clips: int) -> Turn:
    """Return the user message of a sample with one instruction. The instruction follows the clips."""
    return Turn("user", ("",) * num_clips + (instruction,))


_QUESTION = question("What is said?", 0)


def clip_texts(turns: Sequence[Turn]) -> list[str]:
    """Return the text of the message that each clip belongs to."""
    return [turn.text for turn in turns for _ in range(turn.num_clips)]


def read_turns(messages: Any) -> tuple[Turn, ...]:
    """Check messages and return them as turns.

    Args:
        messages: A list of objects with `role` and `content`. The content is text in which `<audio>` stands for a clip,
            or a list of blocks `{"type": "audio"}` (optionally with `audio`) and `{"type": "text", "text": …}`.
            Assistant messages may have `loss`.

    Returns:
        The turns. After an optional system prompt, user and assistant alternate, beginning with the user. Whitespace
        around answers is removed.

    Raises:
        ConversationError: If a message has a different form, is empty or out of order, or has audio although it is not
            from the user.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise ConversationError(f"messages = {_short(messages)}, but must be a list of objects with role and content")
    if len(messages) > MAX_MESSAGES:
        raise ConversationError(f"there are {len(messages)} messages, but the limit is {MAX_MESSAGES}")
    turns = tuple(_turn(f"message {number}", message) for number, message in enumerate(messages, 1))
    first = 1 if turns[0].role == "system" else 0
    if first == len(turns):
        raise ConversationError("there is only a system prompt; add user and assistant messages")
    for place, turn in enumerate(turns[first:]):
        wanted = ROLES[1 + place % 2]
        if turn.role != wanted:
            raise ConversationError(
                f"message {first + place + 1} is from the {turn.role}, but must be from the {wanted}: after an "
                "optional system prompt, user and assistant alternate"
            )
    return turns


def plain_messages(turns: Sequence[Turn]) -> list[Message]:
    """Return turns as messages whose content is text, in which `<audio>` stands for each clip."""
    return [{"role": turn.role, "content": AUDIO_TAG.join(turn.texts)} for turn in turns]


def audio_blocks(messages: Any) -> list[Any]:
    """Return the value of `audio` for each clip in `messages`, in order; None for a clip without this field.

    The messages need not be valid. Everything except blocks and tags is ignored.
    """
    found: list[Any] = []
    for message in messages if isinstance(messages, list | tuple) else ():
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, str):
            found += [None] * content.count(AUDIO_TAG)
        for block in content if isinstance(content, list | tuple) else ():
            if isinstance(block, Mapping) and block.get("type") == "audio":
                found.append(block.get("audio"))
    return found


def _turn(where: str, message: Any) -> Turn:
    if not isinstance(message, Mapping):
        raise ConversationError(f"{where} = {_short(message)}, but must be an object with role and content")
    role, loss = message.get("role"), message.get("loss")
    if not isinstance(role, str) or role not in ROLES:
        raise ConversationError(f"{where}: role = {_short(role)}, but must be one of {', '.join(ROLES)}")
    if unknown := sorted(map(str, set(message) - _KEYS)):
        raise ConversationError(f"{where}: has {_short(unknown[0])}, but only role, content and loss are allowed")
    if not isinstance(loss, bool | None):
        raise ConversationError(f"{where}: loss = {_short(loss)}, but must be true or false")
    if loss is not None and role != "assistant":
        raise ConversationError(f"{where}: has loss, which only assistant messages may have")
    texts = _texts(where, message.get("content"))
    if role != "user" and len(texts) > 1:
        raise ConversationError(f"{where}: has audio, which only user messages may have")
    if role == "assistant":
        texts = (texts[0].strip(),)
    if len(texts) == 1 and not texts[0].strip():
        raise ConversationError(f"{where}: content is empty")
    return Turn(role, texts, loss)


def _texts(where: str, content: Any) -> tuple[str, ...]:
    """Return the pieces of text before, between and after the clips of a message."""
    if isinstance(content, str):
        return tuple(content.split(AUDIO_TAG))
    if not isinstance(content, list | tuple):
        raise ConversationError(f"{where}: content = {_short(content)}, but must be text or a list of blocks")
    texts = [""]
    for block in content:
        kind = block.get("type") if isinstance(block, Mapping) else None
        allowed = _BLOCK_KEYS.get(kind) if isinstance(kind, str) else None
        if allowed is None or not set(block) <= allowed or (kind == "text" and not isinstance(block.get("text"), str)):
            raise ConversationError(
                f'{where}: block = {_short(block)}, but must be {{"type": "text", "text": …}} or {{"type": "audio", '
                '"audio": …}'
            )
        if kind == "audio":
            texts.append("")
        elif AUDIO_TAG in block["text"]:
            raise ConversationError(f"{where}: a block of text contains {AUDIO_TAG}; use a block of type audio")
        else:
            texts[-1] += block["text"]
    return tuple(texts)


@dataclass(frozen=True)
class PromptFormat:
    """The format of prompts, and the tokenizer that encodes them."""

    template: str
    """The text of a user message that begins with its clips; see `model.prompt.render`."""
    text_template: str
    """The text of a user message without clips."""
    placeholder: str
    placeholder_id: int
    begin: tuple[int, ...]
    """The tokens at the beginning of a conversation without a chat template."""
    end_id: int
    """The token after each answer of a conversation without a chat template."""
    encode: Callable[[str], list[int]]
    """A function that returns the tokens of text, which may contain placeholders, without adding other tokens."""
    chat: Chat | None
    """The chat template; None if there is none."""

    def segments(self, turns: Sequence[Turn]) -> list[list[int]]:
        """Return the tokens of a conversation that ends with a user message, with one placeholder per clip.

        Args:
            turns: The turns.

        Returns:
            The prompt before the first answer, the first answer, the prompt between the first and the second answer,
            and so on up to the prompt before the next answer. If the chat template changes earlier answers or the text
            around them, the whole prompt is the only segment.

        Raises:
            ConversationError: If the prompt does not have exactly one placeholder for each clip.
        """
        texts = self._plain(turns) if self.chat is None else self._rendered(self.chat, turns)
        found = [self.encode(text) for text in texts]
        if self.chat is None:
            found[0][:0] = self.begin
            for prompt in found[2::2]:
                prompt.insert(0, self.end_id)
        users = [turn for turn in turns if turn.role == "user"]
        wanted = [turn.num_clips for turn in users] if len(found) > 1 else [sum(turn.num_clips for turn in users)]
        for user, num_clips, prompt in zip(users, wanted, found[::2], strict=False):
            if (num_places := prompt.count(self.placeholder_id)) != num_clips:
                raise ConversationError(
                    f"the prompt for {user.text[:200]!r} has {num_places} audio placeholders, but the number of "
                    f"clips is {num_clips}"
                )
        return found

    def closing(self, turns: Sequence[Turn]) -> list[int]:
        """Return the tokens that follow the last answer of a conversation.

        Raises:
            ConversationError: If the rendered conversation does not contain the answer exactly once.
        """
        if self.chat is None:
            return [self.end_id]
        # The real answer may also occur in the template, so its end is located with an answer that does not.
        parts = self.chat(self.messages([*turns[:-1], Turn("assistant", (_ANSWER,))]), False).split(_ANSWER)
        if len(parts) != 2:
            raise ConversationError(
                f"a test conversation rendered with the chat template contains the answer {len(parts) - 1} times "
                "instead of once"
            )
        return self.encode(parts[1])

    def end_of_answer(self) -> int | None:
        """Return the first token after an answer; None if there is none.

        Raises:
            ConversationError: If the rendered conversation does not contain the answer exactly once.
        """
        return next(iter(self.closing((_QUESTION, Turn("assistant", (_ANSWER,))))), None)

    def keeps_answers(self) -> bool:
        """Return whether the chat template extends a conversation without changing its earlier part.

        Only then can one sequence of tokens have labels for several answers.
        """
        return len(self.segments((_QUESTION, Turn("assistant", (_ANSWER,)), _QUESTION))) > 1

    def messages(self, turns: Sequence[Turn]) -> list[Message]:
        """Return the turns as messages for a chat template, with one placeholder per clip."""
        return [{"role": turn.role, "content": self.content(turn)} for turn in turns]

    def content(self, turn: Turn) -> str:
        """Return the text of a turn with placeholders.

        The prompt template is applied to a user turn unless text precedes a clip.
        """
        if turn.role != "user":
            return turn.text
        if any(turn.texts[:-1]):
            return self.placeholder.join(turn.texts)
        template = self.template if turn.num_clips else self.text_template
        return render(template, turn.text, self.placeholder, turn.num_clips)

    def _plain(self, turns: Sequence[Turn]) -> list[str]:
        """Return the text of each turn. A system prompt becomes the first line of the first message."""
        texts = [self.content(turn) for turn in turns]
        return ["\n".join(texts[:2]), *texts[2:]] if turns[0].role == "system" else texts

    def _rendered(self, chat: Chat, turns: Sequence[Turn]) -> list[str]:
        """Return the text of each segment, rendered with the chat template."""
        messages = self.messages(turns)
        places = [place for place, turn in enumerate(turns) if turn.role == "user"]
        prompts = [chat(messages[: place + 1], True) for place in places]
        texts = prompts[:1]
        for before, after, place in zip(prompts, prompts[1:], places, strict=False):
            answer = turns[place + 1].text
            if not after.startswith(before + answer):
                return prompts[-1:]
            texts += [answer, after.removeprefix(before + answer)]
        return texts


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
