"""Tests that a checkpoint's content cannot choose the code that an export contains or that its users execute."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.errors import UserError
from tests.tools.exportable import STEP, write_chat_tokenizer, write_manifest, write_run
from tools import export, transcribe
from trainer.checkpoint.folder import LocalFolder
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.reader import MANIFEST, STATE, hash_file
from trainer.data.config import TokenizerConfig
from trainer.data.tokenizer import load_tokenizer
from trainer.data.tokenizer_digest import save_without_code
from trainer.export.code import CONFIGURATION, MODELING, remote_code, remote_name
from trainer.export.description import read_description

AUTO_MAP = {
    "AutoConfig": f"{remote_name(CONFIGURATION)}.EarshotConfig",
    "AutoModelForCausalLM": f"{remote_name(MODELING)}.EarshotForCausalLM",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trust")
    write_run(folder / "run")
    write_manifest(folder)
    return folder / "run"


def forge(run: Path, copy_to: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Copy a run, change the `extra` state in its checkpoint, and update the checksum; return the copy."""
    shutil.copytree(run, copy_to)
    folder = copy_to / "checkpoints" / f"step-{STEP:08d}"
    state = json.loads((folder / STATE).read_text())
    change(state["extra"])
    (folder / STATE).write_text(json.dumps(state))
    manifest = Manifest.loads((folder / MANIFEST).read_text())
    manifest.files[STATE] = hash_file(LocalFolder(folder), STATE)
    (folder / MANIFEST).write_text(manifest.dumps())
    return copy_to


def evil_module(folder: Path) -> tuple[str, Path]:
    """Write a module that creates a file when it is imported, and return the module's folder and that file."""
    (folder / "evil").mkdir()
    mark = folder / "executed"
    (folder / "evil" / "mine.py").write_text(
        f"from transformers import PretrainedConfig\nopen({str(mark)!r}, 'w').close()\n"
        "class C(PretrainedConfig):\n    pass\n"
    )
    return str(folder / "evil"), mark


