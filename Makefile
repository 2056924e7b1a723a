# Every target works on a machine that has only python3 (3.11 or 3.12), make and git.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help quickstart ablate test test-slow test-gpu mutation lint format clean

help:  ## show this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "  make %-12s %s\n", $$1, $$2}'

$(READY): setup.cfg constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v >= (3, 11) else "pgl needs Python 3.11 or newer, but $(PYTHON) is %d.%d: run make PYTHON=python3.12 ..." % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

quickstart: $(READY)  ## train, average, quantise, pack and score a small model on this CPU (under 6 minutes)
	$(BIN)/pgl fit --config configs/quickstart.yaml

ablate: $(READY)  ## CONFIG="recipe.yaml overlay.yaml" TRICKS="xsa smear_gate" [SEEDS="1 2"] [GPUS=4] [FIT="options"]
	$(BIN)/pgl ablate $(foreach file,$(CONFIG),--config $(file)) $(if $(TRICKS),--off $(TRICKS)) \
		$(if $(SEEDS),--seeds $(SEEDS)) $(if $(GPUS),--gpus $(GPUS)) $(if $(OUT),--out $(OUT)) -- $(FIT)

test: $(READY)  ## the fast tests
	$(BIN)/python -m pytest

test-slow: $(READY)  ## the slow tests as well
	$(BIN)/python -m pytest -m "not gpu"

test-gpu: $(READY)  ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

mutation: $(READY)  ## does a fast test fail for each of 119 single mistakes in the numeric cores?
	$(BIN)/python tests/mutation/run.py

lint: $(READY)  ## ruff: lint and format check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)  ## ruff: fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment and caches (never checkpoints or data)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
