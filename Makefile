# varstream's tasks. `make` lists them.
#
# Without PYTHON, everything runs in .venv, made and filled when missing. With PYTHON=/path/to/python
# that interpreter is used as it is, and only varstream itself is installed into it.

SHELL := /bin/bash

ifeq ($(origin PYTHON), undefined)
  PYTHON := .venv/bin/python
  ENVIRONMENT := .venv/.requirements
else
  ENVIRONMENT :=
endif

# One stamp per interpreter; the editable install only needs repeating when compiled parts change or
# the environment asks for another build.
STAMPS := build/stamps
OPTIONS := $(foreach v,VARSTREAM_CUDA VARSTREAM_CUDA_ARCHS VARSTREAM_NVCC CUDACXX,$(v)=$($(v)))
INSTALLED := $(STAMPS)/$(subst /,_,$(PYTHON)).installed
SOURCES := CMakeLists.txt pyproject.toml \
  $(shell find csrc -type f \( -name '*.h' -o -name '*.c*' -o -name '*.in' \))
CXX_FILES := $(shell find csrc tests/cpp -type f \
  \( -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \))

# Files of tests side by side, where pytest-xdist is installed.
JOBS ?= 2
PARALLEL = $(if $(shell $(PYTHON) -c "import xdist; print(1)" 2> /dev/null),-n $(JOBS) --dist loadfile)

CLANG_FORMAT = $(or $(wildcard $(dir $(PYTHON))clang-format),clang-format)

.DEFAULT_GOAL := help
.PHONY: help env demo test lint format docs gpu clean FORCE

help: ## List the tasks
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16

env: $(INSTALLED) ## Make .venv when missing and install varstream into it

.venv/.requirements: requirements-dev.txt requirements-cutlass.txt
	@test -x .venv/bin/python || python3 -m venv .venv
	.venv/bin/python -m pip install --quiet -r requirements-dev.txt
	.venv/bin/python -m pip install --quiet --no-deps -r requirements-cutlass.txt
	@touch $@

# Written only when the options change.
$(STAMPS)/options: FORCE
	@mkdir -p $(STAMPS)
	@cmp -s $@ <(echo '$(OPTIONS)') || echo '$(OPTIONS)' > $@

$(INSTALLED): $(ENVIRONMENT) $(SOURCES) $(STAMPS)/options
	$(PYTHON) -m pip install --no-build-isolation --no-deps -e .
	@mkdir -p $(STAMPS) && touch $@

demo: $(INSTALLED) ## Train a small model, packed and streamed, and compare (DATA=path for own text)
	$(PYTHON) -m varstream demo $(if $(DATA),--data "$(DATA)")

test: $(INSTALLED) ## Run the tests (those that need a GPU are left out where there is none)
	$(PYTHON) -m pytest -q $(PARALLEL)

lint: $(INSTALLED) ## Check style and types, change nothing
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(CLANG_FORMAT) --dry-run -Werror $(CXX_FILES)

format: $(INSTALLED) ## Format all sources
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
	$(CLANG_FORMAT) -i $(CXX_FILES)

docs: $(INSTALLED) ## Build the documentation, build/docs/index.html
	$(PYTHON) -m sphinx -W --keep-going -q -b html docs build/docs
	@echo "build/docs/index.html"

gpu: ## On a machine with a GPU: build, test, sanitize, measure into bench/results (STEPS="build test")
	@PYTHON="$(if $(filter command line environment,$(origin PYTHON)),$(PYTHON),python3)" bash bench/gpu.sh $(STEPS)

clean: ## Remove what was built, keep .venv
	rm -rf build dist
