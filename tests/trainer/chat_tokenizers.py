"""Tiny tokenizers with one token per byte, and chat templates that resemble those of published models."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trainer.data.config import PLACEHOLDER, TokenizerConfig

TEMPLATE = "{audio}{instruction}"

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
)
"""A template that puts an empty thought before the new answer only, as templates of several reasoning models do."""

CHATS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "chatml": (CHATML, "<|im_end|>", ("<|im_start|>", "<|im_end|>")),
    "llama": (LLAMA, "<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "gemma": (GEMMA, "<eos>", ("<start_of_turn>", "<end_of_turn>")),
    "phi": (PHI, "<|endoftext|>", ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")),
    "thinking": (THINKING, "<|im_end|>", ("<|im_start|>", "<|im_end|>")),
}
"""The template, the end token and the other control tokens of each tokenizer, by its name."""


def write_chat_tokenizer(folder: Path, name: str) -> Path:
    """Write the tokenizer `name` of `CHATS` to a folder, and return the folder."""
    chat, eos, special = CHATS[name]
    vocabulary = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = RustTokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    bos = "<bos>" if "bos_token" in chat else None
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=bos, eos_token=eos, pad_token="<pad>")
    tokenizer.add_special_tokens({"additional_special_tokens": [*special, PLACEHOLDER]})
    tokenizer.chat_template = chat
    tokenizer.save_pretrained(folder)
    return folder


def chat_config(**fields: object) -> TokenizerConfig:
    """Return tokenizer settings with which the text of a turn equals its message, apart from placeholders."""
    return TokenizerConfig(**{"template": TEMPLATE, **fields})  # type: ignore[arg-type]
