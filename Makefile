# One command for each thing. `make test` and `make bench` share the set-up: .venv with torch, the tools and fastloss.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CPP := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu)
REPORTS ?= reports

.PHONY: setup bench bench-full bench-pytest test stress kernels gpu gpu-memcheck lint format clean

setup: $(VENV)/.ready

$(VENV)/.ready: requirements-dev.txt requirements-peers.txt pyproject.toml setup.py $(CPP)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-peers.txt
	FASTLOSS_REQUIRE_NATIVE=1 $(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

bench: setup
	$(BIN)/python -m fastloss bench --quick --output $(REPORTS)
	$(BIN)/python examples/digits_contrastive.py --output $(REPORTS)

bench-full: setup
	$(BIN)/python -m fastloss bench --full --output $(REPORTS)
	$(BIN)/python -m fastloss.benchmarks.factored_step --output $(REPORTS)/factored_step.json
	$(BIN)/python -m fastloss.benchmarks.distributed --output $(REPORTS)/distributed.json

bench-pytest: setup
	$(BIN)/python -m pytest benchmarks --benchmark-only

# What the Triton kernels need on every chip, candidates of the tuning included. Needs no GPU.
kernels: setup
	$(BIN)/python -m fastloss.kernels --all --output $(REPORTS)

# On a machine with a GPU: its own PyTorch and Triton, nothing is downloaded. Within ten minutes: each part is ended after
# its share of them, keeps what it found in $(REPORTS), and runs whatever became of the one before.
# Compiling kernels is most of the tests' time; pytest-xdist spreads it where it is installed.
GPU_TESTS := tests/test_gpu.py $(wildcard tests/*/triton_values.py)
GPU_SPREAD = $(shell $(PYTHON) -c "import xdist" 2>/dev/null && printf '%s' '-n 12')
ENDED_AFTER := timeout --signal INT --kill-after 15
gpu: SHELL := bash
gpu: .SHELLFLAGS := -o pipefail -c
gpu: export MAX_JOBS ?= 16
gpu:
	$(PYTHON) -m pip install --quiet --no-deps --no-build-isolation -e .
	$(PYTHON) -m fastloss info
	mkdir -p $(REPORTS); failed=0; \
	TORCHINDUCTOR_COMPILE_THREADS=1 $(ENDED_AFTER) 180 \
	  $(PYTHON) -m pytest -q -W default --durations 10 $(GPU_SPREAD) $(GPU_TESTS) 2>&1 | tee $(REPORTS)/gpu-tests.txt || failed=1; \
	$(ENDED_AFTER) 320 $(PYTHON) -m fastloss bench --device cuda --output $(REPORTS) || failed=1; \
	exit $$failed

# Many times slower than the tests alone.
gpu-memcheck:
	compute-sanitizer --error-exitcode 1 --target-processes all \
	  $(PYTHON) -m pytest -q -W default tests/contrastive/triton_values.py -k "columns_at_every_edge"

test: lint
	$(BIN)/python -m pytest

# The tests of several processes, 50 times with all cores busy.
stress: setup
	$(BIN)/python -m tests.stress 50

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

clean:
	rm -rf build *.egg-info fastloss/_C*.so fastloss/_cuda*.so $(VENV)
