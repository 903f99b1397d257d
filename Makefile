# Each target sets up .venv by itself from pinned requirements and rebuilds the native modules when they changed.
#
#   make bench   the main job: what compression buys on this machine; tables, report/bench.json, report/index.html
#   make test    all tests
#   make lint    ruff, mypy, clang-format
#   make gpu     on a machine with a GPU: build, tests and suites on CUDA (benchmarks/gpu.sh)

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
NATIVE := setup.py pyproject.toml $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: bench test lint format gpu clean

bench: $(VENV)/.built
	$(BIN)/pyfast bench --json report/bench.json --report report

test: $(VENV)/.built
	$(BIN)/pytest

lint: $(VENV)/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 'tests/simt/*.cpp' 'tests/simt/*.h' 'tests/simt/*.cuh')

format: $(VENV)/.built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 'tests/simt/*.cpp' 'tests/simt/*.h' 'tests/simt/*.cuh')

gpu:
	bash benchmarks/gpu.sh

clean:
	rm -rf $(VENV) build dist report *.egg-info pyfast/*.so

$(VENV)/.installed: .ci/requirements.txt .ci/requirements-data.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r .ci/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r .ci/requirements-data.txt
	touch $@

$(VENV)/.built: $(VENV)/.installed $(NATIVE)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@
