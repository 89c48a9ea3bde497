# SPDX-License-Identifier: Apache-2.0
# Every recipe is a thin call of a script in tools/ or of a command in .venv, which `setup` makes.
# `exec`: a signal to make reaches the script itself, not a shell that would leave it running.
# Settings: PYTHON (the interpreter .venv is made from; one that has vLLM lends it), MODEL and PORT
# (make serve), ARGS (passed on by serve, test, bench, upstream-test and compat).

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory
.NOTPARALLEL:

PYTHON ?= python3
MODEL ?=
PORT ?=
ARGS ?=

# The tree may be entered from anywhere (make -C), and its path may hold spaces.
PY := .venv/bin/python
# Files of tests side by side, as many as there are cores for: most of a test with an engine is one
# core at imports. Threads that wait must then sleep: each process has as many as there are cores.
SIDE_BY_SIDE ?= 2
PYTEST = OMP_WAIT_POLICY=passive $(PY) -m pytest -p tools.fast_first -n $(SIDE_BY_SIDE) --dist loadfile \
	--no-loadscope-reorder --max-worker-restart=0
# Types are one of the tests.
RUFF = $(PY) -m ruff check $(SOURCES) && exec $(PY) -m ruff format --check $(SOURCES)
TOOL := "$(PYTHON)" -m tools
# Python files that are not below the package: the linter sees them too.
SOURCES := vllm_plugin_tm tools tests benchmarks examples csrc

.PHONY: help setup setup-test demo demo-online serve test test-fast processors lint wheel upstream-test \
	versions compat bench \
	cuda readme clean

help: ## this list
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /|/' | awk -F'|' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: ## make .venv: vLLM for CPU and this plugin
	@exec $(TOOL).setup_env --for demo

demo: ## set up, ask a quantized model over HTTP, show the layer table and tokens/s on and off
	@exec $(TOOL).demo

demo-online: ## the same from a bf16 model, quantized while vLLM loads it
	@exec $(TOOL).demo --online

serve: ## leave a server with the plugin on up until Ctrl-C (MODEL=folder PORT=number)
	@exec $(TOOL).serve --model "$(MODEL)" --port "$(PORT)" -- $(ARGS)

setup-test:
	@exec $(TOOL).setup_env --for demo --for test

test: setup-test ## set up, lint, and run the whole suite, a real server included
	@$(RUFF)
	@$(PYTEST) $(ARGS)

test-fast: setup-test ## the tests that take seconds
	@$(PYTEST) -m "not slow" $(ARGS)

processors: setup-test ## the tests that depend on the processor, on every lesser one
	@for name in $$(PYTHONPATH=tests/child_site $(PY) -m lesser_processor); do \
		echo "==> $$name"; TESTS_PROCESSOR=$$name $(PYTEST) -m processor $(ARGS) || exit 1; done

lint: setup-test ## ruff and mypy; warnings are errors
	@$(RUFF)
	@exec $(PY) -m mypy

wheel: setup ## build dist/*.whl against the torch in .venv
	@exec $(PY) -m pip wheel --no-deps --no-build-isolation --wheel-dir dist .

upstream-test: setup-test ## vLLM's own tests, with the switch off and on
	@exec $(PY) tools/upstream_test.py $(ARGS)

versions: setup-test ## models on every vLLM that the package names, switch on and off
	@exec $(PY) -m tools.vllm_versions $(ARGS)

compat: setup-test ## every patched symbol against the sources of several vLLM versions
	@exec $(PY) tools/compat.py $(ARGS)

bench: ## kernels against upstream's and against the machine's limits (ARGS="--quick --json f.json")
	@exec $(TOOL).setup_env --for demo --for bench
	@exec .venv/bin/vllm-tm bench $(ARGS)

cuda: ## build the CUDA kernels for all supported GPUs (needs nvcc; neither a GPU nor torch)
	@exec $(TOOL).build_cuda $(ARGS)

readme: setup-test ## write the generated tables of README.md anew
	@exec $(PY) -m tools.readme_tables

clean: ## remove everything that was made: .venv, build, dist, caches
	@exec $(TOOL).clean
