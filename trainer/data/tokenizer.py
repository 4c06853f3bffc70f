"""A common interface to SentencePiece and Hugging Face tokenizers, which also tokenises the prompt around the audio.

The prompt is rendered as text with one placeholder per clip, tokenised as a whole, and cut at the placeholder token.
The answer is tokenised separately, so that the prompt has the same tokens in training and generation.
"""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import sentencepiece

from model import prompt
from model.chat import ChatError, render_chat
from model.errors import UserError
from trainer.data.config import TokenizerConfig
from trainer.data.errors import SampleError

PROBES = (
    "",
    " two  spaces, a tab\tand a line\nbreak ",
    "Was it 3:15 p.m.? Café № ½ ﬁne — “quoted” ÄÖÜ",
    "日本語 русский \U0001f600",
)
"""Texts that different tokenizers with the same vocabulary split into different tokens."""
_MAX_RENDERED = 4096
"""The largest number of prompts that a tokenizer keeps as rendered by its chat template."""
_UNREADABLE = (OSError, ValueError, LookupError, ImportError, TypeError, RecursionError, MemoryError)
UNKNOWN_ID_TEXT = "\ufffd"
"""The text of ids beyond the vocabulary. An LLM may have more embedding rows than its tokenizer has pieces."""


class Tokenizer(ABC):
    """A tokenizer whose ids are the indices of the LLM's embedding rows."""

    config: TokenizerConfig
    vocab_size: int
    """The number of ids; the LLM needs at least as many rows."""
    bos_id: int | None
    """The id at the beginning of a prompt, or None if the tokenizer has none."""
    eos_id: int
    """The id at the end of every answer."""
    pad_id: int | None
    """The id of padding, or None if the tokenizer has none."""
    placeholder_id: int
    """The id that stands for a clip in a prompt."""
    special_ids: frozenset[int]
    """The ids that control the model, such as the end of a turn. No text of a sample may contain them."""

    @abstractmethod
    def _encode(self, text: str) -> list[int]:
        """Return the tokens of a text, which may contain placeholders, without adding special tokens."""

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
        if self.config.placeholder in instruction:
            raise self._placeholder_in(instruction)
        template = self.config.template if num_clips else self.config.text_template
        ids = self._prompt_ids(prompt.render(template, instruction, self.config.placeholder, num_clips))
        pieces = prompt.cut(ids, self.placeholder_id)
        if len(pieces) != num_clips + 1:
            raise SampleError(
                "unexpected", f"the prompt of {shorten(instruction)} has {len(pieces) - 1} places for {num_clips} clips"
            )
        return pieces

    def _placeholder_in(self, text: str) -> SampleError:
        return SampleError("placeholder_in_text", f"{shorten(text)} contains {self.config.placeholder}")

    def _prompt_ids(self, text: str) -> list[int]:
        return ([] if self.bos_id is None else [self.bos_id]) + self._encode(text)


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
        self.eos_id = self._pieces.eos_id()
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
        """Return the tokens of a text, which may contain placeholders."""
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
        UserError: If it cannot be read, or its vocabulary lacks the placeholder or the end token.
    """

    def __init__(self, path: str, config: TokenizerConfig) -> None:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast  # The import is slow and needed only here.

        self.config = config
        inner: Any
        try:
            if path.endswith(".json"):
                folder = Path(path).parent
                has_config = (folder / "tokenizer_config.json").exists() and Path(path).name == "tokenizer.json"
                inner = (
                    AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
                    if has_config
                    else PreTrainedTokenizerFast(tokenizer_file=path)
                )
            else:
                inner = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        except Exception as error:
            # Unreadable files raise one of these, or a plain Exception from Rust. Anything else is a bug.
            if not isinstance(error, _UNREADABLE) and type(error) is not Exception:
                raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"data.tokenizer.path = {path}: transformers cannot read it ({reason})") from error
        self.inner = inner
        self._lock = Lock()  # The Rust tokenizer fails if two threads use it at the same time.
        self.vocab_size = len(inner)
        self.bos_id, self.pad_id = inner.bos_token_id, inner.pad_token_id
        if inner.eos_token_id is None:
            raise UserError(f"data.tokenizer.path = {path}: no eos_token; name it in its tokenizer_config.json")
        self.eos_id = inner.eos_token_id
        found = inner.convert_tokens_to_ids(config.placeholder)
        # There may be a second token, since tokenizers made from SentencePiece models add a prefix.
        if found in (None, inner.unk_token_id) or self._encode(config.placeholder).count(found) != 1:
            raise UserError(_no_placeholder(path, config.placeholder))
        self.placeholder_id = found
        added = {i for i, token in inner.added_tokens_decoder.items() if token.special}
        self.special_ids = frozenset({*inner.all_special_ids, *added} - {found, inner.unk_token_id})
        self.chats = config.chat_template and bool(inner.chat_template)
        self._rendered: dict[str, str] = {}
        if self.chats:
            self._check_chat_template(path)

    def _check_chat_template(self, path: str) -> None:
        """Check that the chat template inserts the text of a user message once and unchanged.

        Raises:
            UserError: If it does not.
        """
        for template, num_clips in ((self.config.template, 2), (self.config.text_template, 0)):
            text = prompt.render(template, "What is said?", self.config.placeholder, num_clips)
            try:
                problem = None if self._chat(text).count(text.strip()) == 1 else "does not contain the message once"
            except SampleError as error:
                problem = error.detail
            if problem is not None:
                raise UserError(
                    f"data.tokenizer.path = {path}: the chat template of a single user message {problem}; set "
                    "data.tokenizer.chat_template: false, or correct the template"
                )

    def _encode(self, text: str) -> list[int]:
        with self._lock:
            return self.inner.encode(text, add_special_tokens=False)

    def piece(self, token: int) -> str:
        return self.inner.convert_ids_to_tokens(token)

    @property
    def digest(self) -> str:
        return transformers_digest(self.inner, self.config, self._encode)

    def _prompt_ids(self, text: str) -> list[int]:
        if not self.chats:
            return super()._prompt_ids(text)
        # The template itself adds the begin token.
        return self._encode(self._chat(text))

    def _chat(self, text: str) -> str:
        """Return a user message in the chat template, which transformers renders in a sandbox.

        Raises:
            SampleError: If the template fails (`unexpected`).
        """
        chat = self._rendered.get(text)  # Many samples have the same instruction.
        if chat is None:
            try:
                chat = render_chat(self.inner, text)
            except ChatError as error:
                raise SampleError("unexpected", error.reason) from error
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


def tokenizer_digest(
    pieces: Sequence[str | None],
    special_ids: Sequence[int | None],
    encode: Callable[[str], list[int]],
    config: TokenizerConfig,
    chat_template: Any,
) -> str:
    """Return a SHA-256 hash of everything that determines the tokens of prompts and answers.

    A SentencePiece model and the Hugging Face tokenizer into which an export converts it have the same digest.

    Args:
        pieces: The text of each id, in the order of the ids.
        special_ids: The ids of begin, end and padding.
        encode: A function that returns the tokens of a text, which is called with `PROBES`.
        config: The placeholder and the templates; other fields do not affect the hash.
        chat_template: The chat template of prompts, or None if there is none.
    """
    content = {
        "pieces": list(pieces),
        "special_ids": list(special_ids),
        "probes": [encode(text) for text in PROBES],
        "placeholder": config.placeholder,
        "template": config.template,
        "text_template": config.text_template,
        "chat_template": chat_template,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def transformers_digest(inner: Any, config: TokenizerConfig, encode: Callable[[str], list[int]] | None = None) -> str:
    """Return the `tokenizer_digest` of a transformers tokenizer.

    Args:
        inner: The tokenizer.
        config: The placeholder and the templates.
        encode: A function that returns the tokens of a text; None selects the tokenizer's own.
    """

    def plain(text: str) -> list[int]:
        ids: list[int] = inner.encode(text, add_special_tokens=False)
        return ids

    pieces = inner.convert_ids_to_tokens(list(range(len(inner))))
    ids = (inner.bos_token_id, inner.eos_token_id, inner.pad_token_id)
    chat = inner.chat_template if config.chat_template and inner.chat_template else None
    return tokenizer_digest(pieces, ids, encode or plain, config, chat)


def save_without_code(inner: Any, folder: str | Path) -> None:
    """Write a transformers tokenizer to a folder, without what its source may have said about code.

    Args:
        inner: The tokenizer.
        folder: The folder.

    Raises:
        UserError: If the name of a chat template is not a plain name; transformers makes it the name of a file.
    """
    names = inner.chat_template if isinstance(inner.chat_template, dict) else {}
    for name in names:
        if not re.fullmatch(r"[\w-]+", str(name)):
            raise UserError(f"data.tokenizer: the chat template {name!r} must have a name of letters, digits, - and _")
    inner.save_pretrained(folder)
    path = Path(folder) / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.pop("auto_map", None) is not None:
        path.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def load_tokenizer(path: str, config: TokenizerConfig) -> Tokenizer:
    """Load a tokenizer.

    Args:
        path: A `.model` file, a `tokenizer.json`, a directory that contains one of them, or a hub id.
        config: The placeholder and the templates.

    Raises:
        UserError: If it cannot be read, or its vocabulary lacks the placeholder or the end token.
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
            f"data.tokenizer.path = {path}: no such file; give a SentencePiece .model, a tokenizer.json, "
            "a directory that contains one of them, or null to train a tokenizer"
        )
    return HuggingFaceTokenizer(path, config)


def shorten(text: str) -> str:
    """Return the representation of a text, without its middle if it is long."""
    return repr(text) if len(text) <= 200 else f"{text[:90]!r} ... {text[-90:]!r}"


def _no_placeholder(path: str, placeholder: str) -> str:
    return (
        f"data.tokenizer.path = {path}: '{placeholder}' is not one token of it; add it to the tokenizer, set "
        "data.tokenizer.placeholder to one of its reserved tokens, or train another with tools.train_tokenizer"
    )
