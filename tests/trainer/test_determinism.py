"""Tests of `train.deterministic`: the settings that it changes and restores, and the allowed operations of a step."""

from __future__ import annotations

import ast
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from model.errors import UserError
from tests.distributed.harness import run_ranks
from trainer import build
from trainer.config.checks import check_recipe
from trainer.config.load import load_recipe
from trainer.engine.determinism import deterministic_kernels
from trainer.run.exit_codes import ExitCode
from trainer.run.launch import RankEnv

ROOT = Path(__file__).parents[2]
VARIABLES = ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO", "NVTE_ALLOW_NONDETERMINISTIC_ALGO")


def settings() -> dict[str, Any]:
    return {
        "algorithms": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "fill": torch.utils.deterministic.fill_uninitialized_memory,
        "cudnn": torch.backends.cudnn.deterministic,
        "benchmark": torch.backends.cudnn.benchmark,
        "cudnn_sdp": torch.backends.cuda.cudnn_sdp_enabled(),
        **{name: os.environ.get(name) for name in VARIABLES},
    }


WANTED = {"algorithms": True, "warn_only": False, "fill": True, "cudnn": True, "benchmark": False, "cudnn_sdp": False}
WANTED |= dict(zip(VARIABLES, (":4096:8", "^NVLS", "0"), strict=True))


