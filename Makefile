# `make demo` and `make test` do all set-up themselves; they need Python 3.11 or newer, pip and make.

# The first of these that runs and is new enough; PYTHON=... chooses another.
PYTHON ?= $(shell for p in python3.11 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BENCH ?= quick
RUN := $(VENV)/bin
STAMP := $(VENV)/.stamp
DOCS_STAMP := $(VENV)/.stamp-docs

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

bench: $(STAMP)
	BENCH=$(BENCH) $(RUN)/python -m benchmarks

docs: $(DOCS_STAMP)
	$(RUN)/zensical build --strict

clean:  # what the other targets left behind; the virtual environment stays
	rm -rf site report.html dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(STAMP): pyproject.toml constraints.txt
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo \
	  "neuromanifold needs Python 3.11 or newer. Install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Setting up $(VENV): about a minute, once."
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

$(DOCS_STAMP): $(STAMP)
	$(RUN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	@touch $@
