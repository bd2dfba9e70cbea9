# Two commands start from nothing but Python and make: `make demo` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
BENCH := analysis/benchmarks
WORKERS ?= 3

.PHONY: demo test test-all lint bench bench-gpu browser clean

demo: $(INSTALLED)
	$(BIN)/lora-search run sweeps/demo.yaml

test: $(INSTALLED)
	$(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not slow and not gpu" --durations=15

test-all: $(INSTALLED)
	$(BIN)/pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The last takes five minutes; with the 10,000 trials of cluster/SCALE.md, whose figures stay, it would be half an hour.
bench: $(INSTALLED)
	$(BIN)/python $(BENCH)/orchestration.py --json $(BENCH)/orchestration.json
	$(BIN)/python $(BENCH)/wandb_faults.py --json $(BENCH)/wandb_faults.json
	$(BIN)/python $(BENCH)/steady_state.py --json $(BENCH)/steady_state.json
	$(BIN)/python $(BENCH)/whole_sweep.py --setting demo --json $(BENCH)/whole_sweep_demo.json
	$(BIN)/python $(BENCH)/whole_sweep.py --setting e2e --json $(BENCH)/whole_sweep_e2e.json
	$(BIN)/python $(BENCH)/whole_sweep.py --setting asha --json $(BENCH)/whole_sweep_asha.json
	$(BIN)/python $(BENCH)/memory.py --json $(BENCH)/memory.json
	$(BIN)/python $(BENCH)/merge.py --json $(BENCH)/merge.json
	$(BIN)/python $(BENCH)/read_results.py --json $(BENCH)/read_results.json
	$(BIN)/python $(BENCH)/scale.py --trials 125 500 2000 --gpus 8

# On a machine with a GPU of 80 GB; bases shaped like well-known ones, of random weights.
bench-gpu: $(INSTALLED)
	for shape in 0.5b 1b 8b; do \
		$(BIN)/python $(BENCH)/steady_state.py --device cuda --base $$shape-shape --batch-size 1 \
			--seconds 1 --rounds 3 --json $(BENCH)/steady_state_cuda_$${shape}_1.json || exit 1; \
	done
	$(BIN)/python $(BENCH)/steady_state.py --device cuda --base 1b-shape --seconds 1 --rounds 3 \
		--json $(BENCH)/steady_state_cuda_1b_4.json
	$(BIN)/python $(BENCH)/steady_state.py --device cuda --base 8b-shape --seconds 1 --rounds 3 --packs 1 2 4 8 \
		--checkpointing --json $(BENCH)/steady_state_cuda_8b_4.json

# Chromium, for the tests of the report's page, which skip without one. As root, from Debian's packages.
browser:
	apt-get update && apt-get install --yes --no-install-recommends chromium fonts-dejavu-core

clean:
	rm -rf $(VENV) *.egg-info .mypy_cache .pytest_cache .ruff_cache

# The stamp is older than its sources where something has to be installed anew.
# Torch stands alone: its exact version picks a CPU build where one is offered, an open range the newest with CUDA.
# uv takes a third of pip's time for the rest; pip, where an index is one that only pip's own configuration names.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lora-search needs Python 3.11 or later")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $$(grep -E '^(torch|uv)==' constraints.txt)
	$(BIN)/uv pip install --quiet --system-certs --compile-bytecode --python $(BIN)/python -c constraints.txt -e '.[dev]' \
		|| $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
