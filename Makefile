# Two commands do everything on a fresh machine: `make deploy` and `make test`. Both make .venv/ first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# edgeprune alone, and with what its tests, linters and every target of theirs need.
INSTALLED := $(VENV)/.installed
EQUIPPED := $(VENV)/.equipped
EXTRAS := dev,gpu,trt-check,tvm
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# Threads that spin while they wait starve whatever else runs on a small machine.
export OMP_WAIT_POLICY := PASSIVE

# benchmarks/searchers.py is not among them: it takes more than an hour and needs data that is not part of edgeprune.
BENCHMARKS := startup cutting evaluation search_overhead measurement candidate_cost board_instructions tvm_cpu

.PHONY: deploy test lint bench clean

deploy: $(INSTALLED)
	$(BIN)/edgeprune deploy --config examples/fashion/edgeprune.toml --target host --budget 0.5x --out dist/

test: lint
	sh tests/install-chromium
	sh tests/install-openssh
	sh tests/install-compiler
	sh deploy/emulated/setup --python $(BIN)/python
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(EQUIPPED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/basedpyright
	$(BIN)/lint-imports

bench: $(EQUIPPED)
	sh deploy/emulated/setup --python $(BIN)/python
	set -e; for each in $(BENCHMARKS); do echo "== $$each"; $(BIN)/python benchmarks/$$each.py; done

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	touch $@

$(EQUIPPED): $(INSTALLED)
	$(PIP) -e '.[$(EXTRAS)]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
