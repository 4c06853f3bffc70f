"""Packaging of earshot. `make setup` is the tested way to install; see the README for others."""

from setuptools import find_namespace_packages, setup

setup(
    name="earshot",
    version="0.1.0",
    description="Train speech-text models with several routed audio encoders on DeepSpeed ZeRO-3 and Megatron-core",
    license="Apache-2.0",
    python_requires=">=3.10,<3.13",
    packages=find_namespace_packages(include=["model*", "trainer*", "tools*", "bench*"]),
    package_data={
        "trainer": [
            "recipes/*.yaml",
            "expert_usage/report.html",
            "evaluation/scorecard/report.html",
            "page/base.css",
            "page/elements.js",
        ]
    },
    install_requires=[
        "torch>=2.11,<2.14",
        "deepspeed==0.19.8",  # two engines in one process group lean on its internals: pinned
        "megatron-core==0.16.1",  # likewise
        "transformers>=5.17,<6",
        "safetensors>=0.5",
        "numpy>=1.26",
        "obstore>=0.11,<0.13",
        "xxhash>=3.0",  # checksums of checkpoints
        "soundfile>=0.13",
        "soxr>=0.5",
        "sentencepiece>=0.2.1",
        "jiwer>=4,<5",
        "nltk>=3.9,<4",  # METEOR; WordNet itself comes from the system (Debian: wordnet-base)
        "mlflow>=3.5,<4",
        "pyyaml>=6",
        "tqdm>=4.66",
        "matplotlib>=3.9",  # plots of tools.profile_experts and tools.inspect_shards
    ],
    extras_require={
        "demo": ["espeakng-loader==0.2.4"],  # the voice of `make demo`; espeak-ng is GPL-3.0
        "peers": ["webdataset==1.0.2", "lhotse==1.33.0"],  # what bench.loader compares with
        "dev": [
            "pytest>=8",
            "pytest-timeout",
            "hypothesis",
            "ruff==0.17.6",
            "mypy==2.4.1",
            "types-PyYAML",
            "psutil",
            "scikit-learn",
            "webdataset==1.0.2",  # it must be able to read our shards
        ],
    },
)
