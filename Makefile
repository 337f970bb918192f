# What a newcomer types. `make demo` trains a model; `make test` runs the tests.
#
#   PYTHON     the Python that makes the virtual environment (3.11 or newer)
#   VENV       where the environment is made
#   DEMO_TIME  how long `make demo` trains, compilation, scores and report included
#
# pip's own settings (its configuration file, PIP_* variables) hold.

PYTHON ?= python3
VENV ?= .venv
DEMO_TIME ?= 150s

ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
else
BIN := $(VENV)/bin
endif

REQUIREMENTS := pyproject.toml constraints.txt

.PHONY: help venv install demo test test-all lint format docs clean

help:
	@echo "make demo      train a model on the built-in corpus, score it and let it write"
	@echo "make test      run the tests (a few minutes)"
	@echo "make test-all  run the slow proofs too"
	@echo "make install   the environment for development"
	@echo "make lint      ruff and mypy"
	@echo "make format    let ruff rewrite the code"
	@echo "make docs      write the pages that are made from the code"
	@echo "make clean     remove the environment, caches and builds (runs/ stays)"

# The stamps are files, so that a second call installs nothing.
$(VENV)/made:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "cllm needs Python 3.11 or newer; set PYTHON")'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/installed: $(VENV)/made $(REQUIREMENTS)
	$(BIN)/python -m pip install -c constraints.txt -e .
	touch $@

$(VENV)/installed-dev: $(VENV)/made $(REQUIREMENTS)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@ $(VENV)/installed

venv: $(VENV)/made

install: $(VENV)/installed-dev

demo: $(VENV)/installed
	$(BIN)/cllm train --time $(DEMO_TIME)

# Two test processes with one thread each: threads that wait for one another are slow on busy machines.
test: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

test-all: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: $(VENV)/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(VENV)/installed-dev
	$(BIN)/python docs/settings.py

clean:
	rm -rf $(VENV) build dist src/*.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find src tests docs -name __pycache__ -type d -prune -exec rm -rf {} +
