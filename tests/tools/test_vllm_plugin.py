"""Tests that the vLLM plug-in in an export computes the same as the export.

The tests use a stub of vLLM's interface (`tests/vllm_stub.py`). The last test uses vLLM itself. It runs only if the
environment variable `VLLM_PYTHON` is the path to a Python interpreter for which vLLM and the plug-in are installed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from model.config import ModelConfig
from model.hub.processing import EarshotProcessor
from tests import vllm_stub
from tests.tools.exportable import messages_about, write_conversations, write_manifest, write_run
from tools import export
from trainer.export.serving.folder import literal, write_vllm_folder
from trainer.parity_cases import tiny_model


def with_wide_heads(model: ModelConfig, gate_input: str) -> ModelConfig:
    """Return the model with a different router input and heads of 32, which is the smallest size of vLLM on CPUs."""
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    return replace(
        model,
        llm=replace(model.llm, config={**model.llm.config, **sizes}),
        router=replace(model.router, input=gate_input),
    )


def load(folder: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, folder / "vllm" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass
class Served:
    """An export that the stub serves, and the same export in transformers."""

    root: Path
    processor: Any
    model: Any
    reference: Any

    @property
    def folder(self) -> Path:
        return self.root / "out"

    def request(self, prompt: list[int], clips: list[np.ndarray], **options: Any) -> dict[str, Any]:
        items = vllm_stub.DataItems(audio=vllm_stub.AudioProcessorItems(clips))
        found: dict[str, Any] = self.processor.apply(vllm_stub.ProcessorInputs(prompt, items, options), None)
        return found

    def logits(self, found: dict[str, Any]) -> Tensor:
        """Return the logits [L, V] that vLLM would compute for a processed request."""
        ids = torch.tensor(found["prompt_token_ids"])
        # Like vLLM, the stub passes fields of equal shape as one tensor, and other fields as a list.
        fields = {k: torch.stack(v) if len({t.shape for t in v}) == 1 else v for k, v in found["mm_kwargs"].items()}
        embeddings = self.model.embed_multimodal(**fields)
        merged = self.model.embed_input_ids(ids, embeddings, is_multimodal=torch.tensor(found["is_audio"]))
        logits: Tensor = self.model.compute_logits(self.model(None, torch.arange(len(ids)), None, merged))
        return logits


@pytest.fixture(scope="module", params=[("qwen3", True, "prompt"), ("gemma3_text", False, "prompt")])
def served(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    family, chats, gate_input = request.param
    root = tmp_path_factory.mktemp("vllm")
    write_run(root / "run", family, chats=chats, model=with_wide_heads(tiny_model(family), gate_input))
    write_manifest(root)
    assert export.main([str(root / "run"), str(root / "out"), "--dtype", "fp32"]) == 0
    with pytest.MonkeyPatch.context() as patch:
        registry = vllm_stub.install(patch)
        plugin, own = load(root / "out", "earshot_vllm"), load(root / "out", "earshot_vllm_model")
        plugin.register()
        plugin.register()  # vLLM may call this function several times in a process
        assert registry.models == {"EarshotForCausalLM": "earshot_vllm_model:EarshotForCausalLM"}
        config = AutoConfig.from_pretrained(root / "out", trust_remote_code=True)
        assert config.architectures == ["EarshotForCausalLM"]
        settings = SimpleNamespace(hf_config=config, model=str(root / "out"), revision=None, trust_remote_code=True)
        model = own.EarshotForCausalLM(vllm_config=SimpleNamespace(model_config=settings))
        tensors = load_file(root / "out" / "model.safetensors")
        assert model.load_weights(tensors.items()) == set(tensors)
        processor_type, info_type, dummy_type = model.parts
        info = info_type(str(root / "out"), config)
        reference = AutoModelForCausalLM.from_pretrained(root / "out", trust_remote_code=True).eval()
        yield Served(root, processor_type(info, dummy_type(info)), model.eval(), reference)


def exported(served: Served) -> Any:
    """Return the export's own processor."""
    return served.processor.info.get_hf_processor()


