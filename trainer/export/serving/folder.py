"""The `vllm` folder of an export, which contains a chat template and a package that registers the model with vLLM."""

from __future__ import annotations

import json
from pathlib import Path

FOLDER = "vllm"
"""The name of the folder."""
TEMPLATE = "chat_template.jinja"
"""The name of the chat template in the folder."""
_SOURCES = {"earshot_vllm.py": "plugin.py", "earshot_vllm_model.py": "vllm_model.py"}
"""Name of a file in the folder → the file of this package that is copied to it."""
_PROJECT = """[build-system]
requires = ["setuptools>=68"]
build-backend = "setuptools.build_meta"

[project]
name = "earshot-vllm"
version = "1.0"
description = "Registers the exported models of earshot with vLLM"
requires-python = ">=3.10"

[project.entry-points."vllm.general_plugins"]
earshot = "earshot_vllm:register"

[tool.setuptools]
py-modules = ["earshot_vllm", "earshot_vllm_model"]
"""
# This part of the template joins the parts of each message to the text that training used (`PromptFormat.content`).
_MESSAGES = """\
{%- set all = namespace(messages=[]) -%}
{%- for message in messages -%}
  {%- set parts = message['content'] -%}
  {%- if parts is string -%}{%- set parts = [{'type': 'text', 'text': parts}] -%}{%- endif -%}
  {%- set own = namespace(text='', joined='', audio='', inside=false) -%}
  {%- for part in parts -%}
    {%- if part['type'] == 'text' -%}
      {%- set own.text = own.text + part['text'] -%}
      {%- set own.joined = own.joined + part['text'] -%}
    {%- else -%}
      {%- if own.text -%}{%- set own.inside = true -%}{%- endif -%}
      {%- set own.audio = own.audio + PLACEHOLDER -%}
      {%- set own.joined = own.joined + PLACEHOLDER -%}
    {%- endif -%}
  {%- endfor -%}
  {%- set content = own.joined -%}
  {%- if message['role'] == 'assistant' -%}{%- set content = content | trim -%}{%- endif -%}
  {%- if message['role'] == 'user' and not own.inside -%}
    {%- if own.audio -%}
      {%- set before, after = BEFORE_AUDIO.replace('{audio}', own.audio), AFTER_AUDIO.replace('{audio}', own.audio) -%}
      {%- set content = before + own.text + after -%}
    {%- else -%}
      {%- set content = BEFORE_TEXT + own.text + AFTER_TEXT -%}
    {%- endif -%}
  {%- endif -%}
  {%- set all.messages = all.messages + [{'role': message['role'], 'content': content}] -%}
{%- endfor -%}
{%- set messages = all.messages -%}
"""
_PLAIN = """\
{{- BEGIN -}}
{%- for message in messages -%}
  {{- message['content'] -}}
  {%- if message['role'] == 'system' -%}{{- NEWLINE -}}{%- endif -%}
  {%- if message['role'] == 'assistant' -%}{{- END -}}{%- endif -%}
{%- endfor -%}
"""


def write_vllm_folder(folder: Path) -> None:
    """Write the `vllm` folder of an export whose tokenizer and processor are already written.

    Args:
        folder: The folder of the export.
    """
    from trainer.export.tokenizer import read_processor

    own = folder / FOLDER
    own.mkdir(exist_ok=True)
    (own / "pyproject.toml").write_text(_PROJECT, encoding="utf-8")
    for name, source in _SOURCES.items():
        (own / name).write_text((Path(__file__).parent / source).read_text(encoding="utf-8"), encoding="utf-8")
    processor = read_processor(folder)
    tokenizer = processor.tokenizer
    before, after = processor.prompt_with_audio.split("{instruction}")
    before_text, after_text = processor.prompt_without_audio.split("{instruction}")
    values = {
        "PLACEHOLDER": processor.placeholder,
        "BEFORE_AUDIO": before,
        "AFTER_AUDIO": after,
        "BEFORE_TEXT": before_text.replace("{audio}", ""),
        "AFTER_TEXT": after_text.replace("{audio}", ""),
        "NEWLINE": "\n",
        "BEGIN": tokenizer.bos_token or "",
        "END": tokenizer.eos_token or "",
    }
    constants = "".join(f"{{%- set {name} = {literal(value)} -%}}\n" for name, value in values.items())
    rest = tokenizer.get_chat_template() if processor.as_chat else _PLAIN
    (own / TEMPLATE).write_text(f"{constants}{_MESSAGES}{rest}", encoding="utf-8")


def literal(text: str) -> str:
    """Return text as a string literal of Jinja."""
    # Jinja does not join the two surrogates with which JSON escapes characters above U+FFFF.
    return json.dumps(text, ensure_ascii=False)
