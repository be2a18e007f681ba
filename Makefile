# Each target makes the virtual environment if there is none; a second call installs nothing.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
TORCH = $(shell grep '^torch==' constraints.txt)

.PHONY: help demo test lint readme clean

help:
	@echo "make demo    the whole job on the embedded base; pictures in dbadapter-demo/"
	@echo "make test    the tests"
	@echo "make lint    ruff, mypy, and whether the README's CLI reference is up to date"
	@echo "make readme  write the README's CLI reference again"
	@echo "make clean   remove $(VENV), dbadapter-demo and caches"

# Torch goes first and alone: pip then takes the build that the machine's own index offers (CPU or CUDA)
# before another package's requirement decides. Without pip inside, the environment was left half made.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, found %d.%d: make PYTHON=python3.12 ..." \
		% sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV), once; this takes a few minutes"
	@$(BIN)/python -m pip install -q -c constraints.txt $(TORCH)
	@$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

demo: $(STAMP)
	@$(BIN)/dbadapter demo

test: $(STAMP)
	@$(BIN)/python -m pytest

lint: $(STAMP)
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check .
	@$(BIN)/python -m mypy
	@$(BIN)/python -m cogapp --check README.md

readme: $(STAMP)
	@$(BIN)/python -m cogapp -r README.md

clean:
	rm -rf $(VENV) dbadapter-demo build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
