# Each target does its own set-up: a virtual environment with prunegym and its development tools, renewed when
# pyproject.toml changes and left alone otherwise.
#
#   make demo                     the whole path on embedded data
#   make test                     lint, types and tests
#   make test PYTHON=python3.12   with another Python (3.11 or newer)
#   make test VENV=/path/to/venv  in another environment; it is made if it is not there

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin
# Named after this clone, so that an environment shared by two clones never tests the wrong one.
STAMP := $(VENV)/.prunegym-$(shell pwd | cksum | cut -d' ' -f1)

.DEFAULT_GOAL := help
.PHONY: help demo test lint types clean

help:
	@sed -n 's/^#   //p' Makefile

demo: $(STAMP)
	$(RUN)/prunegym demo

# Threads are left to PyTorch: OMP_NUM_THREADS from the caller's shell would make timings and results incomparable.
test: lint types
	env -u OMP_NUM_THREADS -u MKL_NUM_THREADS $(RUN)/python -m pytest

lint: $(STAMP)
	$(RUN)/ruff check
	$(RUN)/ruff format --check

types: $(STAMP)
	$(RUN)/python -m mypy

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "PYTHON should be Python 3.11 or newer. Received $(PYTHON)" \
	    "($$($(PYTHON) --version 2>&1 || true)). Name another: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@# asking for pip also repairs an environment whose making was interrupted
	$(RUN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --disable-pip-version-check -e '.[dev]'
	@rm -f $(VENV)/.prunegym-* && touch $@
