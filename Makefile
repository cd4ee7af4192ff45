# `make demo` and `make test` set everything up themselves; both can be run again and again.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two workers whatever the machine: each holds torch and a few tiny models, and the tests start processes of their own.
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup --no-loadscope-reorder --durations 10
WORKERS ?= 2
export SFT_HOME ?= $(CURDIR)/.sft
export DAGSTER_HOME := $(CURDIR)

.PHONY: help install demo test test-all ui lint bench data clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "== installing into $(VENV) (a few minutes the first time)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.11"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

install: $(VENV)/.installed  ## the virtual environment

demo: install  ## the embedded default, from raw rows to an exported model
	@echo "== sft run access_policy_lora (results in $(SFT_HOME))"
	@$(BIN)/sft run access_policy_lora

test: install  ## every promise at least once, in about eight minutes on 2 cores
	@$(PYTEST) -m "not slow"

test-all: install  ## every test, the slow ones too: the whole demo, all of GSM8K, many kills
	@$(PYTEST)

ui: install  ## the Dagster and MLflow UIs on loopback
	@$(BIN)/sft ui

lint: install  ## style and types
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

bench: install  ## side by side with peers; see bench/RESULTS.md
	@for script in data_plane train kills; do $(BIN)/python bench/$$script.py || exit 1; done

data: install  ## make the embedded snapshots and base model again
	@$(BIN)/python data/make_access_policy.py && $(BIN)/python data/pretrain_base_model.py

clean:  ## remove everything the pipeline wrote (not the virtual environment)
	rm -rf $(SFT_HOME)