@pytest.fixture
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("wanted", [False, True])
def test_settings_hold_during_a_run_and_are_restored(
    wanted: bool, no_variables: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []

    def run(*_: Any) -> int:
        seen.append(settings())
        return ExitCode.FINISHED

    monkeypatch.setattr(build, "_run", run)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    before = settings()
    recipe = load_recipe("debug", [f"train.deterministic={str(wanted).lower()}"])
    assert build.run_training(recipe, RankEnv(0, 0, 1)) == 0
    assert seen == [WANTED if wanted else before] and settings() == before


def test_settings_are_restored_after_an_error_and_the_users_variables_are_kept(
    no_variables: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    before = settings()
    with pytest.raises(ValueError, match="inside"), deterministic_kernels(True):
        assert settings() == {**WANTED, "CUBLAS_WORKSPACE_CONFIG": ":16:8"}
        raise ValueError("inside")
    assert settings() == before


def test_a_variable_that_contradicts_is_refused(no_variables: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":8:8")
    check_recipe(load_recipe("debug"))
    with pytest.raises(UserError) as error:
        check_recipe(load_recipe("debug", ["train.deterministic=true"]))
    assert str(error.value) == (
        "train.deterministic = true: the environment has CUBLAS_WORKSPACE_CONFIG=:8:8; unset it, or set it to "
        ":4096:8 or :16:8"
    )
    with pytest.raises(UserError), deterministic_kernels(True):
        pass


def test_cuda_that_was_started_before_is_refused(no_variables: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(UserError, match="CUDA was started before"), deterministic_kernels(True):
        pass
    assert not torch.are_deterministic_algorithms_enabled()


# The operations that raise an error on CUDA, according to the documentation of torch.use_deterministic_algorithms, and
# their aliases.
DOCUMENTED = {
    "AvgPool3d", "AdaptiveAvgPool2d", "AdaptiveAvgPool3d", "AdaptiveMaxPool2d", "FractionalMaxPool2d",
    "FractionalMaxPool3d", "MaxUnpool1d", "MaxUnpool2d", "MaxUnpool3d", "interpolate", "ReflectionPad1d",
    "ReflectionPad2d", "ReflectionPad3d", "NLLLoss", "CTCLoss", "EmbeddingBag", "put_", "histc", "bincount", "median",
    "grid_sample", "cumsum", "scatter_reduce", "resize_",
}  # fmt: skip
ALIASES = {
    "avg_pool3d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool2d", "fractional_max_pool2d",
    "fractional_max_pool3d", "max_unpool1d", "max_unpool2d", "max_unpool3d", "upsample", "Upsample", "nll_loss",
    "cross_entropy", "CrossEntropyLoss", "ctc_loss", "embedding_bag", "nanmedian", "cumsum_", "cumprod",
    "scatter_reduce_", "kthvalue",
}  # fmt: skip

# The permitted uses, by file and operation, and why each is permitted.
LEGAL = {
    ("model/router.py", "EmbeddingBag"): "mode is mean",
    ("model/losses/vocabulary.py", "cross_entropy"): "single process only; does not raise in one dimension",
    ("model/losses/ctc.py", "ctc_loss"): "called only if deterministic algorithms are off",
    ("trainer/evaluation/offline/decode.py", "cumsum"): "integers",
    ("model/encoders/qwen3_asr.py", "ReflectionPad1d"): "only its gradient raises an error, and waveforms have none",
    ("trainer/telemetry/trace.py", "median"): "on the CPU, without indices",
    ("trainer/engine/whole_weights.py", "resize_"): "method of a storage; only that of tensors raises an error",
    ("model/losses/next_token.py", "cross_entropy"): "calls that of `Vocabulary` or, on several ranks, Megatron's",
}


def uses(source: str) -> Iterator[str]:
    """Yield the names of all called functions, except for those of NumPy and statistics."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        if isinstance(function, ast.Attribute):
            owner = function.value
            if not (isinstance(owner, ast.Name) and owner.id in ("np", "statistics")):
                yield function.attr
        elif isinstance(function, ast.Name):
            yield function.id
        for keyword in node.keywords:  # F.pad(…, mode="reflect")
            if keyword.arg == "mode" and isinstance(keyword.value, ast.Constant) and keyword.value.value == "reflect":
                yield "ReflectionPad1d"


def test_list_equals_torchs_documentation() -> None:
    text = (torch.use_deterministic_algorithms.__doc__ or "").split("operations will throw a\n")[1]
    text = text.split("In addition")[0]
    named = {name.rpartition(".")[2] for name in re.findall(r"\* :(?:class|func):`([\w.]+)`", text)}
    assert named == DOCUMENTED


@pytest.mark.slow
def test_no_new_use_of_an_operation_that_raises_in_deterministic_mode() -> None:
    found = {
        (str(path.relative_to(ROOT)), name)
        for package in ("model", "trainer")
        for path in (ROOT / package).rglob("*.py")
        for name in uses(path.read_text(encoding="utf-8"))
        if name in DOCUMENTED | ALIASES
    }
    assert found == set(LEGAL), (sorted(found - set(LEGAL)), sorted(set(LEGAL) - found))


def test_uses_are_detected() -> None:
    source = "x.histc(4)\nnp.bincount(a)\nF.ctc_loss(b)\nnn.AvgPool3d(2)\nF.pad(c, (1, 1), mode='reflect')\nmedian(d)"
    assert [n for n in uses(source) if n in DOCUMENTED | ALIASES] == [
        *("histc", "ctc_loss", "AvgPool3d", "ReflectionPad1d", "median"),
    ]


# The dispatched names of operations whose CUDA kernels raise an error. The test adds cumsum of floating-point values.
ALERTING = re.compile(
    r"aten::(_?ctc_loss_backward|avg_pool3d_backward|_?adaptive_(avg|max)_pool[23]d_backward|"
    r"fractional_max_pool[23]d_backward|max_unpool[23]d|upsample_\w+_backward|reflection_pad[123]d_backward|"
    r"nll_loss2d_\w+|put_?|histc|bincount|median|grid_sampler_[23]d_backward|scatter_reduce|kthvalue)$"
)


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_step_of_all_parts_dispatches_no_operation_that_raises_on_cuda() -> None:
    (found,) = run_ranks(1, dispatched, timeout_sec=150)
    names = {name for name, _ in found}
    assert {"aten::_scaled_dot_product_flash_attention_for_cpu_backward", "aten::convolution_backward"} <= names
    wrong = [name for name, is_float in found if ALERTING.match(name) or (name == "aten::cumsum" and is_float)]
    assert not wrong


def dispatched() -> list[tuple[str, bool]]:
    """Train one step of the tiny model, and return the operations that ran.

    Each operation has a name, and a flag that says whether its first argument is floating point.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    from model.batch import Batch
    from trainer.parallel.groups import build_groups, connect
    from trainer.parallel.topology import Topology
    from trainer.parity import build_step
    from trainer.parity_cases import DS_CONFIG, SEED, make_samples, tiny_model

    seen: Counter[tuple[str, bool]] = Counter()

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            is_float = bool(args) and isinstance(args[0], torch.Tensor) and args[0].is_floating_point()
            seen[func._schema.name, is_float] += 1
            return func(*args, **(kwargs or {}))

    rank, _, device = connect()
    with deterministic_kernels(True):
        groups = build_groups(Topology(1, 1, 1), rank, device, SEED)
        model = tiny_model()
        step = build_step(model, groups, DS_CONFIG, 1)
        (samples,) = make_samples("mixed", 1, model.adapter.rate)
        with Recorder():
            report = step(0, Batch(tuple(samples)))
    assert 0 < report.losses["ctc"] < 100
    torch.distributed.destroy_process_group()
    return list(seen)
