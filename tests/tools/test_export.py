"""Tests that an export generates the same tokens as the training graph in a process that cannot import the project."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from model.connectors.kinds import ADAPTERS
from model.encoders.hf_config import resolve
from model.hub.configuration import audio_config, describe
from model.llm.families import LLM_FAMILIES
from model.speech_llm import SpeechLLM
from tests.oracle import greedy
from tests.tools.exportable import (
    MAX_NEW_TOKENS,
    STEP,
    messages_about,
    tensors_of,
    with_head_dim,
    write_conversations,
    write_manifest,
    write_run,
)
from tests.trainer.chat_tokenizers import write_chat_tokenizer as write_ending
from tools import export, transcribe
from trainer.data.config import TokenizerConfig
from trainer.data.tokenizer import load_tokenizer
from trainer.export.publish import generation_config
from trainer.export.source import Source
from trainer.export.verify import read_samples
from trainer.parity_cases import tiny_model

# EXPORT_PYTHON (`make export-test`) is the interpreter of an environment without this project. The default is the
# current interpreter: -I ignores the current folder and PYTHONPATH, and -S ignores .pth files and thus editable
# installations. Exports with the same code share one import of it, because importing takes longer than generating.
FRESH = """
import contextlib, importlib.util, io, json, pathlib, sys
sys.path += filter(None, sys.argv[1:2])
assert not any(importlib.util.find_spec(name) for name in ("model", "trainer", "tools")), "this project is importable"
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer
found, classes = {}, {}
for folder, manifest in json.loads(sys.argv[2]):
    code = tuple((path.name, path.read_bytes()) for path in sorted(pathlib.Path(folder).glob("*.py")))
    with contextlib.redirect_stderr(io.StringIO()) as shown:
        if code in classes:
            processor, model = (kind.from_pretrained(folder, trust_remote_code=True) for kind in classes[code])
        else:
            processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
            model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
            classes[code] = type(processor), type(model)
    assert not shown.getvalue(), shown.getvalue()  # neither warnings nor a progress bar
    rows = [json.loads(line) for line in open(manifest)]
    root = manifest.rpartition("/")[0]
    tokens = []
    for row in rows:
        audio = [[f"{root}/{name}" for name in row["audio"]]] if row["audio"] else None
        tokens.append(model.generate(**processor(audio=audio, text=row["instruction"]))[0].tolist())
    samples = [[f"{root}/{name}" for name in row["audio"] or []] for row in rows]
    together = model.generate(**processor(audio=samples, text=[row["instruction"] for row in rows])).tolist()
    talk = json.loads(sys.argv[3])
    inputs = processor.apply_chat_template(talk, add_generation_prompt=True, tokenize=True, return_dict=True)
    talked = [inputs["input_ids"][0].tolist(), model.generate(**inputs)[0].tolist()]
    llm = AutoModelForCausalLM.from_pretrained(folder + "-llm")
    ids = AutoTokenizer.from_pretrained(folder + "-llm")("what is it", return_tensors="pt").input_ids
    logits = llm(ids).logits[0, -1].tolist()
    found[folder] = [tokens, together, type(llm).__name__, str(llm.dtype), logits, ids.tolist(), talked]
