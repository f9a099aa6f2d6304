# `make demo` pre-trains a small model on the embedded data; `make test` runs the tests; both install into .venv first.
PYTHON ?= python3
VENV ?= .venv
BUDGET ?= 540
RUN := $(VENV)/bin

.PHONY: demo test lint gpu

# Stamped, so that an interrupted installation is done again. PIP_ARGS: further arguments of pip.
$(VENV)/.installed: setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --upgrade pip
	$(RUN)/python -m pip install --quiet $(PIP_ARGS) -e ".[test]"
	touch $@

# --resume: run again after an interruption, it goes on; after the end, it writes the report anew.
demo: $(VENV)/.installed
	$(RUN)/sclkern pretrain --config configs/demo.yaml --resume

test: $(VENV)/.installed
	$(RUN)/python -m pytest -m "not gpu"

lint: $(VENV)/.installed
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .

# On a GPU machine with nothing installed but torch, transformers, timm, pytest and pytest-benchmark: tests, then the
# benchmarks for what is left of BUDGET seconds.
gpu:
	PYTHONPATH=. $(PYTHON) benchmarks/gpu.py --budget $(BUDGET)
