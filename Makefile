# Each target sets up what it needs. `make demo` and `make test` are all a fresh machine with Python needs.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin
DEMO := outputs/demo
# `accelerate launch` gives a process on a CPU one thread unless it is told otherwise
CORES := $(shell getconf _NPROCESSORS_ONLN)

.PHONY: setup demo test lint bench

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,data,interop,trackers]'
	touch $@

demo: setup
	OMP_NUM_THREADS=$(CORES) $(RUN)/accelerate launch --quiet --config_file accelerate_config.yaml scripts/train.py configs/demo.yaml \
		--output_dir $(DEMO) --overwrite_output_dir
	$(RUN)/python scripts/eval.py --model $(DEMO) --baseline recipe/demo/base --split test test_unseen \
		--output_dir $(DEMO)-eval --overwrite_output_dir
	@echo "Loss over steps: $(DEMO)/loss.png   How it was made: $(DEMO)/run.json"

test: setup
	$(RUN)/python -m pytest

# a quarter of an hour on two cores; docs/performance.md has the command for all of it
bench: $(VENV)/.installed-bench
	$(RUN)/python benchmarks/benchmark.py --output outputs/benchmark/quick.json --minutes 15 --rounds 1 --steps 4 \
		--only batch_8 batch_32 startup preprocessing generation --records 20000 \
		--contenders recipe_shared_prefix recipe_padded trainer_by_length trl_by_length plain_loop

$(VENV)/.installed-bench: $(VENV)/.installed
	$(RUN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,data,interop,trackers,bench]'
	touch $@

lint: setup
	$(RUN)/ruff format --check .
	$(RUN)/ruff check .
	$(RUN)/mypy
