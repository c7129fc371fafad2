# make quickstart | test | test-fast | lint: each creates .venv first, with the newest of python3.13, python3.12 and python3.11 that
# works here. PYTHON=... selects another interpreter, 3.11 to 3.13; if its version differs from that of .venv, .venv is recreated.
BIN := .venv/bin

.PHONY: quickstart test test-fast lint

quickstart: .venv/runtime
	$(BIN)/python -m pspnet_jax.main --config configs/quickstart.py

WORKERS := -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: .venv/dev
	$(BIN)/python -m pytest $(WORKERS)

test-fast: .venv/dev
	$(BIN)/python -m pytest $(WORKERS) -m "not slow"

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

ifdef PYTHON
ifneq ($(shell $(PYTHON) -V 2>/dev/null),$(if $(wildcard $(BIN)/python),$(shell $(BIN)/python -V)))
.PHONY: .venv/runtime
CLEAR := --clear
endif
else  # runs each candidate, because pyenv's commands may exist but fail, and Debian has ensurepip in a separate package
PYTHON = $(shell for p in python3.13 python3.12 python3.11; do $$p -c 'import ensurepip' 2>/dev/null && echo $$p && break; done)
endif

# An environment that has tensorflow is recreated, because tensorflow-cpu, which replaces it there, has the same files.
ifeq ($(shell uname -sm),Linux x86_64)
ifneq ($(wildcard .venv/lib/python3.*/site-packages/tensorflow-*.dist-info),)
CLEAR := --clear
endif
endif

.venv/runtime: requirements.txt pyproject.toml
	@test "$(PYTHON)" || { echo "error: no python3.13, python3.12 or python3.11 that runs and has ensurepip (Debian, Ubuntu:" \
	  "apt install python3.12-venv); name one: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo "error: $(PYTHON) does not run, or is not Python 3.11 to 3.13; name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(CLEAR) .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/dev: .venv/runtime
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@
