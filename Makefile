PYTHON ?= python3
BIN := .venv/bin
VLLM ?= 0.29
# Each vLLM has an environment and a results file of its own. The first has OpenRLHF too, which pins that vLLM.
SUFFIX := $(if $(filter-out 0.29,$(VLLM)),-vllm-$(VLLM))
ENGINES := .venv-engines$(SUFFIX)/bin
ENGINE_TESTS := $(if $(SUFFIX),$(addprefix tests/engines/test_,vllm.py vllm_real_model.py trl.py),\
	tests/engines --ignore tests/engines/test_verl.py)
SECONDS ?= 600
SEED ?= 0
export HF_HUB_OFFLINE := 1

.PHONY: help venv demo study docs test fuzz test-full test-engines test-engines-fast test-engines-verl test-matrix lint bench bench-engines scaling report resources mutations gpu dist clean

help:
	@echo "Try it"
	@echo "  make demo          rollouts of a real model, mixed; then GRPO and N-GRPO on Countdown (some 6 minutes on 2 cores)"
	@echo "  make study         arms, controls and seeds of two such tasks: some two hours on 2 cores, can be interrupted"
	@echo "Change it"
	@echo "  make test          the fast tests (budget: 5 minutes on 2 cores)"
	@echo "  make lint          ruff and mypy"
	@echo "  make test-full     lint and every test but those with engines (budget: 40 minutes); what CI runs"
	@echo "  make fuzz          public calls with hostile arguments, for SECONDS=600 from SEED=0"
	@echo "  make mutations     the kernels broken on purpose, which the tests must notice (about 10 minutes)"
	@echo "  make resources     compile what changed of the kernels for five GPUs; what each takes, and times predicted from it"
	@echo "Write about it"
	@echo "  make docs          redraw pictures and tables, build the site into site/ strictly, run every snippet"
	@echo "Try other versions, engines and machines"
	@echo "  make test-matrix   the fast tests with the oldest and the newest torch, triton, transformers and TRL"
	@echo "  make test-engines  vLLM, TRL with vLLM, DeepSpeed, OpenRLHF: real engines on the CPU, in .venv-engines;"
	@echo "                     VLLM=0.31, VLLM=0.32: the first two with that vLLM, in an environment of its own"
	@echo "  make test-engines-fast  the same without OpenRLHF's loops"
	@echo "  make test-engines-verl  verl: its training loop on the CPU, in .venv-engines-verl"
	@echo "  make gpu           on a machine with a CUDA GPU: tests, compute-sanitizer and benchmarks there, installing nothing"
	@echo "Measure it"
	@echo "  make bench         the benchmarks, with ratios to peers in the same run"
	@echo "  make bench-engines what mixing adds to a rollout in vLLM, in .venv-engines"
	@echo "  make scaling       how the time of a search grows with V and d: a table and a picture"
	@echo "  make report        everything measured on one page with pictures: benchmarks/results/report.md"
	@echo "Release it"
	@echo "  make dist          build, check, and try the package in an environment without a framework (CONTRIBUTING.md)"
	@echo "Keep house"
	@echo "  make venv          .venv with everything the above need; they make it themselves"
	@echo "  make clean         remove every environment and build"

venv: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[trl,test]'
	@touch $@

# torch first and alone, so that nothing else chooses its build. Of torchvision and the like only builds for CUDA would
# come. DeepSpeed is built here, without its own kernels, by a newer setuptools than vLLM asks for; of OpenRLHF's
# requirements the rest needs CUDA.
.venv-engines/installed: pyproject.toml constraints.txt tests/engines/requirements.txt
	$(PYTHON) -m venv .venv-engines
	$(ENGINES)/python -m pip install --quiet --constraint constraints.txt torch
	$(ENGINES)/python -m pip install --quiet --constraint constraints.txt -r tests/engines/requirements.txt
	$(ENGINES)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(ENGINES)/python -m pip install --quiet 'setuptools>=80,<81' wheel
	DS_BUILD_OPS=0 $(ENGINES)/python -m pip install --quiet --constraint constraints.txt \
		--no-build-isolation deepspeed==0.19.6
	$(ENGINES)/python -m pip install --quiet --no-deps openrlhf==0.11.2
	$(ENGINES)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

