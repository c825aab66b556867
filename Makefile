# Everything a user runs; versions come from constraints.txt.
PYTHON ?= python3
# Where pip finds the CPU build of torch; without it, Linux gets the CUDA build.
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Two processes beat two threads. Commands start two threads each: waiting ones must not spin.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

.PHONY: help serve retrain test test-slow lint audit clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

serve: $(VENV)/.service  ## serve the bundled model on http://127.0.0.1:8000
	@ORT_DISABLE_TELEMETRY=1 OPENBLAS_NUM_THREADS=1 exec $(BIN)/useg serve

retrain: $(VENV)/.dev  ## photos to a new version: PHOTOS=folder [REGISTRY=folder] [RETRAIN="--activate"]
	PATH="$(CURDIR)/$(BIN):$$PATH" deploy/retrain.sh "$$PHOTOS" $${REGISTRY:+"$$REGISTRY"} $(RETRAIN)

test: $(VENV)/.dev  ## run the tests, under 5 minutes on two cores
	$(PYTEST)

test-slow: $(VENV)/.dev  ## run the tests that `make test` leaves out: exports, killed runs, command lines
	$(PYTEST) -m slow

lint: $(VENV)/.dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

audit: $(BIN)/python  ## ask PyPI which of the pinned versions have known vulnerabilities
	$(PIP) pip-audit
	$(BIN)/pip-audit --requirement constraints.txt --no-deps --disable-pip

clean:  ## remove the environment
	rm -rf $(VENV)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "useg needs Python 3.11 or newer; set PYTHON=" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.service: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --no-compile --editable '.[service,heic]'  # 40 MB less on disk
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) $(TORCH_INDEX:%=--extra-index-url %) --editable '.[service,train,heic,dev]'
	@touch $@ $(VENV)/.service
