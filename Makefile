# `make demo` and `make test` set up everything on a machine with Python 3.11 or newer; `make help` lists the rest.
# The newest Python that starts; PYTHON=… chooses another. Every version below comes from uv.lock.
PYTHON ?= $(shell for python in python3.13 python3.12 python3.11; do $$python -c '' 2>/dev/null && echo $$python && break; done)
SCALE ?= tiny
BIN := .venv/bin
export JAX_PLATFORMS ?= cpu
# See llama2_jax/memory.py.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.arena_max=1:glibc.malloc.trim_threshold=16000000000

.PHONY: help demo test slow setup lock
help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/ -/'

setup: .venv/core  ## the environment that training needs, in .venv

PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.venv/core: requirements.txt pyproject.toml uv.lock
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	$(PIP) --no-deps -e .
	touch $@

.venv/locked.txt: .venv/core
	$(PIP) uv==0.13.9
	$(BIN)/uv export --quiet --frozen --all-extras $(EXPORT) --output-file $@

.venv/torch: .venv/locked.txt
	$(PIP) --constraint .venv/locked.txt -e '.[torch]'
	touch $@

.venv/tests: .venv/torch
	$(PIP) --constraint .venv/locked.txt -e '.[test]'
	touch $@

EXPORT := --no-hashes --no-emit-project --no-annotate --no-header

lock: .venv/locked.txt  ## the newest versions that pyproject.toml admits become those of uv.lock and requirements.txt
	$(BIN)/uv lock --upgrade
	(echo '# What the tests ran with, for `pip install -r`: exported from uv.lock by `make lock`; pyproject.toml has the ranges.'; \
	  $(BIN)/uv export --quiet --frozen $(EXPORT)) >requirements.txt

demo: .venv/torch  ## the whole recipe on the toy world, from raw text to an aligned chat model in PyTorch
	PATH="$(BIN):$$PATH" experiments/demo.sh $(SCALE)

test: .venv/tests  ## ruff, and all tests but the slow ones
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations=20 -m 'not slow'

slow: .venv/tests  ## the slow tests: real sizes compiled for TPU pods, wide layers converted, processes killed, notebooks, the README's commands
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations=20 -m slow
