# `make demo` and `make test` set up everything on a machine with Python 3.11 (or newer); `make help` lists the rest.
PYTHON ?= python3.11
SCALE ?= tiny
BIN := .venv/bin
export JAX_PLATFORMS ?= cpu
# See llama2_jax/memory.py.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.arena_max=1:glibc.malloc.trim_threshold=16000000000

.PHONY: help demo test slow setup
help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/ -/'

setup: .venv/core  ## the environment that training needs, in .venv

.venv/core: requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

.venv/torch: .venv/core
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[torch]'
	touch $@

.venv/tests: .venv/torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@

demo: .venv/torch  ## the whole recipe on the toy world, from raw text to an aligned chat model in PyTorch
	PATH="$(BIN):$$PATH" experiments/demo.sh $(SCALE)

test: .venv/tests  ## ruff, and all tests but the slow ones
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations=20 -m 'not slow'

slow: .venv/tests  ## the slow tests: real sizes compiled for TPU pods, wide layers converted, processes killed, notebooks, the README's commands
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations=20 -m slow
