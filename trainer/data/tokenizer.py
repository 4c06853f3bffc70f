"""A common interface to SentencePiece and Hugging Face tokenizers, and the tokenization of prompts with audio.

A prompt is rendered as text with one placeholder per clip, tokenized as a whole, and cut at the placeholder token.
Answers are tokenized separately, so that a prompt has the same tokens in training and generation. `model.conversation`
explains how conversations are divided.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import sentencepiece

from model import prompt
from model.chat import ChatError, render_chat
from model.conversation import Chat, ConversationError, Message, PromptFormat, Turn, question
from model.errors import UserError
from model.pieces import Pieces
from trainer.data.config import TokenizerConfig
from trainer.data.errors import SampleError
from trainer.data.tokenizer_digest import tokenizer_digest, transformers_digest

_MAX_RENDERED = 4096
"""The largest number of rendered prompts that a tokenizer caches."""
_UNREADABLE = (OSError, ValueError, LookupError, ImportError, TypeError, RecursionError, MemoryError)
UNKNOWN_ID_TEXT = "\ufffd"
"""The text of ids that are not in the vocabulary. Such ids occur because an LLM may have more embedding rows than its
tokenizer has pieces."""


class Tokenizer(ABC):
    """A tokenizer whose ids are the indices of the LLM's embedding rows."""

    config: TokenizerConfig
    vocab_size: int
    """The number of ids; the LLM needs at least as many embedding rows."""
    bos_id: int | None
    """The id at the beginning of a prompt, or None if the tokenizer has none."""
    eos_id: int
    """The id at the end of the answer to an `instruction`."""
    turn_end_id: int
    """The id at the end of the answers of a conversation. The chat template determines it; without one, it is
    `eos_id`."""
    keeps_answers: bool
    """Whether answers before the last one of a conversation can have labels; see `PromptFormat.keeps_answers`."""
    pad_id: int | None
    """The id of padding, or None if the tokenizer has none."""
    placeholder_id: int
    """The id that stands for a clip in a prompt."""
    special_ids: frozenset[int]
    """The ids that control the model, such as the end of a turn. No text of a sample may contain them."""

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The ids that end an answer, without duplicates; `eos_id` is the first."""
        return tuple(dict.fromkeys((self.eos_id, self.turn_end_id)))

    @abstractmethod
    def _encode(self, text: str) -> list[int]:
        """Return the tokens of text, which may contain placeholders, without adding special tokens."""

    @abstractmethod
    def piece(self, token: int) -> str:
        """Return the name of an id below `vocab_size`."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids` without special tokens."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """A hash of the vocabulary, the templates and the placeholder; see `tokenizer_digest`."""

    def pieces(self, num_pieces: int) -> Pieces:
        """Return the pieces for a CTC head; see `model.ctc_pieces`.

        Raises:
            UserError: If the tokenizer has no such pieces.
        """
        raise self._no_pieces(num_pieces, "it is not a byte-level BPE tokenizer")

    def _no_pieces(self, num_pieces: int, reason: str) -> UserError:
        return UserError(
            f"model.ctc_pieces = {num_pieces}: {self.config.path or 'the tokenizer'} cannot be used, because {reason}; "
            "lower it, or set model.ctc_vocabulary: bytes"
        )

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a sample's text.

        Raises:
            SampleError: If the text contains the placeholder (`placeholder_in_text`) or a token that controls the model
                (`special_token_in_text`).
        """
        ids = self._encode(text)
        if self.placeholder_id in ids:
            raise self._placeholder_in(text)
        if (token := next((t for t in ids if t in self.special_ids), None)) is not None:
            raise SampleError(
                "special_token_in_text", f"{shorten(text)} contains {self.piece(token)}, which controls the model"
            )
        return ids

    def prompt(self, instruction: str, num_clips: int) -> list[list[int]]:
        """Return the tokens of a prompt, cut at the clips.

        Args:
            instruction: The instruction of the sample.
            num_clips: The number of clips.

        Returns:
            `num_clips + 1` lists of tokens, between which the clips are inserted.

        Raises:
            SampleError: If the instruction contains the placeholder (`placeholder_in_text`), or the chat template
                changes the prompt (`unexpected`).
        """
        return prompt.cut(self.segments((question(instruction, num_clips),))[-1], self.placeholder_id)

    def segments(self, turns: Sequence[Turn]) -> list[list[int]]:
        """Return the tokens of a conversation, divided into segments as in `PromptFormat.segments`.

        Args:
            turns: The turns. The last one must be the user's.

        Raises:
            SampleError: If a turn contains the placeholder (`placeholder_in_text`), or the chat template fails or
                changes the prompt (`unexpected`).
        """
        for turn in turns:
            for text in turn.texts:
                if self.config.placeholder in text:
                    raise self._placeholder_in(text)
        try:
            return self._format.segments(turns)
        except ChatError as error:
            raise SampleError("unexpected", error.reason) from error
        except ConversationError as error:
            raise SampleError("unexpected", str(error)) from error

    def _placeholder_in(self, text: str) -> SampleError:
        return SampleError("placeholder_in_text", f"{shorten(text)} contains {self.config.placeholder}")

    @property
    def _format(self) -> PromptFormat:
        """The format of prompts for this tokenizer."""
        return PromptFormat(
            template=self.config.template,
            text_template=self.config.text_template,
            placeholder=self.config.placeholder,
            placeholder_id=self.placeholder_id,
            begin=() if self.bos_id is None else (self.bos_id,),
            end_id=self.eos_id,
            encode=self._encode,
            chat=self._chat,
        )

    @property
    def _chat(self) -> Chat | None:
        """The chat template; None if there is none."""
        return None


class SentencePieceTokenizer(Tokenizer):
    """A tokenizer that is read from a SentencePiece `.model` file.

    Args:
        path: The file.
        config: The placeholder and the templates.

    Raises:
        UserError: If the file cannot be read, or its vocabulary lacks the placeholder or the end token.
    """

    def __init__(self, path: Path, config: TokenizerConfig) -> None:
        self.path, self.config = path, config
        self._pieces = sentencepiece.SentencePieceProcessor()
        try:
            self._pieces.LoadFromSerializedProto(path.read_bytes())
        except (OSError, RuntimeError) as error:
            raise UserError(f"data.tokenizer.path = {path}: not a readable SentencePiece model ({error})") from None
        self.vocab_size = self._pieces.GetPieceSize()
        self.bos_id = self._pieces.bos_id() if self._pieces.bos_id() >= 0 else None
        self.pad_id = self._pieces.pad_id() if self._pieces.pad_id() >= 0 else None
        self.eos_id = self.turn_end_id = self._pieces.eos_id()
        self.keeps_answers = True
        self.special_ids = frozenset(i for i in range(self.vocab_size) if self._pieces.IsControl(i))
        if self.eos_id < 0:
            raise UserError(f"data.tokenizer.path = {path}: the model has no end token; train it with eos_id")
        self.placeholder_id = self._pieces.PieceToId(config.placeholder)
        if (
            self.placeholder_id == self._pieces.unk_id()
            or self._encode(config.placeholder).count(self.placeholder_id) != 1
        ):
            raise UserError(_no_placeholder(str(path), config.placeholder))

    def _encode(self, text: str) -> list[int]:
        return self._pieces.EncodeAsIds(text)

    def piece(self, token: int) -> str:
        return self._pieces.IdToPiece(token)

    def encode_prompt(self, text: str) -> list[int]:
        """Return the tokens of text, which may contain placeholders."""
        return self._encode(text)

    @property
    def digest(self) -> str:
        pieces = [self._pieces.IdToPiece(i) for i in range(self.vocab_size)]
        ids = (self.bos_id, self.eos_id, self.pad_id)
        return tokenizer_digest(pieces, ids, self._encode, self.config, None)

    def serialized(self) -> bytes:
        """Return the content of the `.model` file."""
        return self._pieces.serialized_model_proto()

    def decode(self, ids: Sequence[int]) -> str:
        hidden = {self._pieces.unk_id(), self.bos_id, self.eos_id, self.pad_id, self.placeholder_id}
        text, run = "", []
        for token in [t for t in ids if t not in hidden]:
            if 0 <= token < self.vocab_size:
                run.append(token)
            else:
                text, run = text + self._pieces.DecodeIds(run) + UNKNOWN_ID_TEXT, []
        return text + self._pieces.DecodeIds(run)


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer that transformers reads without remote code.

    Args:
        path: A `tokenizer.json`, a directory, or a hub id.
        config: The placeholder and the templates.

    Raises:
        UserError: If the tokenizer cannot be read, its vocabulary lacks the placeholder or the end token, or its chat
            template changes a user message.
    """

    def __init__(self, path: str, config: TokenizerConfig) -> None:
        self.config = config
        inner = read_transformers(path, f"data.tokenizer.path = {path}")
        self.inner = inner
        self._lock = Lock()  # The Rust tokenizer fails if two threads use it at the same time.
        self.vocab_size = len(inner)
        self.bos_id, self.pad_id = inner.bos_token_id, inner.pad_token_id
        if inner.eos_token_id is None:
            raise UserError(f"data.tokenizer.path = {path}: no eos_token; name it in its tokenizer_config.json")
        self.eos_id = self.turn_end_id = inner.eos_token_id
        self.keeps_answers = True
        found = inner.convert_tokens_to_ids(config.placeholder)
        # Tokenizers made from SentencePiece models may add a prefix token, so the placeholder may become two tokens.
        if found in (None, inner.unk_token_id) or self._encode(config.placeholder).count(found) != 1:
            raise UserError(_no_placeholder(path, config.placeholder))
        self.placeholder_id = found
        added = {i for i, token in inner.added_tokens_decoder.items() if token.special}
        self.special_ids = frozenset({*inner.all_special_ids, *added} - {found, inner.unk_token_id})
        self.chats = config.chat_template and bool(inner.chat_template)
        self._rendered: dict[str, str] = {}
        if self.chats:
            self._check_chat_template(path)
            self._probe_answers()

    def _check_chat_template(self, path: str) -> None:
        """Check that the chat template inserts the text of a user message once and unchanged.

        Raises:
            UserError: If the template fails, or changes, repeats or drops the text.
        """
        for template, num_clips in ((self.config.template, 2), (self.config.text_template, 0)):
            text = prompt.render(template, "What is said?", self.config.placeholder, num_clips)
            try:
                rendered = self._render([{"role": "user", "content": text}], True)
                problem = None if rendered.count(text.strip()) == 1 else "does not contain the message exactly once"
            except ChatError as error:
                problem = error.reason
            if problem is not None:
                raise UserError(
                    f"data.tokenizer.path = {path}: the chat template, for a single user message, {problem}; set "
                    "data.tokenizer.chat_template: false, or correct the template"
                )

    def _probe_answers(self) -> None:
        """Set `turn_end_id` and `keeps_answers` according to the chat template.

        A template that fails for messages with answers can still be used for samples with one question.
        """
        try:
            self.keeps_answers = self._format.keeps_answers()
            token = self._format.end_of_answer()
        except (ChatError, ConversationError):
            self.keeps_answers = False
        else:
            self.turn_end_id = self.eos_id if token is None or token not in self.special_ids else token

    def _encode(self, text: str) -> list[int]:
        with self._lock:
            return self.inner.encode(text, add_special_tokens=False)

    def piece(self, token: int) -> str:
        return self.inner.convert_ids_to_tokens(token)

    def pieces(self, num_pieces: int) -> Pieces:
        """Implement `Tokenizer.pieces`."""
        backend = getattr(self.inner, "backend_tokenizer", None)
        if backend is None:
            return super().pieces(num_pieces)
        try:
            return Pieces(backend.to_str(), num_pieces)
        except ValueError as error:
            raise self._no_pieces(num_pieces, str(error)) from None

    @property
    def digest(self) -> str:
        return transformers_digest(self.inner, self.config, self._encode)

    @property
    def _chat(self) -> Chat | None:
        return self._render if self.chats else None

    def _render(self, messages: Sequence[Message], prompts: bool) -> str:
        """Return the text of messages in the chat template. transformers renders it in a sandbox.

        Raises:
            ChatError: If the template fails.
        """
        if len(messages) > 1 or not prompts:
            return render_chat(self.inner, messages, prompts=prompts)
        text = messages[0]["content"]
        chat = self._rendered.get(text)  # Many samples have the same instruction.
        if chat is None:
            chat = render_chat(self.inner, messages)
            if len(self._rendered) < _MAX_RENDERED:
                self._rendered[text] = chat
        return chat

    def decode(self, ids: Sequence[int]) -> str:
        text, run = "", []
        for token in ids:
            if 0 <= token < self.vocab_size:
                run.append(token)
            else:
                text, run = text + self.inner.decode(run, skip_special_tokens=True) + UNKNOWN_ID_TEXT, []
        return text + self.inner.decode(run, skip_special_tokens=True)


