# Everything a person types. `make demo` and `make test` set up what they need.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# Python compiles what is imported, a quarter of 25,000 files: to compile all takes 2 minutes of a slow core.
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile
CONFIG ?= configs/tiny.yaml
PYTEST_ARGS ?=
export DS_BUILD_OPS := 0
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: setup demo serve test check bench bench-demo

setup: $(VENV)/.installed  ## virtual environment with the exact locked versions

$(VENV)/.installed: requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) -r requirements.lock
	$(PIP) --no-deps --no-build-isolation -e .
	touch $@

demo: setup  ## from nothing to a served champion on the embedded data
	$(BIN)/python -m jobs.pipeline --config $(CONFIG) --ask

serve: setup  ## the champion behind an OpenAI-compatible endpoint and a chat page
	$(BIN)/python -m jobs.serve --config $(CONFIG)

test: setup  ## unit tests, then real-cluster tests
	$(BIN)/python -m pytest -n 2 tests/unit $(PYTEST_ARGS)
	$(BIN)/python -m pytest tests/integration $(PYTEST_ARGS)

check: setup  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup  ## speed of training, encoding and preparation beside the machine's limits, in one table
	$(BIN)/python -m benchmarks.table

bench-demo: setup  ## wall time and peak memory of the demo
	$(BIN)/python -m benchmarks.measure_command $(BIN)/python -m jobs.pipeline --config $(CONFIG) --ask
