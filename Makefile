# Everything a user runs; versions come from constraints.txt.
PYTHON ?= python3
# Where pip finds the CPU build of torch; without it, Linux gets the CUDA build.
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: serve retrain test test-slow lint audit clean

serve: $(VENV)/.service
	@ORT_DISABLE_TELEMETRY=1 OPENBLAS_NUM_THREADS=1 exec $(BIN)/useg-serve

retrain: $(VENV)/.dev  # PHOTOS=folder [REGISTRY=folder] [RETRAIN="--activate --truth SET"]
	PATH="$(CURDIR)/$(BIN):$$PATH" deploy/retrain.sh $(PHOTOS) $(REGISTRY) $(RETRAIN)

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal  # two processes beat two threads

test-slow: $(VENV)/.dev  # exports, killed runs, whole command lines: what `make test` leaves out
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m slow

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

audit: $(BIN)/python  # asks PyPI which of the pinned versions have known holes
	$(PIP) pip-audit
	$(BIN)/pip-audit --requirement constraints.txt --no-deps --disable-pip

clean:
	rm -rf $(VENV)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "useg needs Python 3.11 or newer; set PYTHON=" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.service: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --no-compile --editable '.[service]'  # 40 MB less on disk
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) $(TORCH_INDEX:%=--extra-index-url %) --editable '.[service,train,dev]'
	@touch $@ $(VENV)/.service
