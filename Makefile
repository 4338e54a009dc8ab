# Every word sets up what it needs by itself. PYTHON: interpreter for .venv; CONSTRAINTS: exact versions (CPU set-up).
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
BIN := .venv/bin
# BASE, EXTRAS, TORCH_INDEX: what the image is built on and with, see docker/Dockerfile; TAG: its name.
TAG ?= local
REVISION = $(shell git describe --always --abbrev=40 --dirty=+)
COMPOSE = REVISION=$(REVISION) TAG=$(TAG) docker compose --project-name twinflow --project-directory . --file docker/compose.yaml
export PYTHONPATH := $(CURDIR)
# DeepSpeed compiles with ninja from the environment; without torchvision nothing of ours is missing.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: setup smoke test lint bench bench-quick gpu image compose-smoke

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
	tests/launcher/install_slurm.sh
	tests/side_by_side.sh

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup
	$(BIN)/python -m tests.benchmarks.run

bench-quick: setup
	$(BIN)/python -m tests.benchmarks.run --quick

# For a machine with PyTorch and no network; see the head of the script for what may be set, DEVICE=cpu tries it all tiny.
gpu:
	tests/gpu/run.sh

image:
	docker build --file docker/Dockerfile --tag twinflow-trainer:$(TAG) --build-arg REVISION=$(REVISION) \
		$(foreach name,BASE EXTRAS TORCH_INDEX,$(if $($(name)),--build-arg $(name)=$($(name)))) .

compose-smoke:
	$(COMPOSE) up --build --abort-on-container-exit --exit-code-from trainer
	$(COMPOSE) cp trainer:/opt/twinflow/outputs/. outputs/compose
	$(COMPOSE) down