# vLLM and TRL alone. vLLM's own constraints on transformers differ from ours.
.venv-engines-vllm-%/installed: pyproject.toml constraints/vllm-%.txt tests/engines/requirements-vllm-%.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --constraint constraints/vllm-$*.txt torch
	$(@D)/bin/python -m pip install --quiet --constraint constraints/vllm-$*.txt -r tests/engines/requirements-vllm-$*.txt
	$(@D)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(@D)/bin/python -m pip install --quiet 'setuptools>=77' wheel
	$(@D)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

# verl, which cannot share an environment with the TRL of the others. Its own requirements are not asked: they have an older
# transformers than it runs with, and wandb; TransferQueue's have Ray's dashboard.
.venv-engines-verl/installed: pyproject.toml constraints/verl.txt tests/engines/requirements-verl.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --constraint constraints/verl.txt torch
	$(@D)/bin/python -m pip install --quiet --constraint constraints/verl.txt -r tests/engines/requirements-verl.txt
	$(@D)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(@D)/bin/python -m pip install --quiet 'setuptools>=77' wheel
	$(@D)/bin/python -m pip install --quiet --no-deps verl==0.9.1 TransferQueue==0.1.11
	$(@D)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

# The sets of `make test-matrix`. torch comes first and alone, as above.
.venv-matrix-%/installed: pyproject.toml constraints/%.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --constraint constraints/$*.txt torch
	$(@D)/bin/python -m pip install --quiet --constraint constraints/$*.txt --editable '.[trl,test]'
	@touch $@

demo: venv
	$(BIN)/python -m examples.real_model
	$(BIN)/python -m examples.countdown

study: venv
	$(BIN)/python examples/countdown/study.py --preset full

docs: venv
	$(BIN)/python docs/figures.py
	$(BIN)/python docs/build.py
	$(BIN)/python -m pytest -n 2 tests/test_docs.py tests/test_site.py

test: venv
	$(BIN)/python -m pytest -n 2 -m "not slow"

fuzz: venv
	$(BIN)/python tests/fuzz.py --seconds $(SECONDS) --seed $(SEED)

test-full: lint test
	$(BIN)/python -m pytest -n 2 -m slow
	$(BIN)/python -m pytest benchmarks --benchmark-disable

test-engines-fast: .venv-engines$(SUFFIX)/installed
	$(ENGINES)/python -m pytest -n 2 --dist loadfile $(ENGINE_TESTS) -m "not slow"

test-engines: .venv-engines$(SUFFIX)/installed
	$(ENGINES)/python -m pytest -n 2 --dist loadfile $(ENGINE_TESTS) --report benchmarks/results/engines$(SUFFIX).json

test-engines-verl: .venv-engines-verl/installed
	.venv-engines-verl/bin/python -m pytest tests/engines/test_verl.py --report benchmarks/results/engines-verl.json

test-matrix: .venv-matrix-oldest/installed .venv-matrix-newest/installed
	.venv-matrix-oldest/bin/python -m pytest -n 2 -m "not slow"
	.venv-matrix-newest/bin/python -m pytest -n 2 -m "not slow"

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: venv
	$(BIN)/python -m pytest benchmarks --benchmark-only

bench-engines: .venv-engines$(SUFFIX)/installed
	PYTHONPATH=tests/engines:tests $(ENGINES)/python -m pytest benchmarks/bench_vllm.py benchmarks/bench_trl_server.py \
		--benchmark-only
	PYTHONPATH=tests/engines:tests $(ENGINES)/python benchmarks/engine_overhead.py

scaling: venv
	$(BIN)/python benchmarks/search_scaling.py

report: venv
	$(BIN)/python benchmarks/report.py

resources: venv
	$(BIN)/python benchmarks/resources.py
	$(BIN)/python benchmarks/predictions.py

mutations: venv
	$(BIN)/python tests/mutations.py

gpu:
	PYTHONPATH=. $(PYTHON) benchmarks/gpu.py

dist: venv
	rm -rf dist build/clean
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*
	$(PYTHON) -m venv build/clean
	build/clean/bin/python -m pip install --quiet --constraint constraints.txt torch
	build/clean/bin/python -m pip install --quiet --constraint constraints.txt dist/*.whl
	cd build/clean && bin/python -m ngrpo_ops env && bin/python -c "import sys, torch, ngrpo_ops as n; \
		print(n.nearest_neighbors(torch.eye(4), 2)); assert not {'transformers', 'trl', 'vllm'} & {*sys.modules}"

clean:
	rm -rf .venv .venv-engines* .venv-matrix-* build dist site *.egg-info runs
