# Everything a newcomer needs: `make demo`, `make test`. Both build the environment in .venv first, if it is not there.

PYTHON ?= python3
SEED ?= 0
QUARTER ?= 0
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: help env demo demo-check test test-all test-quarter lint clean

help:
	@echo "make demo      build the environment and run the whole pipeline on procedural tissue (SEED=0); report in runs/demo/"
	@echo "make test      build the environment and run the quick tests"
	@echo "make test-all  the quick and the slow tests"
	@echo "make lint      ruff, mypy, import-linter"
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
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m 'not slow and not gpu' tests

test-all: $(STAMP) lint
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m 'not gpu' tests

test-quarter: $(STAMP)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m slow --slow-quarter $(QUARTER) tests

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf runs
