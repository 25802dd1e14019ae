# Everything runs in the clone's own .venv; a plain `make demo` or `make test` sets it up first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What is installed: Cleave to run it, or with the tools of its developers as well.
READY := $(VENV)/.ready
DEV := $(VENV)/.dev
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
ROOMS := losses deployment architectures datamodules planning lightning_modules reports scripts
# Processes that run the tests; a file's tests stay together, as they share what they have trained.
WORKERS ?= 2
PYTEST = pytest -n $(WORKERS) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help install say-cpu demo test test-full lint types format dist pins lowest clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## */\t/' | expand -t 14

install: $(DEV)  ## create .venv and install Cleave with its development tools

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else f"Cleave needs Python 3.11 to 3.13, found {v[0]}.{v[1]}; try: make $(MAKECMDGOALS) PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(READY): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e .
	@touch $@

$(DEV): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[dev]'
	@touch $(READY) $@

# pip reads PIP_EXTRA_INDEX_URL itself; make hands it on, from the environment or from its own command line.
say-cpu:
	@if [ "$$(uname -s)" = Linux ] && ! nvidia-smi -L >/dev/null 2>&1 && [ -z "$$PIP_EXTRA_INDEX_URL" ] \
	    && { [ ! -e $(READY) ] || ls -d $(VENV)/lib/python*/site-packages/nvidia >/dev/null 2>&1; }; then \
	  echo "No NVIDIA GPU was found. Without 4 GB of CUDA libraries: rm -rf $(VENV); make demo PIP_EXTRA_INDEX_URL=URL, with the URL that https://pytorch.org/get-started/locally/ shows for pip on Linux with CPU"; \
	fi

demo: say-cpu $(READY)  ## train a teacher and a split model on real digits, export and run them (about 5 minutes)
	$(BIN)/python scripts/demo.py

test: $(DEV)  ## run the tests with coverage (7 to 17 minutes on two cores)
	$(BIN)/python -m slipcover --json --out .coverage.json -m $(PYTEST) -m "not slow"
	@$(BIN)/python -m slipcover --merge .coverage.json --out .coverage.json --fail-under 93

test-full: $(DEV)  ## run every test, the slow ones included
	$(BIN)/python -m $(PYTEST)

lint: types  ## check style and types
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(DEV)  ## check types
	$(BIN)/mypy $(addprefix -p cleave.,$(ROOMS))

format: $(DEV)  ## format the code and mend what can be mended
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

# What an earlier build left would go into the wheels, and what this one leaves would be taken for code.
LEFT := build deployment/build deployment/*.egg-info
dist: $(READY)  ## build the wheels of cleave and cleave-runtime into dist/
	rm -rf dist $(LEFT)
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist . ./deployment; \
	  status=$$?; rm -rf $(LEFT); exit $$status
	@ls dist

pins:  ## bring constraints.txt up to the newest versions that pyproject.toml allows (needs uv)
	(head -n 1 constraints.txt; uv pip compile --quiet --universal --upgrade --no-annotate --no-header --no-emit-index-url \
	  --no-emit-find-links --python-version 3.11 --extra dev pyproject.toml) > constraints.new
	mv constraints.new constraints.txt

lowest:  ## create .venv with the lowest versions that pyproject.toml allows, to run `make test` with them (needs uv)
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	uv pip install --quiet --python $(BIN)/python --resolution lowest-direct -e '.[dev]'
	@touch $(READY) $(DEV)

clean:  ## remove what was built and every log
	rm -rf $(VENV) dist *.egg-info $(LEFT) logs bundles .pytest_cache .mypy_cache .ruff_cache .coverage.json