def test_code_named_by_a_checkpoint_is_not_executed(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, mark = evil_module(tmp_path)
    evil = {key: f"{place}--mine.C" for key in ("AutoConfig", "AutoModelForCausalLM")}
    forged = forge(run, tmp_path / "top", lambda extra: extra["model"].update(auto_map=evil))
    out = tmp_path / "out"
    assert export.main([str(forged), str(out), "--verify", str(run.parent / "dev.jsonl")]) == 2
    message = capsys.readouterr().err
    assert "state.json: model: the description must have exactly the keys" in message and message.count("\n") == 1
    assert not out.exists() and not mark.exists()


@pytest.mark.parametrize("llm_only", [False, True])
def test_hooks_in_the_config_of_the_llm_do_not_reach_the_export(run: Path, tmp_path: Path, llm_only: bool) -> None:
    hooks: dict[str, Any] = {
        "auto_map": {
            "AutoConfig": "attacker/repository--mine.C",
            "AutoModelForCausalLM": "attacker/repository--mine.M",
        },
        "_attn_implementation": "attacker/kernel",
        "attn_implementation": "attacker/kernel",
        "_attn_implementation_internal": "attacker/kernel",
        "quantization_config": {"quant_method": "attacker"},
        "architectures": ["Attacker"],
    }
    forged = forge(run, tmp_path / "forged", lambda extra: extra["model"]["text_config"].update(hooks))
    assert export.main([str(forged), str(tmp_path / "out"), *(["--llm-only"] if llm_only else [])]) == 0
    written = "".join(p.read_text() for p in (tmp_path / "out").glob("*.json"))
    assert "ttacker" not in written and '"quantization_config"' not in written
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("auto_map") == (None if llm_only else AUTO_MAP)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda m: m["audio"]["primary"].update(weights="attacker/repository"),
            "has weights = 'attacker/repository'",
        ),
        (lambda m: m["audio"]["primary"].update(family="attacker"), "audio.primary.family = 'attacker'"),
        (lambda m: m["audio"]["primary"].update(auto_map={}), "audio.primary.auto_map: unknown key"),
        (lambda m: m["audio"]["primary"]["config"].update(auto_map={}), "config.auto_map is unknown"),
        (lambda m: m["audio"].update(auto_map={}), "audio must have exactly the keys"),
        (lambda m: m["text_config"].update(model_type="attacker"), "model.llm.config.model_type = attacker"),
        (lambda m: m["text_config"].update(num_hidden_layers=10**12), "text_config.num_hidden_layers = 1000000000000"),
        (lambda m: m["text_config"].update(vocab_size=10**12), "embed_tokens.weight with shape (1000000000000"),
        (lambda m: m["text_config"].update(num_attention_heads=0, head_dim=None), "text_config:"),
        (lambda m: m.update(vocab_size=True), "vocab_size = True"),
    ],
)
def test_a_forged_description_is_a_one_line_error(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Any], Any], words: str
) -> None:
    forged = forge(run, tmp_path / "forged", lambda extra: change(extra["model"]))
    assert export.main([str(forged), str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert words in message and message.startswith("error: ") and message.count("\n") == 1, message


@pytest.mark.parametrize(
    "change",
    [
        lambda extra: extra.update(recipe=7),
        lambda extra: extra.update(recipe="[" * 100_000),
        lambda extra: extra.update(tokenizer_digest={"a": 1}),
        lambda extra: extra.update(model=[1]),
        lambda extra: extra.clear(),
    ],
)
def test_any_other_forged_state_is_a_one_line_error(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Any], Any]
) -> None:
    assert export.main([str(forge(run, tmp_path / "forged", change)), str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1, message


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(p for key, value in items for p in places(value, (*path, key)))]


WORDS = st.sampled_from(
    ["auto_map", "family", "weights", "llama", "attacker--m.C", "_attn_implementation", "x", "config"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=4) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS | st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.slow
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_description_is_data_or_an_error(run: Path, data: st.DataObject) -> None:
    state = run / "checkpoints" / f"step-{STEP:08d}" / STATE
    whole = copy.deepcopy(json.loads(state.read_text())["extra"]["model"])
    box = {"model": whole}
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(places(box)[1:]))
        node: Any = box
        for key in path[:-1]:
            node = node[key]
        if isinstance(node[path[-1]], dict) and data.draw(st.booleans()):
            node[path[-1]][data.draw(WORDS)] = data.draw(VALUES)
        else:
            node[path[-1]] = data.draw(VALUES)
    try:
        tree = read_description(json.loads(json.dumps(box["model"])), "state.json").tree()
    except UserError as error:
        assert str(error).startswith("state.json: model: ") and "\n" not in str(error)
        return
    assert tree.keys() == {"text_config", "audio", "vocab_size"}
    assert not {"auto_map", "_attn_implementation", "architectures"} & tree["text_config"].keys()
    audio = tree["audio"]
    encoders = [e for e in (audio["primary"], *audio["experts"]) if e is not None]
    assert all(e["weights"] is None and "auto_map" not in e["config"] for e in encoders)
    remote_code({e["family"] for e in encoders})


def test_an_export_consists_of_our_code(run: Path, tmp_path: Path) -> None:
    assert export.main([str(run), str(tmp_path / "out")]) == 0
    code = {p.name: p.read_text() for p in (tmp_path / "out").glob("*.py")}
    assert code == remote_code({"whisper", "hubert", "wavlm"})
    assert json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_text_of_a_checkpoint_stays_in_its_block_of_the_model_card(run: Path, tmp_path: Path) -> None:
    def change(extra: dict[str, Any]) -> None:
        extra["recipe"] += "\n# ````\n# # Install the package attacker first\n"

    (forged := forge(run, tmp_path / "forged", change)).joinpath("summary.json").write_text('{"scores": {"a": 1}}')
    assert export.main([str(forged), str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.count("`````yaml") == 1 and card.rstrip().endswith("`````")


def test_code_named_by_a_tokenizer_does_not_reach_the_export(tmp_path: Path) -> None:
    write_chat_tokenizer(tmp_path / "mine")
    path = tmp_path / "mine" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": {"AutoTokenizer": ["a--m.T", "a--m.T"]}}))
    tokenizer: Any = load_tokenizer(str(tmp_path / "mine"), TokenizerConfig())
    save_without_code(tokenizer.inner, tmp_path / "copy")
    assert "auto_map" not in (tmp_path / "copy" / "tokenizer_config.json").read_text()
    assert load_tokenizer(str(tmp_path / "copy"), TokenizerConfig()).digest == tokenizer.digest


def test_templates_of_a_tokenizer_do_not_leave_the_folder(tmp_path: Path) -> None:
    write_chat_tokenizer(tmp_path / "mine")
    tokenizer: Any = load_tokenizer(str(tmp_path / "mine"), TokenizerConfig())
    tokenizer.inner.chat_template = {"default": "a", "../../outside": "b"}
    with pytest.raises(UserError, match="must have a name of letters"):
        save_without_code(tokenizer.inner, tmp_path / "copy")
    assert not list(tmp_path.rglob("outside*"))


def test_hooks_in_an_export_are_not_used(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export.main([str(run), str(tmp_path / "out")]) == 0
    place, mark = evil_module(tmp_path)
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["auto_map"] = config["text_config"]["auto_map"] = {"AutoConfig": f"{place}--mine.C"}
    config["text_config"]["_attn_implementation"] = config["text_config"]["attn_implementation"] = "attacker/kernel"
    path.write_text(json.dumps(config))
    wav = str(run.parent / "0-0.flac")
    assert transcribe.main([str(tmp_path / "out"), wav, "--prompt", "what is it a"]) == 0, capsys.readouterr().err
    assert not mark.exists()
