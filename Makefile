# One command for each thing. `make test` and `make bench` share the set-up: .venv with torch, the tools and fastloss.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CPP := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h)
REPORTS ?= reports

.PHONY: setup bench bench-full bench-pytest test kernels gpu lint format clean

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

bench-pytest: setup
	$(BIN)/python -m pytest benchmarks --benchmark-only

# What the Triton kernels need on every chip, candidates of the tuning included. Needs no GPU.
kernels: setup
	$(BIN)/python -m fastloss.kernels --all --output $(REPORTS)

# On a machine with a GPU: its own PyTorch and Triton, nothing is downloaded. Under ten minutes.
# Compiling kernels is most of the tests' time; pytest-xdist spreads it where it is installed.
GPU_PYTEST = $(PYTHON) -m pytest -q -W default
GPU_SPREAD = $(shell $(PYTHON) -c "import xdist" 2>/dev/null && echo -n 8)
GPU_TESTS := tests/test_gpu.py tests/contrastive/triton_values.py tests/spherical/triton_values.py tests/gaunt/triton_values.py
gpu:
	$(PYTHON) -m pip install --quiet --no-deps --no-build-isolation -e .
	$(PYTHON) -m fastloss info
	$(GPU_PYTEST) $(GPU_SPREAD) $(GPU_TESTS)
	if command -v compute-sanitizer; then compute-sanitizer --error-exitcode 1 --target-processes all \
	  $(GPU_PYTEST) tests/contrastive/triton_values.py -k "columns_at_every_edge"; fi
	$(PYTHON) -m fastloss bench --device cuda --output $(REPORTS)

test: lint
	$(BIN)/python -m pytest

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
	rm -rf build *.egg-info fastloss/_C*.so $(VENV)
