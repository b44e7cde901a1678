# `make demo` and `make test` do all set-up themselves; they need Python 3.11 or newer, pip and make.

# The first of these that runs and is new enough; PYTHON=... chooses another.
PYTHON ?= $(shell for p in python3.11 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BENCH ?= quick
# Options of `python -m benchmarks`, such as ROWS="--rows 'product*' --workload W1".
ROWS ?=
RUN := $(VENV)/bin
STAMP := $(VENV)/.stamp
DOCS_STAMP := $(VENV)/.stamp-docs
# The libraries that we are compared with have requirements of their own, hence an environment too.
BENCH_VENV ?= .venv-bench
BENCH_STAMP := $(BENCH_VENV)/.stamp

.PHONY: demo test lint bench docs clean

demo: $(STAMP)
	$(RUN)/neuromanifold demo --out report.html

test: lint
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -q -W error -n auto --maxprocesses 4
	$(RUN)/python -m pytest -q -W error --markdown-docs --markdown-docs-syntax=superfences README.md docs

lint: $(STAMP)
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

bench: $(BENCH_STAMP)
	BENCH=$(BENCH) $(BENCH_VENV)/bin/python -m benchmarks $(ROWS)

docs: $(DOCS_STAMP)
	$(RUN)/zensical build --strict

clean:  # what the other targets left behind; virtual environments stay
	rm -rf site report.html dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(STAMP): pyproject.toml constraints.txt
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo \
	  "neuromanifold needs Python 3.11 or newer. Install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Setting up $(VENV): about a minute, once."
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

$(BENCH_STAMP): pyproject.toml constraints.txt benchmarks/requirements.txt
	$(PYTHON) -m venv $(BENCH_VENV)
	$(BENCH_VENV)/bin/python -m pip install -q -c constraints.txt torch
	$(BENCH_VENV)/bin/python -m pip install -q -c constraints.txt -r benchmarks/requirements.txt -e '.[demo]'
	$(BENCH_VENV)/bin/python -m pip uninstall -q -y torchvision  # see benchmarks/requirements.txt
	@touch $@

$(DOCS_STAMP): $(STAMP)
	$(RUN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	@touch $@
