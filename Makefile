# `make demo` pre-trains a small model on the embedded data; `make test` runs the tests; both install into .venv first.
PYTHON ?= python3
VENV ?= .venv
BUDGET ?= 400
MODELS ?=
# Processes of pytest, one thread each.
JOBS ?= 2
# Further arguments of pytest in `make test`.
TEST_ARGS ?=
RUN := $(VENV)/bin
OLDEST := $(VENV)/oldest
# Version of Triton of `make static`; the budget is recorded with 3.9.
TRITON ?= 3.9
STATIC_ARGS ?=

.PHONY: demo demo-tasks test test-processes test-data quick test-op test-sanitized test-models record-models test-oldest static lint docs gpu

# Stamped, so that an interrupted installation is done again. PIP_ARGS: further arguments of pip.
$(VENV)/.installed: setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --upgrade pip
	$(RUN)/python -m pip install --quiet $(PIP_ARGS) -e ".[test]"
	touch $@

# --resume: run again after an interruption, it goes on; after the end, it writes the report anew.
demo: $(VENV)/.installed
	$(RUN)/sclkern pretrain --config configs/demo.yaml --resume

# Small real tasks for the model of `make demo`, which is trained first if it is not there. Interrupted, it goes on.
demo-tasks: $(VENV)/.installed
	test -d runs/demo/model || $(MAKE) demo
	PYTHONPATH=. $(RUN)/python -m examples.demo_tasks $(DEMO_TASKS_ARGS)

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -m "not gpu and not models" -n $(JOBS) --dist loadfile \
		--no-loadscope-reorder --ignore tests/processes --ignore tests/real_data $(TEST_ARGS)

# Runs of several processes, which take every core already: one test at a time.
test-processes: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -q -m "not gpu" tests/processes

# Converters, checks and runs on look-alikes of the published data sets.
test-data: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -q -m "not gpu" -n $(JOBS) --dist loadfile tests/real_data

# Tiny models of transformers, timm, open_clip and torch.nn, each fused in every way.
test-models: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -q -m models -n $(JOBS) tests/swapped_models

# Writes what is taken and what is left into the record and docs/swapping_in.md. MODELS: only these, such as BertModel.
record-models: $(VENV)/.installed
	OMP_NUM_THREADS=1 PYTHONPATH=.:tests/helpers $(RUN)/python -m swapped_models.record $(MODELS)

# The quick loop, under two minutes: everything but the tests that are marked slow, which interpret or compile kernels,
# start other processes or train.
quick: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -q -m "not gpu and not slow and not models" -n $(JOBS) --dist loadfile \
		--ignore tests/processes --ignore tests/real_data

# One op, under a minute: its definition, its kernel in the interpreter, and what holds for every op. make test-op OP=name
test-op: $(VENV)/.installed
	@test -f sclkern/tools/specs/$(OP).py || { echo "OP: got '$(OP)', expected an op, such as OP=bias_gelu"; exit 2; }
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -q -m "not gpu" -n $(JOBS) \
		$(or $(wildcard tests/ops/test_$(OP).py tests/ops/test_$(OP)_*.py),$(wildcard tests/ops/test_masking*.py))
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -q -m "not gpu" -n $(JOBS) -k "$(OP) and not in_the_interpreter" \
		tests/ops/test_every_op.py tests/ops/test_checks.py tests/ops/test_explain.py

# All interpreted tests, with every access of the kernels to memory checked (tests/helpers/sanitizer); `make test` leaves
# out the thorough ones.
test-sanitized: $(VENV)/.installed
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(RUN)/python -m pytest -q --sanitize -m "not gpu" -n $(JOBS) --dist loadfile \
		$$(grep -rl --include=*.py "run_in_interpreter(__file__)" tests) tests/nn

# The oldest Triton and transformers that are supported, laid over the same environment (with the newest numpy that this
# Triton's interpreter takes, and what this transformers imports): every kernel obeys the rules on sm_80, sm_90 and
# sm_100 (on all of them by `make static TRITON=3.6`) and is compared with its definition in the interpreter, and models
# are fused. What else the tests of ops hold does not depend on Triton's version, and runs in `make test`.
OLDEST_TESTS := workload masking_op dropout_ids packed_attention cross_attention_forms
test-oldest: $(OLDEST)/.installed
	PYTHONPATH=$(abspath $(OLDEST)) $(RUN)/sclkern bench static --check --apart none
	OMP_NUM_THREADS=1 PYTHONPATH=$(abspath $(OLDEST)) $(RUN)/python -m pytest -n $(JOBS) --dist loadfile \
		-k in_the_interpreter $(OLDEST_TESTS:%=tests/ops/test_%.py)
	OMP_NUM_THREADS=1 PYTHONPATH=$(abspath $(OLDEST)) $(RUN)/python -m pytest -n $(JOBS) --dist loadfile tests/integrations

$(OLDEST)/.installed: $(VENV)/.installed
	$(RUN)/python -m pip install --quiet --no-deps --upgrade $(PIP_ARGS) --target $(OLDEST) "triton==3.6.0" "numpy<2.4" \
		"transformers==5.0.0" "huggingface-hub<2" "tokenizers<=0.23.0" "kernels<0.12" httpx httpcore h11 anyio
	touch $@

# Every kernel compiled without a GPU, for every architecture, with another Triton laid over the environment. TRITON=3.7
static: $(VENV)/triton-$(TRITON)/.installed
	PYTHONPATH=$(abspath $(VENV)/triton-$(TRITON)) $(RUN)/sclkern bench static --check $(STATIC_ARGS)

$(VENV)/triton-$(TRITON)/.installed: $(VENV)/.installed
	$(RUN)/python -m pip install --quiet --no-deps --upgrade $(PIP_ARGS) --target $(@D) "triton==$(TRITON).*"
	touch $@

lint: $(VENV)/.installed
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/codespell
	$(RUN)/pydoclint --quiet sclkern kernels
	$(RUN)/mypy

# The pages of docs/ and the reference of every public docstring as one site, build/docs/index.html. A link that leads
# nowhere, to a page, a heading or a file, is an error; so is a docstring that does not parse.
docs: $(VENV)/.docs-installed
	OMP_NUM_THREADS=1 $(RUN)/python -m sphinx --fresh-env --write-all --quiet --fail-on-warning -c docs/site . build/docs

$(VENV)/.docs-installed: $(VENV)/.installed
	$(RUN)/python -m pip install --quiet $(PIP_ARGS) -e ".[docs]"
	touch $@

# On a GPU machine with nothing installed but torch, transformers, timm, pytest and pytest-benchmark: tests, then the
# benchmarks by priority, within BUDGET seconds. GPU_ARGS: further arguments (--only GROUPS --resume --output FOLDER).
gpu:
	PYTHONPATH=. $(PYTHON) -m benchmarks.gpu --budget $(BUDGET) $(GPU_ARGS)
