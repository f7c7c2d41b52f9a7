# Everything a newcomer needs: `make demo`, `make test`. Both build the environment in .venv first, if it is not there.

PYTHON ?= python3
SEED ?= 0
QUARTER ?= 0
BUDGET ?= 540
OUT ?= runs/gpu
REAL ?= ../shared/data/prostate
MODELS ?= ../shared/models
OTHER ?=
PYTHON_VERSION ?= 3.12
PACKAGES ?=
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: help env demo demo-check test test-all test-quarter lint docs gpu gpu-kit clean

help:
	@echo "make demo      build the environment and run the whole pipeline on procedural tissue (SEED=0); report in runs/demo/"
	@echo "make test      build the environment and run the quick tests"
	@echo "make test-all  the quick and the slow tests"
	@echo "make lint      ruff, mypy, import-linter"
	@echo "make docs      the documentation as a site, in site/index.html; opens without a server"
	@echo "make gpu       on a machine with a GPU: does everything run there, what does it make, how fast is it (BUDGET=540 seconds, OUT=runs/gpu)"
	@echo "make gpu-kit   what a compute node without a connection needs, in kit-dist/ (docs/offline.md)"
	@echo "make clean     remove runs/ (the environment stays)"

env: $(STAMP)

$(STAMP): pyproject.toml requirements/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "latent-medi needs Python 3.11 or newer; set PYTHON=/path/to/python3.11" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint requirements/constraints.txt --editable '.[dev]'
	touch $@

demo: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/latent-medi demo --seed $(SEED)

demo-check: $(STAMP)
	$(BIN)/python tests/end_to_end/check_headline.py runs/demo/headline.json

test: $(STAMP)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m 'not slow and not gpu and not weights' tests

test-all: $(STAMP) lint
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --durations 40 -m 'not gpu and not weights' tests

test-quarter: $(STAMP)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m slow --slow-quarter $(QUARTER) tests

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy benchmarks
	$(BIN)/lint-imports

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "open site/index.html"

gpu: $(STAMP)
	$(BIN)/python benchmarks/gpu.py --budget $(BUDGET) --out $(OUT) $(GPU)

gpu-kit: $(STAMP)
	$(BIN)/python benchmarks/kit/build.py --out kit-dist --real '$(REAL)' --models '$(MODELS)' $(OTHER:%=--other '%') --python $(PYTHON_VERSION) $(PACKAGES:%=--package %)

clean:
	rm -rf runs
