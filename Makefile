# Every word sets up what it needs by itself. PYTHON: interpreter for .venv; CONSTRAINTS: exact versions (CPU set-up).
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
BIN := .venv/bin
export PYTHONPATH := $(CURDIR)
# DeepSpeed compiles with ninja from the environment; without torchvision nothing of ours is missing.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: setup smoke test lint bench bench-quick

setup: .venv/.installed

.venv/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev]'
	touch $@

smoke: setup
	$(BIN)/twinflow data demo outputs/digits
	$(BIN)/twinflow model tiny outputs/tiny_qwen --preset digits
	$(BIN)/twinflow train configs/smoke.yaml

test: lint
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup
	$(BIN)/python -m tests.benchmarks.run

bench-quick: setup
	$(BIN)/python -m tests.benchmarks.run --quick
