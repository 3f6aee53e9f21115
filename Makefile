# `make train` trains a small mixture of experts in minutes; `make test` and `make check` are what CI runs.
PYTHON ?= python3
RANKS ?= 2
BIN := .venv/bin

.PHONY: train test slow check clean

train: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node $(RANKS) -m moescale train configs/quickstart.yaml parallel.ep=$(RANKS)

test: .venv/installed  # two workers, each with one core; tests of ranks start up to four processes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

slow: .venv/installed
	$(BIN)/python -m pytest -m slow

check: .venv/installed
	$(BIN)/ruff check
	$(BIN)/mypy

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "MoEScale needs Python 3.11 or newer: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,wandb,trace]'
	touch $@

clean:
	rm -rf .venv runs