@torch.no_grad()
def test_logits_equal_those_of_the_export(served: Served) -> None:
    worst = 0.0
    for row in map(json.loads, (served.root / "dev.jsonl").read_text().splitlines()):
        clips = [soundfile.read(served.root / name, dtype="float32")[0] for name in row["audio"] or ()]
        prompt = exported(served).prompt_ids(row["instruction"], len(clips))
        found = served.request(prompt, clips)
        inputs = exported(served)(audio=[clips], text=row["instruction"])
        assert found["prompt_token_ids"] == inputs["input_ids"][0].tolist()
        assert found["is_audio"] == inputs["audio_mask"][0].tolist()
        if clips:
            wanted = served.reference(**inputs).logits[0]
            worst = max(worst, (served.logits(found) - wanted).abs().max().item())
            assert wanted.std() > 0.05
    assert worst <= 1e-5


@torch.no_grad()
def test_the_instruction_decides_the_routing_and_the_identity_of_a_cached_clip(served: Served) -> None:
    clip = soundfile.read(served.root / "0-0.flac", dtype="float32")[0]
    prompt = exported(served).prompt_ids("what is it a", 1)
    read, given, other = (
        served.request(prompt, [clip], **o) for o in ({}, {"instruction": "what is it a"}, {"instruction": "b"})
    )
    assert read["mm_hashes"] == given["mm_hashes"] != other["mm_hashes"]
    assert served.logits(read).equal(served.logits(given)) and not served.logits(read).equal(served.logits(other))
    with pytest.raises(ValueError, match="pass the instruction of each clip as mm_processor_kwargs.instruction"):
        served.request([*prompt, *prompt], [clip, clip])
    with pytest.raises(ValueError, match="has 2 texts for 1 clips"):
        served.request(prompt, [clip], instruction=["a", "b"])


def test_the_profiled_request_has_the_longest_clip(served: Served) -> None:
    inputs = served.processor.get_dummy_inputs(4096, {"audio": 2}, {})
    found = served.processor.apply(inputs, None)
    most = served.processor.info.get_mm_max_tokens_per_item(4096, {"audio": 2})["audio"]
    assert sum(found["is_audio"]) == 2 * most == 2 * exported(served).count_audio_tokens(30 * 16000)


def test_the_chat_template_makes_the_prompts_of_training(served: Served) -> None:
    names = [str(served.root / f"talk-0-{clip}.flac") for clip in range(3)]
    write_conversations(served.root)
    processor = exported(served)
    template = (served.folder / "vllm" / "chat_template.jinja").read_text()
    talk: list[Any] = messages_about(names)
    with_system = [{"role": "system", "content": "it is"}, *talk]
    split = [{"role": "user", "content": [{"type": "text", "text": "what "}, {"type": "text", "text": "is it"}]}]
    for messages in (talk[:1], talk, with_system, split):
        got = processor.tokenizer.apply_chat_template(messages, chat_template=template, add_generation_prompt=True)
        places = [i for i in got["input_ids"] if i == processor.placeholder_id]
        inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
        whole, mask = inputs["input_ids"][0].tolist(), inputs["audio_mask"][0].tolist()
        once = [
            t for t, is_audio, before in zip(whole, mask, [False, *mask], strict=False) if not (is_audio and before)
        ]
        if len({len(places), sum(m and not b for m, b in zip(mask, [False, *mask], strict=False))}) == 1:
            assert got["input_ids"] == once, messages
        else:  # the prompt has neighboring clips
            assert [i for i in got["input_ids"] if i not in places] == [i for i in once if i not in places]


def test_texts_of_the_chat_template_are_unchanged() -> None:
    text = 'Hör zu 🎧\n"what" \\ {{x}} %} \x01'
    template = ImmutableSandboxedEnvironment().from_string(f"{{%- set A = {literal(text)} -%}}{{{{- A -}}}}")
    assert template.render() == text


