# The one list of commands. `make` alone explains them. GNU make and Python 3.11 or newer are all they need.
#
# VENV=…    another place for the virtual environment (no spaces in it)
# PYTHON=…  the interpreter that makes it
# PORT=…    where `make serve` listens

VENV ?= .venv
PYTHON ?= python3
PORT ?= 8000

# One stamp for each set of packages, newer than what it was installed from. Development contains serving.
CREATED := $(VENV)/.created
SERVING := $(VENV)/.serving
DEVELOPMENT := $(VENV)/.development
PINS := pyproject.toml constraints.txt
INSTALL := $(VENV)/bin/python -m pip install --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL: # two pips in one environment would trip over each other
.PHONY: help setup serve test bench-smoke ablations lint format

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' Makefile

setup: $(DEVELOPMENT) ## .venv with everything for development

serve: $(SERVING) ## set up what serving needs, and serve on PORT=8000
	$(VENV)/bin/dvt serve --port $(PORT)

test: lint ## set up, check style, types and import contracts, and run the tests
	$(VENV)/bin/python -m pytest

bench-smoke: $(DEVELOPMENT) ## every benchmark in small: figures appear and add up (a part of the tests)
	$(VENV)/bin/python -m pytest tests/benchmarks tests/server/bench/test_measure.py

ablations: $(DEVELOPMENT) ## train the paper's ablations in small: hours. TRAIN=… TEST=… image folders
	$(VENV)/bin/python -m benchmarks.ablations $(TRAIN) $(TEST) runs/ablations --out

lint: $(DEVELOPMENT) ## ruff, mypy and import-linter
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

format: $(DEVELOPMENT) ## let ruff put imports and layout right
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

$(CREATED):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or newer is needed, and $(PYTHON) is not: try make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(SERVING): $(CREATED) $(PINS)
	$(INSTALL) -e '.[cpu]'
	@touch $@

$(DEVELOPMENT): $(CREATED) $(PINS)
	$(INSTALL) -e '.[cpu,bench,export,dev]'
	@touch $(SERVING) $@
