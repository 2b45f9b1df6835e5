# The one list of commands. `make` alone explains them. GNU make and Python 3.11 or newer are all they need.
#
# VENV=…    another place for the virtual environment (no spaces in it)
# PYTHON=…  the interpreter that makes it
# PORT=…    where `make serve` listens
# EXTRA=…   the image: cpu or gpu
# BUILDER=… what builds it: docker, podman or buildah; BUILD_FLAGS=… for it

VENV ?= .venv
PYTHON ?= python3
PORT ?= 8000
EXTRA ?= cpu
BUILDER ?= $(notdir $(firstword $(wildcard $(foreach tool,docker podman buildah,$(addsuffix /$(tool),$(subst :, ,$(PATH)))))))
BUILD_FLAGS ?=

# One stamp for each set of packages, newer than what it was installed from. Development contains serving.
CREATED := $(VENV)/.created
SERVING := $(VENV)/.serving
DEVELOPMENT := $(VENV)/.development
PINS := pyproject.toml constraints.txt
INSTALL := $(VENV)/bin/python -m pip install --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL: # two pips in one environment would trip over each other
.PHONY: help setup serve test bench-smoke ray-test ablations peers lint format lock image image-test sbom

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' Makefile

setup: $(DEVELOPMENT) ## .venv with everything for development

serve: $(SERVING) ## set up what serving needs, and serve on PORT=8000
	$(VENV)/bin/dvt serve --port $(PORT)

test: lint ## set up, check style, types and import contracts, and run the tests
	$(VENV)/bin/python -m pytest

ray-test: $(VENV)-ray/.made ## the examples on a real Ray of this machine, in an environment of their own, five minutes at most
	timeout 300 $(VENV)-ray/bin/python -m pytest tests/examples

bench-smoke: $(DEVELOPMENT) ## every benchmark in small: figures appear and add up (a part of the tests)
	$(VENV)/bin/python -m pytest tests/benchmarks tests/server/bench/test_measure.py

ablations: $(DEVELOPMENT) ## train the paper's ablations in small: hours. TRAIN=… TEST=… image folders
	$(VENV)/bin/python -m benchmarks.ablations $(TRAIN) $(TEST) runs/ablations --out

peers: $(DEVELOPMENT) ## other servers beside this one: installs them in build/peers, and races. PEERS=… options
	$(VENV)/bin/python -m benchmarks.peers $(PEERS) --out

lint: $(DEVELOPMENT) ## ruff, mypy, import-linter and hadolint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/hadolint Dockerfile

format: $(DEVELOPMENT) ## let ruff put imports and layout right
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# What an image installs, with the hash of every file: constraints.txt, as far as the image needs it.
LOCK := $(VENV)/bin/uv --no-config pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
	--custom-compile-command 'make lock' --constraint constraints.txt
LOCKS := deploy/requirements

lock: $(DEVELOPMENT) ## deploy/requirements/*.txt anew from pyproject.toml and constraints.txt
	$(LOCK) --only-binary :all: pyproject.toml --extra cpu --extra kubernetes -o $(LOCKS)/cpu.txt
	$(LOCK) --only-binary :all: pyproject.toml --extra cpu --extra gpu-trt --extra kubernetes \
		--override $(LOCKS)/without-tensorrt.txt --no-emit-package tensorrt-cu13 -o $(LOCKS)/gpu.txt
	$(LOCK) --no-deps $(LOCKS)/tensorrt.in -o $(LOCKS)/tensorrt.txt
	$(LOCK) --only-binary :all: $(LOCKS)/build.in -o $(LOCKS)/build.txt
	$(LOCK) --only-binary :all: $(LOCKS)/sbom.in -o $(LOCKS)/sbom.txt

image: ## the container image dvt-serve:EXTRA
	@$(NEED_BUILDER)
	$(BUILD) --build-arg EXTRA=$(EXTRA) --tag dvt-serve:$(EXTRA) .

sbom: ## dist/dvt-serve.cdx.json: what the image dvt-serve:EXTRA consists of
	@$(NEED_BUILDER)
	$(BUILD) --build-arg EXTRA=$(EXTRA) --target sbom --output type=local,dest=dist .

image-test: $(DEVELOPMENT) ## build the image and run it: buildah and podman, as root. PYTHON_IMAGE=… another base
	PATH="$(abspath $(VENV))/bin:$$PATH" deploy/test_image.sh

# Of podman and buildah, images of Docker's format: the other one has no health check.
BUILD = $(BUILDER) build $(if $(filter docker,$(BUILDER)),,--format docker) $(BUILD_FLAGS)
NEED_BUILDER = test -n "$(BUILDER)" || { echo "make image needs docker, podman or buildah, and none is here" >&2; exit 1; }

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

# Ray is large, wants versions of its own, and is nobody's but the examples'.
$(VENV)-ray/.made: $(PINS)
	$(PYTHON) -m venv $(VENV)-ray
	$(VENV)-ray/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[cpu]' \
		'ray[serve,data]>=2.60,<3' 'pytest>=9,<10' 'pytest-asyncio>=1.2,<2' 'hypothesis>=6.140,<7'
	@touch $@
