# `make demo` and `make test` each work on a fresh clone; no virtual environment needs to be active.
# PYTHON=…   the interpreter to build .venv with (3.11 or newer)
# ARGS=…     passed on: make test ARGS="-k manifest -x", make demo ARGS=--json
# SECONDS=…  for how long make fuzz tries each target (20)
# They are read by the recipes below or by tools/setup.sh.

PYTHON ?=
ARGS ?=
SECONDS ?= 20
export PYTHON

BIN := .venv/bin
READY := .venv/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test check lint format format-check types fuzz lab scale bench clean

help:                  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' Makefile

setup: $(READY)        ## build .venv; does nothing when it is up to date

demo: $(READY)         ## the whole thing on this machine: peers train one policy, and one of them is killed
	@$(BIN)/shoal demo --kill-one $(ARGS)

test: $(READY)         ## the test suite, in three parts side by side; with ARGS those tests alone
	@tools/test.sh $(ARGS)

check: lint format-check types  ## what CI runs beside the tests

lint: $(READY)         ## ruff, and the shell scripts' syntax
	@$(BIN)/ruff check .
	@bash -n tools/setup.sh
	@bash -n tools/test.sh
	@bash -n .ci/run

format: $(READY)       ## rewrite the sources in the house format
	@$(BIN)/ruff format .

format-check: $(READY)
	@$(BIN)/ruff format --check .

types: $(READY)        ## mypy, strict
	@$(BIN)/mypy

fuzz: .venv/.with-fuzz  ## every decoder against made-up bytes, SECONDS each
	@$(BIN)/python tests/fuzz/run.py --seconds $(SECONDS) $(ARGS)

lab: $(READY)          ## real nodes: every pair of NAT kinds, and what heals (root)
	@$(BIN)/python tests/lab/run.py $(ARGS)
	@$(BIN)/python tests/lab/scenarios.py

scale: .venv/.with-tasks  ## what joining brings: nodes of limited, unequal size learn one policy (root)
	@$(BIN)/python tests/lab/scale.py $(ARGS)

bench: .venv/.with-peers  ## every benchmark, one after the other
	@set -e; for file in $(or $(sort $(wildcard benchmarks/*.py)),none); do \
		if [ $$file = none ]; then echo "there are no benchmarks/*.py yet"; exit 1; fi; \
		$(BIN)/python $$file $(ARGS); \
	done

clean:                 ## delete caches and build outputs (.venv stays; delete it by hand)
	@rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml tools/setup.sh
	@tools/setup.sh

.venv/.with-%: $(READY)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --editable '.[$*]'
	@touch $@

# A virtual environment whose interpreter is gone or whose tree was moved is out of date, whatever its age.
ifneq ($(shell test -x $(BIN)/python && test "$$(cat $(READY) 2>/dev/null)" = "$$(pwd -P)" && echo yes),yes)
.PHONY: $(READY)
endif