print(json.dumps(found))
"""


def export_with(*arguments: object) -> None:
    assert export.main([str(a) for a in arguments]) == 0


def in_a_fresh_process(folders: list[tuple[str, str]], talk: list[dict[str, object]], cwd: Path) -> dict[str, Any]:
    site = next(p for p in sys.path if p.endswith("site-packages"))
    other = os.environ.get("EXPORT_PYTHON")
    command = [sys.executable, "-I", "-S", "-c", FRESH, site] if other is None else [other, "-I", "-c", FRESH, ""]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "HF_HOME": str(cwd / "hf"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [*command, json.dumps(folders), json.dumps(talk)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.timeout(280)
def test_normalisation_of_an_encoder_is_exported() -> None:
    described = describe(tiny_model(), LlamaConfig(), 61)["audio"]
    kept = audio_config(described)
    assert kept.primary is not None
    assert [resolve(e).do_normalize for e in (kept.primary, *kept.experts)] == [False, False, False, True]
    del described["experts"][2]["config"]["do_normalize"]  # exports of earlier versions lack this field for Whisper
    assert not resolve(audio_config(described).experts[2]).do_normalize


@pytest.mark.slow
def test_every_family_generates_the_same_tokens_without_this_project(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path)
    oracles: dict[str, SpeechLLM] = {}
    for family, adapter in zip(LLM_FAMILIES, cycle(ADAPTERS), strict=False):
        model = with_head_dim(tiny_model(family, adapter, num_layers=2), family)
        oracles[family] = write_run(tmp_path / f"run-{family}", family, model=model)
        out = tmp_path / family
        export_with(tmp_path / f"run-{family}", out, "--dtype", "fp32", "--verify", manifest)
        export_with(tmp_path / f"run-{family}", f"{out}-llm", "--dtype", "fp32", "--llm-only")
    folders = [(str(tmp_path / family), str(manifest)) for family in LLM_FAMILIES]
    talk = write_conversations(tmp_path)
    names = [str(tmp_path / f"talk-0-{clip}.flac") for clip in range(3)]
    found = in_a_fresh_process(folders, messages_about(names), tmp_path)
    varied: list[bool] = []
    for family, oracle in oracles.items():
        tokens, together, kind, dtype, logits, ids, talked = found[str(tmp_path / family)]
        source = Source(tmp_path / f"run-{family}")
        tokenizer = source.tokenizer()
        eos, vocab = tokenizer.eos_id, tokenizer.vocab_size
        samples = sorted(read_samples(source, tokenizer, manifest, 9), key=lambda s: s.key)
        for sample, alone, batched in zip(samples, tokens, together, strict=True):
            wanted = greedy(oracle, sample, eos, vocab, MAX_NEW_TOKENS)
            assert cut_at(alone, eos) == cut_at(batched, eos) == wanted, (family, sample.key)
        sample = next(s for s in read_samples(source, tokenizer, talk, 9) if s.key == "talk0")
        assert talked[0] == sample.token_ids.tolist() and len(sample.clips) == 3
        assert cut_at(talked[1], eos) == greedy(oracle, sample, eos, vocab, MAX_NEW_TOKENS)
        varied.append(len({tuple(t) for t in tokens}) > 1)
        assert kind == MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family] and dtype == "torch.float32"
        with torch.no_grad():
            expected = oracle.llm(torch.tensor(ids)).logits[0, -1]
        assert torch.tensor(logits).sub(expected).abs().max() < 1e-5
    assert sum(varied) > len(varied) / 2, "equal answers would prove nothing"


def cut_at(tokens: list[int], eos_id: int) -> list[int]:
    return tokens[: tokens.index(eos_id)] if eos_id in tokens else tokens


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SpeechLLM, Path]:
    folder = tmp_path_factory.mktemp("export")
    return folder / "run", write_run(folder / "run"), write_manifest(folder)


Run = tuple[Path, SpeechLLM, Path]


def test_tensors_are_bit_equal_and_sharded(run: Run, tmp_path: Path) -> None:
    run_dir, oracle, _ = run
    export_with(run_dir / "checkpoints" / f"step-{STEP:08d}", tmp_path / "out", "--dtype", "fp32", "--shard-gib", 3e-5)
    files = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) > 2
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    read = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert set(index) == set(read) and index[next(iter(load_file(files[0])))] == files[0].name
    wanted = {n: p for n, p in tensors_of(oracle).items() if not n.startswith("audio.ctc_head")}
    assert read.keys() == wanted.keys() and all(read[n].equal(p) for n, p in wanted.items())
    export_with(run_dir, tmp_path / "bf16")
    half = load_file(tmp_path / "bf16" / "model.safetensors")
    assert all(half[n].equal(p.to(torch.bfloat16) if p.is_floating_point() else p) for n, p in wanted.items())


def test_stopped_export_continues_after_the_last_file(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.export import weights

    arguments = [str(run[0]), str(tmp_path / "out"), "--shard-gib", "3e-5"]
    write, written = weights._write_shard, []

    def stopping(*a: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(a[2].name)
        write(*a)

    with monkeypatch.context() as patch:
        patch.setattr(weights, "_write_shard", stopping)
        with pytest.raises(KeyboardInterrupt):
            export.main(arguments)
    assert not (tmp_path / "out").exists()
    times = {n: (tmp_path / ".out.part" / n).stat().st_mtime_ns for n in written}
    assert export.main(arguments) == 0
    assert all((tmp_path / "out" / n).stat().st_mtime_ns == t for n, t in times.items())
    export_with(run[0], tmp_path / "whole", "--shard-gib", 3e-5)
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()


def test_export_that_differs_is_not_published(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer.export import publish

    write = publish.write_weights

    def spoilt(reader: Any, shards: Any, folder: Path, on_bytes: Any) -> None:
        write(reader, shards, folder, on_bytes)
        content = bytearray((folder / "model.safetensors").read_bytes())
        content[-4002:-2:4] = b"\x40" * 1000  # changes exponents of the last tensor
        (folder / "model.safetensors").write_bytes(content)

    monkeypatch.setattr(publish, "write_weights", spoilt)
    assert export.main([str(run[0]), str(tmp_path / "out"), "--verify", str(run[2])]) == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_chat_tokenizer_is_exported(tmp_path: Path) -> None:
    write_run(tmp_path / "run", chats=True)
    export_with(tmp_path / "run", tmp_path / "out", "--dtype", "fp32", "--verify", write_manifest(tmp_path))
    assert json.loads((tmp_path / "out" / "processor_config.json").read_text())["as_chat"]


@pytest.mark.parametrize("chats", [True, False])
def test_conversations_have_the_tokens_of_training(tmp_path: Path, chats: bool) -> None:
    write_run(tmp_path / "run", chats=chats)
    export_with(tmp_path / "run", tmp_path / "out", "--dtype", "fp32", "--verify", write_conversations(tmp_path))
    assert (tmp_path / "out" / "README.md").exists()


def test_all_end_tokens_are_exported(tmp_path: Path) -> None:
    for name, ends in (("gemma", ["<eos>", "<end_of_turn>"]), ("chatml", ["<|im_end|>"])):
        tokenizer = load_tokenizer(str(write_ending(tmp_path / name, name)), TokenizerConfig())
        model = SimpleNamespace(text_config={"vocab_size": tokenizer.vocab_size + 2})
        recipe = SimpleNamespace(eval=SimpleNamespace(max_new_tokens=5))
        settings = generation_config(cast(Any, SimpleNamespace(model=model, recipe=recipe)), tokenizer)
        found = settings.eos_token_id
        assert [tokenizer.piece(i) for i in (found if isinstance(found, list) else [found])] == ends


def test_rarely_used_encoders_are_dropped(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, oracle, manifest = run
    out = tmp_path / "out"
    arguments = ["--dtype", "fp32", "--activated-only", 0.01, "--dev", manifest, "--verify", manifest, "--json"]
    export_with(run_dir, out, *arguments)
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["verified"]["logits"] <= 1e-4 and set(report["scores_whole"]) == set(report["scores_kept"])
    tensors = load_file(out / "model.safetensors")
    assert not [n for n in tensors if "wavlm" in n] and [n for n in tensors if "experts.hubert" in n]
    state = dict(oracle.named_parameters())
    for name in ("audio.router.independent.logits", "audio.router.dependent.weight", "audio.router.dependent.bias"):
        assert tensors[name].equal(state[name][:1]), name
    card = (out / "README.md").read_text()
    assert "wavlm" in card and "| `sqa` | 1.01 % |" in card and "| `all` | 0.51 % |" in card and "asr/wer" in card
    assert transcribe.main([str(out), str(manifest.parent / "0-0.flac"), "--prompt", "what is it a"]) == 0
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--activated-only", "2"], "--activated-only 2: must be a fraction"),
        (["--activated-only", "-0.1"], "--activated-only -0.1: must be a fraction"),
        (["--activated-only", "nan"], "--activated-only nan: must be a fraction"),
        (["--shard-gib", "0"], "--shard-gib 0: must be above 0"),
        (["--shard-gib", "inf"], "--shard-gib inf: must be above 0"),
        (["--verify", "m.jsonl", "--samples", "0"], "--samples 0: must be at least 1"),
        (["--llm-only", "--verify", "m.jsonl"], "--verify m.jsonl: needs the whole model, not --llm-only"),
        (["--dev", "m.jsonl"], "--dev m.jsonl: needs --activated-only"),
    ],
)
def test_invalid_option_is_a_one_line_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert export.main([str(tmp_path / "nothing"), str(tmp_path / "out"), *arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {words}") and message.count("\n") == 1


def test_unwritable_folder_is_a_one_line_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    assert export.main([str(tmp_path / "nothing"), str(tmp_path / "file" / "out")]) == 2
    message = capsys.readouterr().err
    assert "file/out: cannot be written (Not a directory" in message and message.count("\n") == 1


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda c: (c / "audio-00001.safetensors").unlink(), ("audio-00001.safetensors is missing",)),
        (lambda c: os.truncate(c / "audio-00000.safetensors", 99), ("audio-00000.safetensors has 99 bytes",)),
        (lambda c: flip(c / "audio-00002.safetensors"), ("audio-00002.safetensors has a different checksum",)),
        (lambda c: (c / "manifest.json").write_text("{}"), ("manifest.json", "cannot be read")),
    ],
)
def test_a_damaged_checkpoint_is_a_one_line_error(
    tmp_path: Path, spoil: Any, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run")
    spoil(tmp_path / "run" / "checkpoints" / f"step-{STEP:08d}")
    assert export.main([str(tmp_path / "run"), str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1 and all(w in message for w in words), message
    assert not (tmp_path / "out").exists()
    assert export.main([str(tmp_path / "nothing"), str(tmp_path / "out")]) == 2


@pytest.mark.slow
def test_it_needs_no_more_memory_than_the_largest_tensor(run: Run, tmp_path: Path) -> None:
    """Compare with the memory of a process that only imports the same packages, which depends on the installation."""
    code = "import torch, transformers, tools.export, trainer.export.publish; "
    code += "from trainer.telemetry.metrics import peak_memory_bytes; print(peak_memory_bytes()['host'])"
    root = Path(__file__).parents[2]
    idle = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120, check=True
    )
    imported_bytes = int(idle.stdout.splitlines()[-1])
    done = subprocess.run(
        [sys.executable, "-m", "tools.export", str(run[0]), str(tmp_path / "out"), "--json"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["peak_memory_bytes"] < imported_bytes + (100 << 20)
