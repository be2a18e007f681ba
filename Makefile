# Each target makes the virtual environment if there is none; a second call installs nothing.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
OPTIMUM_VENV ?= .venv-optimum
OPTIMUM_BIN = $(OPTIMUM_VENV)/bin
OPTIMUM_STAMP = $(OPTIMUM_VENV)/.installed
TORCH = $(shell grep '^torch==' constraints.txt)

# What can differ between the two sets of packages and is quick, or is the point of the older one.
OPTIMUM_TESTS = tests/optimum $(addprefix tests/,parity/test_file_equals_model.py \
	parity/test_merged_equals_adapter_on.py parity/test_sdxl_file_in_diffusers.py parity/test_formats_in_diffusers.py test_adapter_file.py \
	test_adapter_file_refusals.py test_base.py test_environments.py test_export.py test_keys.py test_lean.py test_lora.py \
	test_memory.py::test_what_saves_memory_does test_model_folder.py test_sampling.py test_single_file.py \
	test_tokens.py test_training.py test_training_endings.py::test_resumed_run_equals_an_unbroken_one)

.PHONY: help demo test test-optimum lint readme benchmarks-readme clean

help:
	@echo "make demo          the whole job on the embedded base; pictures in dbadapter-demo/"
	@echo "make test          the tests"
	@echo "make test-optimum  those that matter there, with the older packages of dbadapter[optimum]"
	@echo "make lint          ruff, mypy, and whether the README's CLI reference and the table of findings are up to date"
	@echo "make readme        write the README's CLI reference again"
	@echo "make benchmarks-readme  write the table of findings in benchmarks/README.md again"
	@echo "make clean         remove $(VENV), $(OPTIMUM_VENV), dbadapter-demo and caches"

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

# As above; the extra's own pins are those of the constraints.
$(OPTIMUM_STAMP): pyproject.toml constraints-optimum.txt
	@$(OPTIMUM_BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(OPTIMUM_VENV)
	@echo "Installing into $(OPTIMUM_VENV), once; this takes a few minutes"
	@$(OPTIMUM_BIN)/python -m pip install -q -c constraints-optimum.txt $(TORCH)
	@$(OPTIMUM_BIN)/python -m pip install -q -c constraints-optimum.txt -e '.[optimum,test]'
	@$(OPTIMUM_BIN)/python -m pip check
	@touch $(OPTIMUM_STAMP)

test-optimum: $(OPTIMUM_STAMP)
	@$(OPTIMUM_BIN)/python -m pytest -m 'not slow and not gpu' $(OPTIMUM_TESTS)

lint: $(STAMP)
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check .
	@$(BIN)/python -m mypy
	@$(BIN)/python -m cogapp --check README.md
	@$(BIN)/python -m cogapp --check benchmarks/README.md

readme: $(STAMP)
	@$(BIN)/python -m cogapp -r README.md

# From the numbers in benchmarks/results.
benchmarks-readme: $(STAMP)
	@$(BIN)/python -m cogapp -r benchmarks/README.md

clean:
	rm -rf $(VENV) $(OPTIMUM_VENV) dbadapter-demo build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
