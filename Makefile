# Everything runs in its own virtual environment, made on first use.
#   make demo    train on 1,797 digits with LFR and without, attack both (no data to download)
#   make test    the tests
#   make help    the rest

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# The stamps say what is installed: a target installs what it needs once, and again when the list
# of requirements changes.
RUN := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
PIP := $(BIN)/python -m pip install --disable-pip-version-check

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv install demo test lint format faults benchmark gpu clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 18

venv: $(BIN)/python  ## an empty virtual environment in VENV (.venv)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "make: $(PYTHON) is older than Python 3.10; try make PYTHON=python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

install: $(RUN)  ## what training and evaluation need

$(RUN): requirements.txt | $(BIN)/python
	$(PIP) -r requirements.txt
	@touch $@

$(DEV): requirements-dev.txt $(RUN)
	$(PIP) -r requirements-dev.txt
	@touch $@

demo: $(RUN)  ## LFR on digits against the same network without it: train, attack, table
	$(BIN)/python -m tools.demo

test: $(DEV)  ## the tests; make test ARGS='tests/test_lfr.py -x' for some
	$(BIN)/python -m pytest $(ARGS)

lint: $(DEV)  ## ruff's checks and its format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(DEV)  ## put the code in ruff's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

faults: $(DEV)  ## fault injection: kill, corrupt and starve runs; minutes
	$(BIN)/python -m tests.faults $(ARGS)

benchmark: $(RUN)  ## the search and the training step against a plain implementation
	$(BIN)/python -m benchmarks.speed $(ARGS)

gpu: $(DEV)  ## tests and timings on a CUDA GPU, minutes; given again, the timings resume
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python -m benchmarks.speed --device cuda --networks small_cnn resnet preact_resnet wrn \
	    --batches 128 512 --dtypes float32 tf32 bfloat16 --layouts channels_last contiguous \
	    --only 'paper search' 'fast step' --output gpu.json $(ARGS)

clean:  ## remove the virtual environment and caches; runs and data stay
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
