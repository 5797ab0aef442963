PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE := 1

.PHONY: help venv demo test test-full lint bench scaling resources mutations gpu clean

help:
	@echo "make demo       train GRPO and N-GRPO on Countdown and compare them (about 5 minutes on 2 cores)"
	@echo "make test       the fast tests (under 5 minutes on 2 cores)"
	@echo "make test-full  lint, types and every test"
	@echo "make bench      the benchmarks, with ratios to peers in the same run"
	@echo "make scaling    how the time of a search grows with V and d: a table and a picture"
	@echo "make resources  compile every kernel for four GPUs; registers, stack, spills and shared memory of each"
	@echo "make mutations  the kernels broken on purpose, which the tests must notice (about 10 minutes)"
	@echo "make gpu        on a machine with a CUDA GPU: tests, compute-sanitizer and benchmarks there, installing nothing"
	@echo "make venv       .venv with everything the above need; they make it themselves"

venv: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[trl,test]'
	@touch $@

demo: venv
	$(BIN)/python -m examples.countdown

test: venv
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-full: lint
	$(BIN)/python -m pytest -n 2
	$(BIN)/python -m pytest benchmarks --benchmark-disable

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: venv
	$(BIN)/python -m pytest benchmarks --benchmark-only

scaling: venv
	$(BIN)/python benchmarks/search_scaling.py

resources: venv
	$(BIN)/python benchmarks/resources.py

mutations: venv
	$(BIN)/python tests/mutations.py

gpu:
	PYTHONPATH=. $(PYTHON) benchmarks/gpu.py

clean:
	rm -rf .venv build dist *.egg-info runs
