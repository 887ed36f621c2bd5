PYTHON ?= python

.PHONY: setup test lint format quickstart

setup:  ## this package, its tests and linters, into the active environment
	$(PYTHON) -m pip install -c constraints.txt -e ".[dev]"

test:
	$(PYTHON) -m pytest

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

format:
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

quickstart:
	$(PYTHON) train.py fit --config configs/quickstart.yaml
