# Two commands start from nothing but Python and make: `make demo` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-all lint bench clean

demo: $(INSTALLED)
	$(BIN)/lora-search run sweeps/demo.yaml

test: $(INSTALLED)
	$(BIN)/pytest -m "not slow and not gpu"

test-all: $(INSTALLED)
	$(BIN)/pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/python analysis/benchmarks/orchestration.py

clean:
	rm -rf $(VENV) *.egg-info .mypy_cache .pytest_cache .ruff_cache

# The stamp is older than its sources where something has to be installed anew.
# Torch stands alone: its exact version picks a CPU build where one is offered, an open range the newest with CUDA.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lora-search needs Python 3.11 or later")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
