# The same verbs for people and CI. Everything happens in .venv and build/; `make clean` removes both.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PORT ?= 8080
# MODEL and DEVICE are chosen where they are not given: the demo model, and the GPU if there is one
MODEL ?=
DEVICE ?=
# more options for the program that a verb runs, for example ARGS="-k tokenizer" or ARGS="--max-seqs 8"
ARGS ?=

BIN := .venv/bin
WHEELS := build/wheel
# the tree holds no compiled modules: nothing may import the package from here
export PYTHONSAFEPATH := 1
SOURCES := setup.py pyproject.toml tools/build_cuda.py tools/gen_params.py \
  $(shell find csrc pyx worker_orcd wsgi -type f ! -name '*.so' ! -path '*/fatbins/*' ! -path '*/__pycache__/*')
INSTALLED := .venv/.installed$(if $(WORKER_ORCD_CUDA_ARCHS),-$(WORKER_ORCD_CUDA_ARCHS))
# what clang-format looks at
CPP := $(shell find csrc tests -name '*.h' -o -name '*.c' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help serve test test-gpu bench lint format sanitize sanitize-cpu wheel install clean
.DELETE_ON_ERROR:

help: ## what can be made
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 24
	@echo "  Settings: MODEL=file.gguf PORT=8080 DEVICE=cpu|cuda:0 ARGS=... WORKER_ORCD_CUDA_ARCHS=all|ptx|90a,..."

serve: $(INSTALLED) ## install, fetch the demo model if no MODEL is given, serve it over HTTP
	@model="$(MODEL)"; [ -n "$$model" ] || model=$$($(BIN)/worker-orcd demo-model); \
	device="$(DEVICE)"; \
	if [ -z "$$device" ]; then \
	  if $(BIN)/python -m worker_orcd.diagnose.doctor; then device=cuda:0; \
	  else device=cpu; echo "There is no usable GPU here: serving on the CPU (--device cpu)." >&2; fi; fi; \
	exec $(BIN)/worker-orcd serve --model "$$model" --device "$$device" --port $(PORT) --print-curl $(ARGS)

# a part of the tests, ARGS="tests/chat", runs a part of the lines: only all of them are measured
test: $(INSTALLED) .venv/.tested ## the tests that need no GPU, and how much of the package they run
	@rm -rf build/coverage
	$(BIN)/python -m pytest -m "not gpu" $(or $(ARGS),--cov --cov-report=)
	@$(if $(ARGS),,$(BIN)/python tools/coverage_by_room.py)

test-gpu: $(INSTALLED) .venv/.tested ## the tests that need a GPU
	WORKER_ORCD_REQUIRE_GPU=1 $(BIN)/python -m pytest -m gpu $(ARGS)

bench: $(INSTALLED) ## prefill and decode speed of MODEL (default: the demo model)
	@model="$(MODEL)"; [ -n "$$model" ] || model=$$($(BIN)/worker-orcd demo-model); \
	exec $(BIN)/worker-orcd bench --model "$$model" $(if $(DEVICE),--device $(DEVICE)) $(ARGS)

lint: .venv/.tested ## ruff, mypy, clang-format and cython-lint: all that they find, changing nothing
	@failed=; run() { echo "$$1"; "$${@:2}" || failed="$$failed $$1,"; }; \
	run "ruff check" $(BIN)/ruff check .; \
	run "ruff format" $(BIN)/ruff format --check .; \
	run "mypy" tools/check_types.sh; \
	run "clang-format" $(BIN)/clang-format --dry-run --Werror $(CPP); \
	PATH="$(CURDIR)/$(BIN):$$PATH" run "cython-lint" cython-lint pyx; \
	[ -z "$$failed" ] || { echo "Not clean:$${failed%,} (make format writes what can be written)." >&2; exit 1; }

format: .venv/.tested ## write Python, C++ and CUDA in the tree's format
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

sanitize: $(INSTALLED) .venv/.tested ## compute-sanitizer's four tools over the GPU tests
	tools/sanitize_gpu.sh $(ARGS)

sanitize-cpu: .venv/.tested ## hostile files and the way of tokens to clients, on extensions built with ASan and UBSan
	tools/sanitize_cpu.sh $(ARGS)

wheel: .venv/.python ## a wheel for every supported GPU, in dist/
	WORKER_ORCD_CUDA_ARCHS=$${WORKER_ORCD_CUDA_ARCHS:-all} tools/build_wheel.sh dist

install: $(INSTALLED) ## the package, not editable, in .venv

clean: ## remove everything that was made here
	rm -rf build dist .venv *.egg-info .pytest_cache .ruff_cache .hypothesis

.venv/.python:
	@for p in $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11; do \
	  if "$$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "Making .venv with $$($$p --version)." >&2; "$$p" -m venv .venv; touch $@; exit 0; fi; done; \
	echo "No Python >= 3.11 with its venv module was found; install one (on Debian: apt-get install python3-venv)" \
	     "or name it: make PYTHON=/path/to/python" >&2; exit 1

$(INSTALLED): .venv/.python $(SOURCES)
	@rm -rf $(WHEELS)
	tools/build_wheel.sh $(WHEELS)
	@echo "Installing it with its libraries." >&2
	@$(BIN)/pip install -q --disable-pip-version-check --no-deps --force-reinstall $(WHEELS)/*.whl
	@$(BIN)/pip install -q --disable-pip-version-check $(WHEELS)/*.whl
	@rm -f .venv/.installed*; touch $@

.venv/.tested: .venv/.python pyproject.toml
	@echo "Installing the test tools." >&2
	@$(BIN)/python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	  print(*p["dependencies"], *p["optional-dependencies"]["test"], sep="\n")' > .venv/test-requirements.txt
	@$(BIN)/pip install -q --disable-pip-version-check -r .venv/test-requirements.txt || \
	  { echo "The test tools could not be installed (the extra \"test\" of pyproject.toml)." >&2; exit 1; }
	@touch $@
