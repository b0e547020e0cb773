# `make demo` and `make test` set up everything on a machine with Python 3.11 or newer; `make help` lists the rest.
# The newest Python that starts; PYTHON=… chooses another. Every version below comes from uv.lock.
PYTHON ?= $(shell for python in python3.13 python3.12 python3.11; do $$python -c '' 2>/dev/null && echo $$python && break; done)
SCALE ?= tiny
VENV ?= .venv
BIN := $(VENV)/bin
export JAX_PLATFORMS ?= cpu
# See llama2_jax/memory.py.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.arena_max=1:glibc.malloc.trim_threshold=16000000000

.PHONY: help demo test slow core docs setup lock
help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/ -/'

setup: $(VENV)/core  ## the environment that training needs, in .venv

PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

$(VENV)/core: requirements.txt pyproject.toml uv.lock
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.txt
	$(PIP) --no-deps -e .
	touch $@

$(VENV)/locked.txt: $(VENV)/core
	$(PIP) uv==0.13.9
	$(BIN)/uv export --quiet --frozen --all-extras $(EXPORT) --output-file $@

$(VENV)/torch: $(VENV)/locked.txt
	$(PIP) --constraint $(VENV)/locked.txt -e '.[torch]'
	touch $@

$(VENV)/tests: $(VENV)/torch
	$(PIP) --constraint $(VENV)/locked.txt -e '.[test]'
	touch $@

$(VENV)/docs: $(VENV)/locked.txt
	$(PIP) --constraint $(VENV)/locked.txt -e '.[docs]'
	touch $@

EXPORT := --no-hashes --no-emit-project --no-annotate --no-header

lock: $(VENV)/locked.txt  ## the newest versions that pyproject.toml admits become those of uv.lock and requirements.txt
	$(BIN)/uv lock --upgrade
	(echo '# What the tests ran with, for `pip install -r`: exported from uv.lock by `make lock`; pyproject.toml has the ranges.'; \
	  $(BIN)/uv export --quiet --frozen $(EXPORT)) >requirements.txt

demo: $(VENV)/torch  ## the whole recipe on the toy world, from raw text to an aligned chat model in PyTorch
	PATH="$(BIN):$$PATH" experiments/demo.sh $(SCALE)

test: $(VENV)/tests  ## ruff, ty, and all tests but the slow ones
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ty check --quiet --python $(VENV)
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations=20 -m 'not slow'

slow: $(VENV)/tests  ## the slow tests: real sizes compiled for TPU pods, wide layers converted, processes killed, notebooks, the README's commands
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations=20 -m slow

docs: $(VENV)/docs  ## the site of docs/, in site/; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# What shows that a line of versions works: the model, its meshes, its files, sampling, PPO, the package, the TPU compiler.
CORE := tests/test_parity.py tests/test_sharding.py tests/train/test_checkpoint.py tests/inference/test_engine.py \
  tests/rl/test_ppo_stage.py tests/test_loss_traces.py tests/test_package.py tests/test_aot.py

core: $(VENV)/tests  ## the tests of the core alone: `make core VENV=.venv-3.13 PYTHON=python3.13` tries other versions
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not slow' $(CORE)
