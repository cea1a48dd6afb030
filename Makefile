# Everything a person or CI runs. Only Python 3.11+ and make are needed beforehand.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export ORT_DISABLE_TELEMETRY = 1
export FLWR_TELEMETRY_ENABLED = 0
export FLWR_DISABLE_UPDATE_CHECK = 1

.PHONY: help demo test lint check bench clean
help:
	@echo "make demo    install into $(VENV) and run the whole platform on this machine (about two minutes)"
	@echo "make test    install into $(VENV) and run every test; uses each real server it finds"
	@echo "make lint    ruff, strict types, import contracts"
	@echo "make check   lint, then the fast tests"
	@echo "make bench   run the benchmarks and redraw the tables in docs/benchmarks.md"
	@echo "make clean   remove $(VENV) and caches"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "atoll needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12"; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "could not create $(VENV); on Debian and Ubuntu install the package python3-venv first"; exit 2; }

$(VENV)/.run: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[all]'
	@touch $@

$(VENV)/.test: $(VENV)/.run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@

$(VENV)/.bench: $(VENV)/.test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	@touch $@

demo: $(VENV)/.run
	$(BIN)/atoll demo $(DEMO_ARGS)

# Tests wait for processes and timers a third of their time, so three workers keep two cores busy.
test: $(VENV)/.test
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(TEST_ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m 'not slow'

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks.all

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build ./*.egg-info
