# Chores. `make demo` and `make test` set up everything they need.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
FAST ?=
WORKS ?=
RECIPE := $(if $(FAST),recipes/finance_fast.yaml,recipes/finance_demo.yaml)

.PHONY: demo test test-all lint bench bench-gpu base serve clean

demo: base
	$(BIN)/posttrain run $(RECIPE)

base: $(STAMP)
	$(BIN)/posttrain base fetch smollm2-135m

test: $(STAMP) base
	$(BIN)/python -m pytest -m "not slow"

test-all: $(STAMP) base
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy

bench: base
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python -m benchmarks $(if $(WORKS),--works $(WORKS))

bench-gpu: base
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python -m benchmarks.gpu

serve: base
	$(BIN)/posttrain serve

$(STAMP): pyproject.toml constraints.txt
	scripts/setup "$(PYTHON)" "$(VENV)"

clean:
	rm -rf $(VENV) runs
