# Each target sets up .venv by itself from pinned requirements and rebuilds the native modules when they changed.
#
#   make bench   the main job: what compression buys on this machine; tables, report/bench.json, report/index.html
#   make test    all tests
#   make lint    ruff, mypy, clang-format
#   make sanitize  the CPU kernels' tests with the address and undefined-behaviour sanitizers
#   make gpu     on a machine with a GPU: build, tests and suites on CUDA (benchmarks/gpu.sh)

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
NATIVE := setup.py pyproject.toml $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: bench test lint format sanitize gpu clean

bench: $(VENV)/.built
	$(BIN)/pyfast bench --json report/bench.json --report report

test: $(VENV)/.built
	$(BIN)/pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 'tests/simt/*.cpp' 'tests/simt/*.h' 'tests/simt/*.cuh')

format: $(VENV)/.built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 'tests/simt/*.cpp' 'tests/simt/*.h' 'tests/simt/*.cuh')

# The package of build/sanitize, found before the installed one, is this checkout's Python with modules of its own. The
# interpreter is not sanitized: the runtime is loaded ahead of it, and what Python itself keeps is no leak of ours.
SANITIZED := build/sanitize
SANITIZED_TESTS := host sparse_linear sparse_again sparse_int8 indexed_linear sparse_formats bitmap_convert epilogue nm_mask distill_kl distill_kl_apart divergences topk_distill

sanitize: $(VENV)/.built
	mkdir -p $(SANITIZED)/pyfast
	ln -sfn $(CURDIR)/triton_kernels $(SANITIZED)/pyfast/triton_kernels
	find pyfast -mindepth 1 -maxdepth 1 ! -name '*.so' -exec ln -sfn $(CURDIR)/{} $(SANITIZED)/{} \;
	PYFAST_SANITIZE=1 PYFAST_CUDA=0 $(BIN)/python setup.py -q build_ext --build-lib $(SANITIZED) --build-temp build/sanitize-temp
	LD_PRELOAD=$$(g++ -print-file-name=libasan.so):$$(g++ -print-file-name=libubsan.so) ASAN_OPTIONS=detect_leaks=0 \
	  PYTHONPATH=$(SANITIZED) $(BIN)/pytest -q --capture=sys -p no:cacheprovider $(SANITIZED_TESTS:%=tests/test_%.py)

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
