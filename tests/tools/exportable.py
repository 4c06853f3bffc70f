"""Helpers that write a tiny run for exports: recordings, a tokenizer, and the checkpoint of an untrained model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor

from model.config import LoraConfig, ModelConfig, is_factor
from model.hub.configuration import describe
from model.lora import Adapters, add_adapters
from model.speech_llm import SpeechLLM
from trainer.checkpoint.layout import MOMENTS, PARAM, Shard, entries_of, file_of, key_of, merge_entries
from trainer.checkpoint.local import LocalDraft
from trainer.checkpoint.manifest import FileEntry, Manifest
from trainer.checkpoint.reader import MANIFEST, STATE
from trainer.checkpoint.rect import matrix_of, rects_of_range
from trainer.checkpoint.writer import write_tensors, write_text
from trainer.config.evaluation import EvalConfig
from trainer.config.load import dump
from trainer.config.schema import Recipe
from trainer.data.config import DataConfig, TokenizerConfig
from trainer.data.sentencepiece_training import train_sentencepiece
from trainer.data.tokenizer import load_tokenizer
from trainer.parity_cases import drawn_factor, tiny_model
from trainer.run_tokenizer import DIGEST
from trainer.telemetry.expert_load import ClipGroup, ExpertLoad, Load
from trainer.telemetry.load_history import HISTORY_NAME, EncoderCosts, LoadInterval

NUM_RANKS = 3
STEP = 40
MAX_NEW_TOKENS = 5
INSTRUCTION = "what is it"


def write_manifest(folder: Path, num_samples: int = 4) -> Path:
    """Write a manifest whose samples have one, no and two clips in turn. The clips are noise of different lengths."""
    rng, rows = np.random.default_rng(0), []
    for i in range(num_samples):
        audio: list[str] = []
        for clip in range((1, 0, 2)[i % 3]):
            audio.append(f"{i}-{clip}.flac")
            soundfile.write(folder / audio[-1], 0.1 * rng.standard_normal(3000 + 2500 * i), 16000)
        task = ("asr", "text", "sqa")[i % 3]
        row = {"id": f"s{i}", "audio": audio or None, "task": task, "split": "dev"}
        rows.append(row | {"instruction": f"{INSTRUCTION} {'abc'[i % 3]}", "answer": "ab"})
    path = folder / "dev.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def messages_about(paths: Sequence[str]) -> list[dict[str, object]]:
    """Return a conversation with the first clip in turn 1, the others in turn 2, and no answer to turn 2."""
    blocks = [{"type": "audio", "audio": path} for path in paths]
    asked = [[*blocks[:1], {"type": "text", "text": f"{INSTRUCTION} a"}]]
    asked += [[{"type": "text", "text": "it "}, *blocks[1:], {"type": "text", "text": " is b"}]]
    users = [{"role": "user", "content": content} for content in asked]
    return [users[0], {"role": "assistant", "content": "ab"}, users[1]]


def write_conversations(folder: Path) -> Path:
    """Write a manifest of two conversations with three clips and two clips."""
    rng, rows = np.random.default_rng(1), []
    for i in range(2):
        names = [f"talk-{i}-{clip}.flac" for clip in range(3 - i)]
        for name in names:
            soundfile.write(folder / name, 0.1 * rng.standard_normal(4000 + 2500 * i), 16000)
        answer = {"role": "assistant", "content": "c"}
        rows.append({"id": f"talk{i}", "task": "sqa", "split": "dev", "messages": [*messages_about(names), answer]})
    path = folder / "talk.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_run(
    run_dir: Path,
    family: str = "llama",
    chats: bool = False,
    model: ModelConfig | None = None,
    lora: Sequence[LoraConfig] = (),
) -> SpeechLLM:
    """Write the run's checkpoint as `NUM_RANKS` ranks would have written it, and return the model.

    Args:
        run_dir: The folder to create.
        family: The LLM family of the model.
        chats: True for a Hugging Face tokenizer with a chat template.
        model: The model; None stands for `tiny_model(family)`.
        lora: The low-rank adapters. If there are any, the LLM's own weights are frozen.
    """
    run_dir.mkdir(parents=True)
    path = run_dir / ("hf" if chats else "tokenizer.model")
    if chats:
        write_chat_tokenizer(path)
    else:
        texts = [f"{INSTRUCTION} {a} {b}" for a in "abc" for b in "abc"] * 3
        train_sentencepiece(texts, 60, path, TokenizerConfig().placeholder)
    data = DataConfig(tokenizer=TokenizerConfig(template="{audio}{instruction}\n"), min_audio_sec=0.3)
    tokenizer = load_tokenizer(str(path), data.tokenizer)
    model = model or with_head_dim(tiny_model(family), family)
    oracle = SpeechLLM(model, tokenizer.vocab_size, seed=1).eval()
    add_adapters(oracle, "", Adapters(tuple(lora), drawn_factor))
    with torch.no_grad():  # biases of 0 and norms of 1 would hide mistakes
        for parameter in oracle.parameters():
            parameter.add_(
                0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            )
    recipe = Recipe(
        name=run_dir.name, model=model, data=data, eval=EvalConfig(max_new_tokens=MAX_NEW_TOKENS), lora=tuple(lora)
    )
    described = describe(model, oracle.llm.config, tokenizer.vocab_size)
    extra = {"recipe": dump(recipe), "model": described, "tokenizer": str(path), DIGEST: tokenizer.digest}
    write_checkpoint(
        run_dir / "checkpoints" / f"step-{STEP:08d}", tensors_of(oracle), extra, frozen="llm." if lora else None
    )
    (run_dir / HISTORY_NAME).write_text(json.dumps(routing_history().to_json()) + "\n")
    return oracle


def routing_history() -> LoadInterval:
    """Return a history of 198 clips. One clip of the task sqa was routed to wavlm, and all others to hubert."""
    pairs, experts = np.ones((1, 2)), ("hubert", "wavlm")
    cells = {
        ClipGroup(task, "en", "-", "0-1 s"): Load(
            99, 99.0, np.zeros(1), pairs, pairs, np.array(counts), np.array(counts)
        )
        for task, counts in (("asr", (99.0, 0.0)), ("sqa", (98.0, 1.0)))
    }
    nothing = np.zeros((2, 1))
    costs = EncoderCosts(experts, nothing, nothing, np.zeros(2), np.zeros(2), 0.0)
    return LoadInterval(STEP, STEP, 1.0, ExpertLoad(("data_independent",), experts, cells), costs)


def write_chat_tokenizer(folder: Path) -> None:
    """Write a Hugging Face tokenizer that has one token per word and a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    placeholder = TokenizerConfig().placeholder
    words = ["<unk>", "<s>", "</s>", placeholder, "user", "assistant", ":", *INSTRUCTION.split(), "a", "b", "c", "ab"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    found = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    found.add_special_tokens({"additional_special_tokens": [placeholder]})
    found.chat_template = "<s>{% for m in messages %}user: {{ m['content'] }} assistant:{% endfor %}"
    found.save_pretrained(folder)


def with_head_dim(model: ModelConfig, family: str) -> ModelConfig:
    """Return the model, for Qwen3 with heads that are wider than hidden_size / num_attention_heads."""
    if family != "qwen3":
        return model
    return replace(model, llm=replace(model.llm, config={**model.llm.config, "head_dim": 16}))


def tensors_of(oracle: SpeechLLM) -> dict[str, Tensor]:
    """Return parameters and buffers by the names under which the engines save them."""
    buffers = {n: t for n, t in oracle.state_dict().items() if n.startswith("audio.")}
    return {**buffers, **dict(oracle.named_parameters())}


def write_checkpoint(
    folder: Path, tensors: dict[str, Tensor], extra: dict[str, object], frozen: str | None = None
) -> None:
    """Write a checkpoint of `NUM_RANKS` ranks, with zeros as the optimizer's moments.

    A tensor is divided into flat parts. Every third tensor is divided by columns instead, as with tensor parallelism.

    Args:
        folder: The checkpoint folder, which is created.
        tensors: The tensors by name.
        extra: What the checkpoint stores in addition, such as the recipe.
        frozen: The prefix of weights that are not trained, except for their low-rank adapters; None for none.
    """
    folder.mkdir(parents=True)
    parts: list[list[Shard]] = [[] for _ in range(NUM_RANKS)]
    for i, (name, whole) in enumerate(tensors.items()):
        shape, matrix = tuple(whole.shape), matrix_of(tuple(whole.shape))
        value = whole.detach().reshape(matrix.rows, matrix.cols)
        bounds = [whole.numel() * n // NUM_RANKS for n in range(NUM_RANKS + 1)]
        if i % 3 == 0 and matrix.cols > 1:
            half = matrix.cols // 2
            rects = [(0, matrix._replace(cols=half)), (1, matrix._replace(col=half, cols=matrix.cols - half))]
        else:
            rects = [(n, r) for n in range(NUM_RANKS) for _, r in rects_of_range(matrix, bounds[n], bounds[n + 1])]
        for rank, rect in rects:
            cut = value[rect.within(matrix)].contiguous()
            values = {PARAM: cut, "exp_avg": torch.zeros_like(cut), "exp_avg_sq": torch.zeros_like(cut)}
            learned = frozen is None or not name.startswith(frozen) or is_factor(name)
            parts[rank].append(Shard(name, shape, rect, values, STEP if learned else None))
    files: dict[str, FileEntry] = {}
    for rank, shards in enumerate(parts):
        for file, kinds in ((file_of("audio", rank), (PARAM,)), (file_of(MOMENTS, rank), ("exp_avg", "exp_avg_sq"))):
            written = {key_of(s.name, kind, s.rect): s.values[kind] for s in shards for kind in kinds}
            files[file] = write_tensors(LocalDraft(folder), file, written)
    files[STATE] = write_text(LocalDraft(folder), STATE, json.dumps({"step": STEP, "extra": extra}))
    entries = merge_entries([entries_of(shards, "audio", rank) for rank, shards in enumerate(parts)], [])
    topology = {"world": NUM_RANKS, "tp": 1, "pp": 1, "ep": 1}
    write_text(LocalDraft(folder), MANIFEST, Manifest(STEP, topology, dict(sorted(files.items())), entries).dumps())
