# `make demo` and `make test` set up everything on a machine with Python 3.11 (or newer); `make help` lists the rest.
PYTHON ?= python3.11
BIN := .venv/bin
export JAX_PLATFORMS ?= cpu

.PHONY: help demo test setup
help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/ -/'

setup: .venv/core  ## the environment that training needs, in .venv

.venv/core: requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

.venv/tests: .venv/core
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@

demo: .venv/core  ## toy world, its tokenizer, pretraining, held-out loss and samples: some minutes on a laptop
	$(BIN)/python experiments/train_tokenizer.py --workdir=demo/tokenizer
	$(BIN)/python experiments/pretrain.py --workdir=demo/pretrain --set tokenizer=demo/tokenizer/tokenizer.model
	$(BIN)/python experiments/generate.py --model=demo/pretrain/model --prompt='Once upon a time' --prompt='Dear' \
		--max_new_tokens=96 --temperature=0.8 --top_p=0.95

test: .venv/tests  ## ruff and all tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2
