"""The identity of a tokenizer: a hash of everything that determines the tokens of prompts and answers."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from model.errors import UserError
from trainer.data.config import TokenizerConfig

PROBES = (
    "",
    " two  spaces, a tab\tand a line\nbreak ",
    "Was it 3:15 p.m.? Café № ½ ﬁne — “quoted” ÄÖÜ",
    "日本語 русский \U0001f600",
)
"""Strings that tokenizers with the same vocabulary but different rules split into different tokens."""


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
        special_ids: The ids of the begin, end and padding tokens.
        encode: A function that returns the tokens of a string. It is called with each of `PROBES`.
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
        encode: A function that returns the tokens of a string; None selects `inner.encode` without special tokens.
    """

    def plain(text: str) -> list[int]:
        ids: list[int] = inner.encode(text, add_special_tokens=False)
        return ids

    pieces = inner.convert_ids_to_tokens(list(range(len(inner))))
    ids = (inner.bos_token_id, inner.eos_token_id, inner.pad_token_id)
    chat = inner.chat_template if config.chat_template and inner.chat_template else None
    return tokenizer_digest(pieces, ids, encode or plain, config, chat)


def save_without_code(inner: Any, folder: str | Path) -> None:
    """Write a transformers tokenizer to a folder, without references to Python code that its source may contain.

    Args:
        inner: The tokenizer.
        folder: The folder.

    Raises:
        UserError: If the name of a chat template, which transformers uses as a file name, contains characters other
            than letters, digits, `-` and `_`.
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