def test_of_several_chat_templates_the_default_one_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, "a")))
    tokenizer.chat_template = {"default": "{{ messages[0]['content'] }}", "tool_use": "tools"}
    processor = EarshotProcessor(tokenizer, "<a>", "{audio}{instruction}", "{instruction}", True, (2,))
    monkeypatch.setattr("trainer.export.tokenizer.read_processor", lambda folder: processor)
    write_vllm_folder(tmp_path)
    template = (tmp_path / "vllm" / "chat_template.jinja").read_text()
    message = {"role": "user", "content": [{"type": "text", "text": "what"}]}
    assert ImmutableSandboxedEnvironment().from_string(template).render(messages=[message]) == "what"


def test_experts_of_a_recipe_and_untrusted_code_are_refused(served: Served) -> None:
    own: Callable[..., Any] = type(served.model)
    config = AutoConfig.from_pretrained(served.folder, trust_remote_code=True)
    settings = SimpleNamespace(hf_config=config, model=str(served.folder), revision=None, trust_remote_code=False)
    with pytest.raises(ValueError, match="add --trust-remote-code"):
        own(vllm_config=SimpleNamespace(model_config=settings))
    config.text_config.ffn_experts = {"experts": ["a"]}
    with pytest.raises(ValueError, match="vLLM does not compute the experts"):
        own(vllm_config=SimpleNamespace(model_config=settings))


BY_VLLM = """
import json, sys, numpy, soundfile
if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    root, out = sys.argv[1:]
    llm = LLM(root + "/out", trust_remote_code=True, dtype="float32", max_model_len=256, enforce_eager=True,
              max_num_seqs=2, max_num_batched_tokens=256, limit_mm_per_prompt={"audio": 2}, max_logprobs=-1)
    settings = SamplingParams(temperature=0, max_tokens=3, logprobs=-1, ignore_eos=True)
    found = []
    for prompt, names in json.load(open(root + "/requests.json")):
        request = {"prompt_token_ids": prompt}
        if names:
            request["multi_modal_data"] = {"audio": [soundfile.read(n, dtype="float32")[0] for n in names]}
        answer = llm.generate(request, settings)[0].outputs[0]
        rows = [[row[i].logprob for i in range(len(row))] for row in answer.logprobs]
        found.append([list(answer.token_ids), rows])
    json.dump(found, open(out, "w"))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif("VLLM_PYTHON" not in os.environ, reason="set VLLM_PYTHON to an interpreter with vLLM")
def test_vllm_computes_what_the_export_computes(served: Served, tmp_path: Path) -> None:
    if served.reference.config.text_config.model_type != "qwen3":
        pytest.skip("vLLM itself is tested with one family only")
    rows = [json.loads(line) for line in (served.root / "dev.jsonl").read_text().splitlines()]
    names = [[str(served.root / name) for name in row["audio"] or ()] for row in rows]
    prompts = [exported(served).prompt_ids(r["instruction"], len(own)) for r, own in zip(rows, names, strict=True)]
    (served.root / "requests.json").write_text(json.dumps(list(zip(prompts, names, strict=True))))
    (tmp_path / "serve.py").write_text(BY_VLLM)
    command = [os.environ["VLLM_PYTHON"], str(tmp_path / "serve.py"), str(served.root), str(tmp_path / "found.json")]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": str(served.folder / "vllm")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    worst = 0.0
    for row, own, (tokens, found) in zip(rows, names, json.loads((tmp_path / "found.json").read_text()), strict=True):
        inputs = exported(served)(audio=[own], text=row["instruction"])
        for place, logs in enumerate(found):
            more = torch.tensor([tokens[:place]], dtype=torch.int64)
            inputs_now = {**inputs, "input_ids": torch.cat([inputs["input_ids"], more], 1)}
            del inputs_now["attention_mask"]
            inputs_now["audio_mask"] = torch.nn.functional.pad(inputs["audio_mask"], (0, place))
            with torch.no_grad():
                wanted = served.reference(**inputs_now).logits[0, -1].log_softmax(-1)
            worst = max(worst, (torch.tensor(logs) - wanted).abs().max().item())
    print(f"largest difference of a log-probability: {worst:.2g}", file=sys.stderr)
    assert worst <= 1e-4
