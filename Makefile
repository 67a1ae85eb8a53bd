.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TESTS ?=
OLDER := .venv-transformers-4/.ready
CLIENTS := huggingface_hub==0.36.2 huggingface_hub==1.33.0 huggingface_hub==2.4.0 openai==1.109.1 openai==3.57.0 \
  standardwebhooks==1.1.0 openapi-python-client==0.29.1 mlflow==3.17.2 arize-phoenix==20.26.1 \
  kubernetes-validate==1.37.0

.PHONY: help setup demo up test test-clients older browser screenshots lint bench chaos migrate format constraints

help: ## Shows this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

setup: $(READY) ## Makes .venv with everything, at the pinned versions

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade --constraint constraints.txt pip setuptools wheel
	$(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup ## Runs one whole job over HTTP, from data to a downloaded int8 model
	$(BIN)/python examples/demo.py

up: setup ## Starts the whole stack on this machine, with an embedded Postgres and Redis
	$(BIN)/stillhouse up

test: setup ## Runs every test, or TESTS; set STILLHOUSE_DATABASE_URL and STILLHOUSE_REDIS_URL to use servers
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(TESTS)

test-clients: setup $(OLDER) ## Drives this server by the clients of others, each version in an environment of its own; needs npm
	for client in $(CLIENTS); do \
	  test -x .venv-clients/$$client/bin/python || $(PYTHON) -m venv .venv-clients/$$client; \
	  .venv-clients/$$client/bin/pip install --quiet $$client || exit 1; done
	npm ci --prefix tests/clients/typescript --ignore-scripts --no-audit --no-fund
	$(BIN)/python -m pytest tests/clients -rs

$(OLDER):
	test -x .venv-transformers-4/bin/python || $(PYTHON) -m venv .venv-transformers-4
	.venv-transformers-4/bin/pip install --quiet torch==2.13.0 transformers==4.57.6
	touch $@

older: setup $(OLDER) ## Reads folders as jobs write them with transformers 4.57, in an environment of its own
	$(BIN)/python -m pytest tests/e2e/test_transformers_4.py -rs

browser: setup ## Runs the web page and ONNX forms in Chromium, which must be installed, and npm with it
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,browser]'
	npm ci --prefix tests/e2e/browser --ignore-scripts --no-audit --no-fund
	$(BIN)/python -m pytest tests/e2e/test_browser.py tests/e2e/test_page.py -rs

screenshots: ## Makes docs/page anew, while it drives the web page as `make browser` does
	mkdir -p docs/page
	STILLHOUSE_SCREENSHOTS=docs/page $(MAKE) browser

lint: setup ## Checks style, types, import contracts and sizes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest tests/architecture

format: setup ## Formats the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup ## Measures Banking77 against a plain script, classifiers against TextBrewer and a Trainer, language models against TRL, pruning and quantising against four libraries, losses, the API under load, and a large file read by many; writes bench/out/
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,bench]'
	missed=0; for name in banking77 encoder causal_lm compressing loss_alone loss_on_gpu load readers; do \
	  $(BIN)/python bench/$$name.py || missed=1; done; exit $$missed

chaos: setup ## Runs the long tests: what kills processes, and jobs of settings drawn at random
	$(BIN)/python -m pytest tests/chaos -m chaos -n 2 --maxschedchunk 1

migrate: setup ## Brings the database of STILLHOUSE_DATABASE_URL to the newest schema
	$(BIN)/python -c 'import migrations; migrations.upgrade()'

constraints: setup ## Writes constraints.txt from the installed environment
	{ echo "# Every version that is installed together; made by 'make constraints' from an environment that passed the tests."; \
	  $(BIN)/pip freeze --all --exclude-editable | sed 's/+cpu//'; } > constraints.txt