def read_transformers(path: str, where: str) -> Any:
    """Load a transformers tokenizer without executing code from its folder.

    Args:
        path: A `tokenizer.json`, a directory, or a hub id.
        where: The beginning of error messages, which names the tokenizer.

    Raises:
        UserError: If the tokenizer cannot be read.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # The import is slow and needed only here.

    try:
        if not path.endswith(".json"):
            return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        folder = Path(path).parent
        if (folder / "tokenizer_config.json").exists() and Path(path).name == "tokenizer.json":
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        return PreTrainedTokenizerFast(tokenizer_file=path)
    except Exception as error:
        # An unreadable file causes one of these errors, or a plain Exception from Rust. Any other error is a bug.
        if not isinstance(error, _UNREADABLE) and type(error) is not Exception:
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{where}: transformers cannot read it ({reason})") from error


def load_tokenizer(path: str, config: TokenizerConfig) -> Tokenizer:
    """Load a tokenizer.

    Args:
        path: A `.model` file, a `tokenizer.json`, a directory that contains one of them, or a hub id.
        config: The placeholder and the templates.

    Raises:
        UserError: If the tokenizer cannot be read, or its vocabulary lacks the placeholder or the end token.
    """
    local = Path(path)
    if local.is_dir() and not (local / "tokenizer.json").exists():
        models = sorted(local.glob("*.model"))
        if len(models) == 1:
            local = models[0]
    if local.suffix == ".model":
        return SentencePieceTokenizer(local, config)
    looks_like_hub_id = path.count("/") == 1 and not path.startswith((".", "/", "~")) and local.suffix != ".json"
    if not local.exists() and not looks_like_hub_id:
        raise UserError(
            f"data.tokenizer.path = {path}: no such file; use a SentencePiece .model, a tokenizer.json, "
            "a directory that contains one of them, or null to train a tokenizer"
        )
    return HuggingFaceTokenizer(path, config)


def shorten(text: str) -> str:
    """Return `repr(text)`. The middle of a text with more than 200 characters is omitted."""
    return repr(text) if len(text) <= 200 else f"{text[:90]!r} ... {text[-90:]!r}"


def _no_placeholder(path: str, placeholder: str) -> str:
    return (
        f"data.tokenizer.path = {path}: '{placeholder}' is not a single token; add it to the tokenizer, set "
        "data.tokenizer.placeholder to a reserved token, or train another tokenizer with tools.train_tokenizer"
    )
