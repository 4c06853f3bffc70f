"""Tests of the checks across the sections of a recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from model.errors import UserError
from trainer.config.checks import check_folders, check_recipe, warnings_of
from trainer.config.llm_checks import known_llm_config
from trainer.config.load import load_recipe, recipe_names
from trainer.engine.ds_config import build_ds_config, load_ds_json

DS_CONFIGS = Path(__file__).parent.parent.parent / "ds_configs"


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_are_valid(name: str) -> None:
    check_recipe(load_recipe(name))


def test_the_70b_recipe_is_llama_3_70b_on_128_gpus() -> None:
    recipe = load_recipe("mowe_70b")
    assert (recipe.parallel.num_ranks, recipe.parallel.tensor, recipe.parallel.pipeline) == (128, 4, 4)
    hf_config = known_llm_config(recipe.model.llm)
    assert hf_config is not None
    assert (hf_config.hidden_size, hf_config.num_hidden_layers, hf_config.num_key_value_heads) == (8192, 80, 8)


@pytest.mark.parametrize(
    ("recipe", "override", "message"),
    [
        ("debug", ["eval.stop_after=2"], "eval.stop_after = 2: needs evaluations; set eval.every_steps"),
        (
            "debug",
            ["checkpoint.best_metric=asr/wer"],
            "checkpoint.best_metric = asr/wer: must begin with eval/ and one of data.eval_splits: e.g. "
            "eval/dev/asr/wer",
        ),
        (
            "debug",
            [
                "eval.stop_after=2",
                "eval.every_steps=2",
                "eval.split=test",
                "checkpoint.best_metric=eval/dev/asr/wer",
                "data.eval_splits=[dev, test]",
            ],
            "eval.stop_after = 2: checkpoint.best_metric = eval/dev/asr/wer must be a score of eval.split: e.g. "
            "eval/test/asr/wer",
        ),
        (
            "debug",
            ["checkpoint.best_metric=eval/test/sqa/accuracy"],
            "checkpoint.best_is = lowest: the best value of checkpoint.best_metric = eval/test/sqa/accuracy is the "
            "highest; set checkpoint.best_is=highest",
        ),
        ("debug", ["telemetry.trackers=[flow]"], "telemetry.trackers: flow is not one of mlflow, tensorboard, wandb"),
        (
            "debug",
            ["model.llm.config.num_attention_heads=0"],
            "model.llm.config.num_attention_heads = 0: must be at least 1",
        ),
        ("debug", ["model.primary.config.encoder_layers=-1"], "model.primary.config: -1 layers; use at least 1"),
        ("debug", ["model.expert_dim=0"], "model.expert_dim = 0: must be at least 1"),
        ("debug", ["optim.betas=[2,3]"], "optim.betas = [2.0, 3.0]: must be within [0, 1)"),
        ("debug", ["eval.max_samples=-5"], "eval.max_samples = -5: must be at least 1"),
        ("debug", ["parallel.tensor=3"], "parallel.tensor = 3: must be one of 1, 2 for 2 ranks"),
        (
            "debug",
            ["parallel.num_ranks=8", "parallel.tensor=8"],
            "parallel.tensor = 8: must divide the LLM's 4 attention heads, 2 key-value heads and 64 feed-forward "
            "channels; possible with 8 ranks and pipeline=1: 1, 2",
        ),
        (
            "mowe_70b",
            ["parallel.tensor=16"],
            "parallel.tensor = 16: must divide the LLM's 64 attention heads, 8 key-value heads and 28672 feed-forward "
            "channels; possible with 128 ranks and pipeline=4: 1, 2, 4, 8",
        ),
        (
            "mowe_70b",
            ["parallel.pipeline=16", "parallel.virtual_stages=1", "model.llm.config.num_hidden_layers=12"],
            "parallel.pipeline = 16: the LLM has only 12 layers; possible with 128 ranks and tensor=4: 1, 2, 4, 8",
        ),
        (
            "mowe_70b",
            ["parallel.virtual_stages=21"],
            "parallel.virtual_stages = 21: the LLM's 80 layers are too few for pipeline=4; it must be within 1..20",
        ),
        (
            "mowe_8b",
            ["parallel.pipeline=1", "parallel.virtual_stages=2"],
            "parallel.virtual_stages = 2: must be 1, since parallel.pipeline = 1",
        ),
        (
            "mowe_70b",
            ["parallel.virtual_stages=0"],
            "parallel.virtual_stages = 0: must be at least 1",
        ),
        (
            "mowe_70b",
            ["parallel.overlap_grad_reduce=false", "parallel.overlap_param_gather=true"],
            "parallel.overlap_param_gather = true: set parallel.overlap_grad_reduce=true as well",
        ),
        (
            "debug",
            ["stages=[{name: all, steps: 4}]", "parallel.overlap_grad_reduce=true"],
            "parallel.overlap_grad_reduce = true: the trained parameters differ between stages of training; set it "
            "to false, or remove stages",
        ),
        (
            "debug",
            ["parallel.grad_reduce_dtype=bf16"],
            "parallel.grad_reduce_dtype = bf16: gradients have train.precision = fp32; set train.precision=bf16, or "
            "parallel.grad_reduce_dtype=fp32",
        ),
        (
            "debug",
            ["parallel.expert=2", "model.experts=[]"],
            "parallel.expert = 2: the model has no encoder experts; set it to 1",
        ),
        ("debug", ["optim.warmup_steps=9"], "optim.warmup_steps = 9: must be within 0..4 (train.steps)"),
        ("debug", ["profile.steps=3:9"], "profile.steps = 3:9: ends after train.steps = 4"),
        (
            "debug",
            ["parallel.num_ranks=2", "parallel.context=3"],
            "parallel.context = 3: must be one of 1, 2 for 2 ranks with tensor=1 and pipeline=1",
        ),
        (
            "debug",
            ["parallel.num_ranks=4", "parallel.context=2", "parallel.tensor=2", "train.pack_multiple_tokens=4"],
            "train.pack_multiple_tokens = 4: must be a multiple of 2 · parallel.context · parallel.tensor = 8 and "
            "divide ",
        ),
        ("debug", ["train.pack_multiple_tokens=0"], "train.pack_multiple_tokens = 0: must be at least 1, or null"),
        (
            "debug",
            ["train.pack_multiple_tokens=3"],
            "train.pack_multiple_tokens = 3: must be a multiple of parallel.tensor = 1 and divide "
            "train.llm_tokens_per_microbatch = 256; set it to 1, 2, 4, 8, 16, 32, 64, 128, 256, or null",
        ),
        (
            "debug",
            ["parallel.tensor=2", "train.llm_tokens_per_microbatch=20", "train.pack_multiple_tokens=5"],
            "train.pack_multiple_tokens = 5: must be a multiple of parallel.tensor = 2 and divide "
            "train.llm_tokens_per_microbatch = 20; set it to 2, 4, 10, 20, or null",
        ),
        (
            "debug",
            ["parallel.tensor=2", "train.llm_tokens_per_microbatch=15", "train.pack_multiple_tokens=2"],
            "train.pack_multiple_tokens = 2: must be a multiple of parallel.tensor = 2 and divide "
            "train.llm_tokens_per_microbatch = 15; no number does both, so set it to null, or change one of the two",
        ),
        ("debug", ["train.steps=0"], "train.steps = 0: must be at least 1"),
        ("debug", ["data.datasets=[]"], "data.datasets is empty: name at least one manifest or folder of shards"),
        ("debug", ["data.global_batch_samples=12"], "data.global_batch_samples = 12: must be a multiple of data.num_l"),
        (
            "debug",
            ["data.datasets.0.tasks=[er, ac]"],
            "model.ctc_weight = 1.0: CTC needs answers of the task asr, and none of data.datasets has it",
        ),
        (
            "debug",
            ["eval.final_split=exam"],
            "eval.final_split = exam: must be one of data.eval_splits",
        ),
        ("debug", ["eval.every_steps=1"], "eval.split = dev: must be one of data.eval_splits, which are test"),
        (
            "debug",
            ["data.max_audio_sec=300"],
            "data.max_audio_sec = 300.0: such a clip takes 1875 of the LLM's 1024 positions",
        ),
        (
            "debug",
            ["parallel.num_ranks=16"],
            "data.global_batch_samples = 8: 16 LLM replicas (parallel.num_ranks / (tensor · context · pipeline)) would "
            "have less than one sample each; set it to a multiple of data.num_lanes = 8, at least 16",
        ),
        (
            "debug",
            [
                "data.max_audio_sec=40",
                "model.llm.config.rope_parameters={rope_type: linear, factor: 2.0, rope_theta: 10000.0, "
                "original_max_position_embeddings: 100}",
            ],
            "data.max_audio_sec = 40.0: such a clip takes 250 of the LLM's 200 positions",
        ),
        ("debug", ["model.llm.config.vocab_size=100"], "data.tokenizer.train_vocab_size = 256: the LLM's vocab_size"),
        ("debug", ["model.router.top_k=3"], "model.router.top_k = 3: must be within 1..2"),
        ("debug", ["model.experts.0.length_mode=trim"], "model.experts[0].length_mode = trim: must be one of full"),
        (
            "debug",
            ["model.experts.0.trailing_silence_sec=1"],
            "model.experts[0].trailing_silence_sec = 1.0: needs length_mode = trim; set it, or remove the key",
        ),
        ("debug", ["model.primary.trailing_silence_sec=-1"], "model.primary.trailing_silence_sec = -1.0: must be 0"),
        ("debug", ["model.primary.trailing_silence_sec=30"], "model.primary.trailing_silence_sec = 30.0: must be 0"),
        ("debug", ["model.experts.0.config={}"], "model.experts[0]: set weights (a directory or hub id), or config"),
        ("debug", ["model.adapter.strides=[]"], "model.adapter.strides = []: specify one positive stride per conv"),
        (
            "debug",
            ["model.adapter.kind=stacked_convolutions", "model.adapter.strides=[5, 2]"],
            "model.adapter.kernel_size = 3: must be at least the largest stride, 5",
        ),
        (
            "debug",
            ["model.adapter.kind=stacked_convolutions", "model.adapter.strides=[4]"],
            "model.adapter.strides = [4]: the kind stacked_convolutions needs the stride of at least one convolution",
        ),
        ("debug", ["model.adapter.kernel_size=1"], "model.adapter.kernel_size = 1: must be at least the largest stri"),
        ("debug", ["model.primary=null", "model.router.mode=all_routed"], "model.router.input = primary: all_rou"),
        ("debug", ["train.deepspeed=nope.json"], "train.deepspeed = "),
        ("debug", ["model.llm.config.model_type=gpt2"], "model.llm.config.model_type = gpt2: supported families are"),
    ],
)
def test_an_illegal_combination_is_refused(recipe: str, override: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        check_recipe(load_recipe(recipe, override))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_window_shorter_than_in_pre_training_is_one_warning() -> None:
    trim = ["model.primary.length_mode=trim"]
    (warning,) = warnings_of(load_recipe("mowe_8b", trim).model)[:1]
    assert warning.startswith("model.primary.length_mode = trim: openai/whisper-large-v3 was pre-trained on windows of")
    assert (
        "set its length_mode to full or, for a smaller change, set its trailing_silence_sec to 1" in warning
        and "\n" not in warning
    )
    assert not warnings_of(load_recipe("mowe_8b", [*trim, "model.primary.trailing_silence_sec=1"]).model)
    assert not warnings_of(load_recipe("debug").model), "random weights need no warning"


@pytest.mark.parametrize("as_file", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("llm.Q4_1.gguf", b"GGUF\3\0\0\0", "llama.cpp"),
        ("model.bin", b"\6\0\0\0\x0c\0WhisperSpec\0\3\0\0\0", "CTranslate2 (faster-whisper)"),
    ],
)
def test_weights_of_other_programs_are_named(
    tmp_path: Path, name: str, content: bytes, words: str, as_file: bool
) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(content)
    path = tmp_path / name if as_file else tmp_path
    for key in ("model.llm.weights", "model.primary.weights"):
        with pytest.raises(UserError) as error:
            check_recipe(load_recipe("debug", [f"{key}={path}"]))
        message = str(error.value)
        assert message.startswith(f"{key} = {path}: ") and words in message and "\n" not in message
        assert "cannot be read; use the Hugging Face folder" in message and "`earshot models`" in message


def test_a_missing_folder_is_named_before_the_hub_is_asked(tmp_path: Path) -> None:
    recipe = load_recipe("finetune_cpu")
    check_recipe(recipe)  # a dry run needs no weights
    with pytest.raises(UserError) as error:
        check_folders(recipe)
    assert str(error.value) == (
        "model.primary.weights = models/whisper-base: no such folder; run: earshot models whisper-base --out models"
    )
    overrides = [f"model.primary.weights={tmp_path}", f"model.llm.weights={tmp_path / 'llm'}"]
    with pytest.raises(UserError, match=f"model.llm.weights = {tmp_path / 'llm'}: no such folder; specify an existing"):
        check_folders(load_recipe("finetune_cpu", overrides))
    check_folders(load_recipe("mowe_8b"))  # the weights are hub ids


def test_a_file_is_no_folder_of_weights(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="a file; use the Hugging Face folder that contains it"):
        check_recipe(load_recipe("debug", [f"model.llm.weights={tmp_path / 'model.safetensors'}"]))


def test_an_unknown_encoder_field_is_refused_before_any_rank_starts() -> None:
    with pytest.raises(UserError, match="d_modle"):
        check_recipe(load_recipe("debug", ["model.primary.config.d_modle=32"]))
    with pytest.raises(UserError, match="d_modle"):  # the config of a hub checkpoint is not read here
        check_recipe(load_recipe("mowe_8b", ["model.primary.config.d_modle=32"]))


def write(folder: Path, tree: object) -> Path:
    path = folder / "ds.json"
    path.write_text(tree if isinstance(tree, str) else json.dumps(tree))
    return path


ZERO = {"zero_optimization": {"stage": 3}}


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ({"zero_hpz_partition_size": 8}, "zero_hpz_partition_size = 8"),
        ({"zero_quantized_weights": True}, "zero_quantized_weights = True"),
        ({"offload_param": {"device": "nvme", "nvme_path": "/nvme"}}, "offload_param.device = nvme"),
    ],
)
def test_settings_for_weights_per_module_are_refused_otherwise(
    tmp_path: Path, setting: dict[str, object], text: str
) -> None:
    path = write(tmp_path, {"zero_optimization": {"stage": 3, **setting}})
    overrides = [f"train.deepspeed={path}"]
    with pytest.raises(UserError) as error:
        check_recipe(load_recipe("debug", overrides))
    assert str(error.value) == (
        f"{path}: zero_optimization.{text}: needs train.gather_audio_weights = per_module, because per_update gathers "
        "plain weights from memory"
    )
    check_recipe(load_recipe("debug", [*overrides, "train.gather_audio_weights=per_module"]))


def test_blocks_of_ranks_need_weights_that_are_gathered_per_update() -> None:
    overrides = ["train.gather_audio_weights=per_module", "parallel.audio_shard=1"]
    with pytest.raises(UserError) as error:
        check_recipe(load_recipe("debug", overrides))
    assert str(error.value) == (
        "parallel.audio_shard = 1: weights that are gathered per module are shared by all ranks; remove it, or set "
        "train.gather_audio_weights to per_update"
    )
    check_recipe(load_recipe("debug", overrides[1:]))
    check_recipe(load_recipe("debug", [overrides[0], "parallel.audio_shard=2"]))


@pytest.mark.parametrize("path", sorted(DS_CONFIGS.glob("*.json")), ids=lambda p: p.stem)
def test_deepspeed_accepts_our_json(path: Path) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    for precision in ("fp32", "bf16"):
        tree = build_ds_config(path, precision=precision)  # type: ignore[arg-type]
        config = DeepSpeedConfig(tree)
        assert config.zero_config.stage == 3
        assert config.train_micro_batch_size_per_gpu == config.gradient_accumulation_steps == 1
        assert config.gradient_clipping == 0
        assert config.bfloat16_config.enabled == (precision == "bf16")


@pytest.mark.parametrize(
    ("key", "owner"),
    [
        ("train_batch_size", "data.global_batch_samples"),
        ("train_micro_batch_size_per_gpu", "train.encoder_batch_sec"),
        ("gradient_accumulation_steps", "train.llm_tokens_per_microbatch"),
        ("gradient_clipping", "optim.clip_norm"),
        ("bf16", "train.precision"),
        ("fp16", "train.precision"),
        ("optimizer", "optim"),
        ("scheduler", "optim.schedule"),
    ],
)
def test_json_key_that_the_recipe_determines_is_refused(tmp_path: Path, key: str, owner: str) -> None:
    path = write(tmp_path, ZERO | {key: 1})
    with pytest.raises(UserError) as error:
        load_ds_json(path)
    assert str(error.value) == f"{path}: {key} belongs in the recipe as {owner}; set it there and remove it here"


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (ZERO | {"zero_optimisation": {}}, "unknown key zero_optimisation; did you mean zero_optimization"),
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage = 2: the audio side needs stage 3"),
        ({}, "zero_optimization.stage = None: the audio side needs stage 3"),
        ([], "must contain a JSON object"),
        ("{", "cannot be read as JSON"),
        ('{"aio": {}, "aio": {}}', "key aio is given twice"),
    ],
)
def test_invalid_json_is_refused(tmp_path: Path, tree: object, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        load_ds_json(write(tmp_path, tree))


def test_a_misspelt_zero_key_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, {"zero_optimization": {"stage": 3, "overlap_com": True}})
    with pytest.raises(UserError, match=r"zero_optimization\.overlap_com = True: Extra inputs"):
        build_ds_config(path, precision="fp32")
