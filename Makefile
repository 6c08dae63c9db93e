# The two commands of the README, and those of everyday work. Each sets itself up; nothing has to be installed before.
PYTHON ?= python3
BIN := .venv/bin
RUN := $(BIN)/python -m

.PHONY: demo test check format setup setup-dev golden clean

demo: setup  ## train a small DeepSeek-style model on real text, evaluate it, write a report
	$(BIN)/fathom demo

test: setup-dev  ## all tests, on the CPU, offline
	$(RUN) pytest -n auto --dist worksteal tests

check: setup-dev  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(RUN) mypy

format: setup-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

golden: setup-dev  ## write the golden losses anew (say why in the commit)
	$(RUN) tests.golden.write

setup:
	@$(PYTHON) bootstrap.py

setup-dev:
	@$(PYTHON) bootstrap.py --extras dev

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
