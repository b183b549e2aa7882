# Two commands: `make train` runs the quickstart, `make test` the whole test suite. Each makes .venv first if needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Everything an install depends on; a stamp is older than these when the environment must be brought up to date.
SETUP := pyproject.toml setup.py constraints.txt $(wildcard csrc/*)

.PHONY: train test setup lint clean

train: setup
	$(BIN)/tso-fast train

test: $(VENV)/.test
	$(BIN)/pytest

setup: $(VENV)/.run

lint: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

$(VENV)/.run: $(SETUP)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt $(BIN)/pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.test: $(VENV)/.run
	PIP_CONSTRAINT=constraints.txt $(BIN)/pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info tso_fast/*.so
