# Chores. `make demo` and `make test` set up everything they need.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
FAST ?=
RECIPE := $(if $(FAST),recipes/finance_fast.yaml,recipes/finance_demo.yaml)

.PHONY: demo test test-all lint base serve clean

demo: base
	$(BIN)/posttrain run $(RECIPE)

base: $(STAMP)
	$(BIN)/posttrain base fetch smollm2-135m

test: $(STAMP) base
	$(BIN)/python -m pytest -m "not slow"

test-all: $(STAMP) base
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check src tests
	$(BIN)/ruff format --check src tests
	$(BIN)/mypy

$(STAMP): pyproject.toml constraints.txt
	scripts/setup "$(PYTHON)" "$(VENV)"

clean:
	rm -rf $(VENV) runs
