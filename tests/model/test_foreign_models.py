"""Tests of model files from other sources: only safetensors and JSON are read, and bad files cause one-line errors."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import HubertConfig, HubertModel

from model.chat import render_chat
from model.config import EncoderConfig, LLMConfig
from model.encoders.registry import build_encoder
from model.errors import UserError
from model.llm.reference import resolve_hf_config
from tests.tools.exportable import write_chat_tokenizer
from trainer.data.config import TokenizerConfig
from trainer.data.tokenizer import load_tokenizer
from trainer.parity_cases import tiny_model

LOOP = "".join(f"{{% for {i} in range(99999) %}}" for i in "ijk") + 3 * "{% endfor %}"
QUESTION = [{"role": "user", "content": "a"}]


class Template:
    """A dummy tokenizer that compiles and runs its chat template as transformers does."""

    name_or_path = "mine"

    def __init__(self, source: str) -> None:
        from transformers.utils.chat_template_utils import _compile_jinja_template

        self._template: Any = _compile_jinja_template(source)

    def apply_chat_template(self, chat: Any, **options: Any) -> str:
        return str(self._template.render(messages=chat, **options))


def test_a_template_that_loops_for_years_is_a_one_line_error() -> None:
    start = time.monotonic()
    with pytest.raises(UserError, match="was not rendered within 0.3 s") as caught:
        render_chat(Template(LOOP), QUESTION, limit_sec=0.3)
    assert time.monotonic() - start < 5 and "\n" not in str(caught.value)
    # The time limit also works in another thread, such as one that decodes samples, and this thread continues.
    found: list[str] = []

    def work() -> None:
        for source in (LOOP, "{{ messages[0]['content'] }}b"):
            try:
                found.append(render_chat(Template(source), QUESTION, limit_sec=0.3))
            except UserError as error:
                found.append(str(error)[-20:])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(20)
    assert len(found) == 2 and found[1] == "ab"


def test_a_template_in_time_is_never_interrupted_later() -> None:
    for _ in range(30):  # each of these calls ends at about the time limit
        try:
            assert render_chat(Template("{% for i in range(9000) %}{% endfor %}ok"), QUESTION, limit_sec=0.0005) == "ok"
        except UserError:
            pass
        time.sleep(0.001)


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no') }}",
        "{{ 1 / 0 }}",
        "{{ messages.x.y }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ 'a' * 10**18 }}",
        "{% for m in messages %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_malicious_template_is_a_one_line_error(tmp_path: Path, source: str) -> None:
    write_chat_tokenizer(tmp_path / "t")
    (tmp_path / "t" / "chat_template.jinja").write_text(source)
    with pytest.raises(UserError, match="chat template|cannot read it") as caught:
        load_tokenizer(str(tmp_path / "t"), TokenizerConfig())
    assert "\n" not in str(caught.value)


def encoder(folder: Path) -> EncoderConfig:
    own = next(e for e in tiny_model().encoders if e.family == "hubert").config
    model = HubertModel(HubertConfig(**{k: v for k, v in own.items() if k != "do_normalize"}))
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False}))
    return EncoderConfig(name="e", family="hubert", weights=str(folder))


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    config = encoder(tmp_path)
    torch.save(HubertModel(HubertConfig.from_pretrained(tmp_path)).state_dict(), tmp_path / "pytorch_model.bin")
    build_encoder(config)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="use weights in safetensors format"):
        build_encoder(config)


def test_an_encoders_config_does_not_choose_code(tmp_path: Path) -> None:
    config = encoder(tmp_path)
    path = tmp_path / "config.json"
    stored = json.loads(path.read_text())
    hooks = {
        "_attn_implementation": "attacker/kernel",
        "attn_implementation": "attacker/kernel",
        "auto_map": {"x": "y"},
    }
    path.write_text(json.dumps({**stored, **hooks}))
    network: Any = build_encoder(config)
    for module in network.modules():
        if hasattr(module, "config"):
            assert module.config._attn_implementation in ("sdpa", "eager", None)


@pytest.mark.parametrize(
    "content", ["[]", "7", "null", "{", "[" * 100_000, '{"model_type": 7}', '{"model_type": "hubert"']
)
def test_a_malformed_config_is_a_one_line_error(tmp_path: Path, content: str) -> None:
    config = encoder(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError) as caught:
        build_encoder(config)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError) as caught:
        resolve_hf_config(LLMConfig(weights=str(tmp_path)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [{"rope_parameters": "x"}, {"num_attention_heads": 0}, {"num_key_value_heads": "a"}, {"hidden_size": []}],
)
def test_a_malformed_config_of_an_llm_is_a_one_line_error(tmp_path: Path, change: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **change}))
    with pytest.raises(UserError) as caught:
        resolve_hf_config(LLMConfig(weights=str(tmp_path)))
    assert "\n" not in str(caught.value)
