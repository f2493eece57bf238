# Everything a clone needs: `make test`, `make demo`. Only Python 3.11 to 3.13, git and make have to be there before.
#
# PYTHON       the interpreter the virtual environment is made from (python3.11 where there is one, else python3)
# TORCH_INDEX  optional: URL of a package index with CPU-only torch wheels; without it pip takes torch from wherever its own
#              configuration points, which on a plain machine is the much larger CUDA build
# ARGS         passed on: make demo ARGS="--help", make bench ARGS="--json"

PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH_INDEX ?=
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# The stamp records which files the environment was built from; touching any of them rebuilds it.
STAMP := $(VENV)/.modelp2p-installed
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
INDEX := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
# Generations of huggingface_hub that users have, beside the newest one in $(VENV): one environment for each list of versions.
CLIENTS := $(patsubst tests/clients/%.txt,.venv-clients/%/.installed,$(wildcard tests/clients/*.txt))
# The files with swarm tests: collecting all the others costs each worker ten seconds.
SWARM = $(shell grep --recursive --files-with-matches --include='test_*.py' 'mark\.swarm' tests)
say = @echo "==> $(1)"

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-swarm test-gpu lint check format bench clean
# Steps share one environment and one machine's ports: never run two of them at once.
.NOTPARALLEL:

help:
	@echo "make demo    two nodes on this machine: publish, fetch, verify, load (ARGS=... is passed on)"
	@echo "make test    everything: check, fast tests, swarm tests, the demo"
	@echo "make check   formatting, lint, types"
	@echo "make bench   the benchmarks of tests/bench (BENCH=name for one)"
	@echo "make clean   remove what make built"

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No python3 found; set PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	  || { echo "$(PYTHON) is not Python 3.11 to 3.13; set PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(call say,virtual environment $(VENV) from $(PYTHON))
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	$(call say,build tools)
	@$(PIP) install --constraint constraints.txt pip setuptools
	$(call say,modelp2p and everything it needs (some minutes the first time))
	@$(PIP) install --constraint constraints.txt --no-build-isolation $(INDEX) --editable '.[torch,test,dev]'
	@touch $@

.venv-clients/%/.installed: tests/clients/%.txt | $(STAMP)
	$(call say,client environment $(@D))
	@"$(PYTHON)" -m venv --clear --without-pip $(@D)
	@$(PIP) --python $(@D)/bin/python install --no-deps --requirement $<
	@touch $@

demo: $(STAMP)
	@$(BIN)/modelp2p demo $(ARGS)

# Types are checked beside the swarm tests, which mostly wait.
test: lint test-fast
	@$(BIN)/mypy & types=$$!; $(MAKE) --no-print-directory test-swarm; swarm=$$?; wait $$types && exit $$swarm
	$(call say,demo)
	@$(BIN)/modelp2p demo $(ARGS)

test-fast: $(STAMP) $(CLIENTS)
	$(call say,fast tests)
	@$(BIN)/python -m pytest -q -m "not swarm and not gpu" -n 2 $(PYTEST)

test-swarm: $(STAMP) $(CLIENTS)
	$(call say,swarm tests (real libtorrent on loopback))
	@$(BIN)/python -m pytest -q -m "swarm and not gpu and not slow" -n 3 --dist loadfile $(SWARM) $(PYTEST)
	$(call say,swarm tests that count time or bytes per second (two at a time))
	@$(BIN)/python -m pytest -q -m "swarm and slow and not gpu" -n 2 --dist loadfile $(SWARM) $(PYTEST)

test-gpu: $(STAMP)
	$(call say,GPU tests)
	@$(BIN)/python -m pytest -q -m gpu $(PYTEST)

lint: $(STAMP)
	$(call say,ruff format)
	@$(BIN)/ruff format --check --quiet .
	$(call say,ruff check)
	@$(BIN)/ruff check --quiet .

check: lint
	$(call say,mypy)
	@$(BIN)/mypy --num-workers 2

format: $(STAMP)
	@$(BIN)/ruff format --quiet .
	@$(BIN)/ruff check --quiet --fix .

bench: $(STAMP)
	@set -e; for script in tests/bench/bench_$(if $(BENCH),$(BENCH),*).py; do \
	  module=$$(echo "$${script%.py}" | tr / .); \
	  echo "==> $$module"; $(BIN)/python -m "$$module" $(ARGS); \
	done

clean:
	rm -rf $(VENV) .venv-clients build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
