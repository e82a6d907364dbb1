# Everything runs in .venv, which the other targets set up first and again when what it is made from has changed.
VENV := .venv
# Candidates, in order: the first that is Python 3.11 or newer and can make a virtual environment is taken.
PYTHON ?= python3.11 python3.12 python3.13 python3.14 python3
TRITON_VERSION ?= 3.6.0
# 1: use the torch, jax and triton of PYTHON's own site-packages (a GPU machine), and pin nothing.
SYSTEM_SITE ?=
# Test processes; each keeps to one thread.
WORKERS ?= 2

SOURCES := kernels_triton frontend_torch frontend_jax tools tests
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --quiet --disable-pip-version-check
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS)
STAMP := $(VENV)/stamp-$(if $(SYSTEM_SITE),system,triton-$(TRITON_VERSION))

# Only the targets that say so run in Triton's interpreter.
unexport TRITON_INTERPRET

.DEFAULT_GOAL := help
.PHONY: help setup test lint demo compile-check parity clean

help:  ## This list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

setup: $(STAMP)  ## Make .venv (TRITON_VERSION=3.9.0: another Triton; SYSTEM_SITE=1: the machine's own torch and jax)

$(STAMP): pyproject.toml constraints.txt
	@set -e; python=; \
	for candidate in $(PYTHON); do \
	    if $$candidate -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        python=$$candidate; break; \
	    fi; \
	done; \
	if [ -z "$$python" ]; then \
	    echo "setup: needs Python 3.11 or newer with its venv module, found none among: $(PYTHON)" >&2; exit 1; \
	fi; \
	if [ -n "$(SYSTEM_SITE)" ] && ! $$python -c 'import torch' 2>/dev/null; then \
	    echo "setup: SYSTEM_SITE=1 needs a PYTHON that can import torch, got $$python" >&2; exit 1; \
	fi; \
	echo "setup: $(VENV) with $$($$python --version)"; \
	$$python -m venv $(if $(SYSTEM_SITE),--system-site-packages) $(VENV)
	@rm -f $(VENV)/stamp-*
ifdef SYSTEM_SITE
	@$(PIP) install -e '.[torch,jax,test]'
else
# torch first: where a CPU build is on offer that takes it, and what follows finds its range satisfied. A CUDA build of
# torch brings a Triton of its own, which the last line puts back. Without their dependencies: Triton, as that torch
# pins another, and JAX's plugin, which is enough to lower for a GPU and would bring the CUDA libraries.
	@$(PIP) install -c constraints.txt torch
	@$(PIP) install -c constraints.txt --no-deps triton==$(TRITON_VERSION) jax-cuda13-plugin
	@$(PIP) install -c constraints.txt -e '.[torch,jax,test]'
endif
	@touch $@

test: $(STAMP)  ## All tests; those in tests/interpret run the kernels in Triton's interpreter
	@status=0; \
	$(PYTEST) tests --ignore=tests/interpret || status=1; \
	TRITON_INTERPRET=1 $(PYTEST) tests/interpret || status=1; \
	exit $$status

lint: $(STAMP)  ## Ruff's checks and format, and mypy
	@status=0; \
	$(PY) -m ruff check $(SOURCES) || status=1; \
	$(PY) -m ruff format --check $(SOURCES) || status=1; \
	$(PY) -m mypy || status=1; \
	exit $$status

demo: $(STAMP)  ## Train a small language model in both frameworks, and compare the kernels on its activations
	@$(PY) -m tools.demo

compile-check: $(STAMP)  ## Compile every kernel for every target through both frontends; needs no GPU
	@$(PY) -m tools.compile_check

parity: $(STAMP)  ## Compare the two frontends bit for bit, in Triton's interpreter
	@TRITON_INTERPRET=1 $(PY) -m tools.parity --device cpu --strict

clean:  ## Remove .venv, out/ and caches
	rm -rf $(VENV) out build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(SOURCES) -name __pycache__ -prune -exec rm -rf {} +
