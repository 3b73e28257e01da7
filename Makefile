# make demo   sets itself up, then runs the whole Step-KTO loop on the CPU (recipes/mini_cpu.yaml)
# make test   sets itself up, then runs every test that this machine can run
# make gpu    sets up a machine with NVIDIA GPUs
#
# The first two create a virtual environment in .venv, which contains the command stepkto. They change nothing else.

PYTHON ?= python3.11
# Used only if the default package index has no CPU build of torch.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
PYTEST_ARGS ?=
# Tests that run at the same time, because most leave a core idle.
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
READY := $(VENV)/.ready

# For the target megatron-019: the same package on the newest Megatron-Core, which needs Python 3.12.
PYTHON312 ?= python3.12
# For GPUs: Python 3.12 (Megatron-Core 0.19) where it is there, unless PYTHON is given.
PYTHON_GPU = $(if $(filter file,$(origin PYTHON)),$(or $(shell python3.12 -c "print('python3.12')" 2>/dev/null),$(PYTHON)),$(PYTHON))
GPU_SETUP = $(PYTHON_GPU) tools/gpu_setup.py
VENV019 := .venv-megatron-0.19
PIP019 := $(VENV019)/bin/python -m pip --disable-pip-version-check

.PHONY: demo test test-all real unit lint setup demo-short compare gsm8k figures m0 gpu gpu-wheels gpu-smoke images megatron-019 benchmark-trl clean

demo: setup
	$(BIN)/stepkto run recipes/mini_cpu.yaml

# One iteration with few problems: shows that every stage works; its figures mean nothing.
demo-short: setup
	rm -rf runs/mini_cpu_short
	$(BIN)/stepkto run recipes/mini_cpu.yaml --set name=mini_cpu_short --set iterations=1 \
		--set problems.per_iteration=48 --set evaluate.num_problems=100

compare: setup
	$(BIN)/stepkto run recipes/mini_cpu.yaml --compare kto,rft,irpo

gsm8k: setup
	$(BIN)/stepkto run recipes/gsm8k_offline_cpu.yaml

test: setup
	$(BIN)/python -m pytest -n $(WORKERS) -m "not long and not big_model" $(PYTEST_ARGS)

# With the tests that take about a minute or more each. One at a time: some give a step of theirs a minute or two at most.
test-all: setup
	$(BIN)/python -m pytest -m "not big_model" $(PYTEST_ARGS)

# Pretrained models through every stage: SmolLM2-135M, which test runs too, and Qwen2.5-Coder-0.5B (0.5 GB to download once,
# 12 GB of memory).
real: setup
	$(BIN)/python -m pytest tests/real $(PYTEST_ARGS)

unit: setup
	$(BIN)/python -m pytest -n $(WORKERS) tests/unit $(PYTEST_ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint containers/*.Dockerfile

# Layouts, resume, checkpoints and unit tests on Megatron-Core 0.19 (Python 3.12, no vLLM), then trainings that start under
# one version and finish under the other.
megatron-019: setup $(VENV019)/.ready
	$(VENV019)/bin/python -m pytest tests/unit tests/distributed $(PYTEST_ARGS)
	STEPKTO_OTHER_PYTHON=$(abspath $(VENV019)/bin/python) $(BIN)/python -m pytest tests/distributed/test_other_megatron.py

# torch: the CPU build if an index has it for Python 3.12, otherwise the CUDA build (3 GB), which also runs on a CPU.
$(VENV019)/.ready: requirements/py312.lock pyproject.toml
	@$(PYTHON312) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null || \
		{ echo "error: expected Python 3.12 as $(PYTHON312), found none; run make PYTHON312=/path/to/python3.12"; exit 2; }
	@echo "setting up $(VENV019) (the log is $(VENV019)/setup.log)"
	@test -x $(VENV019)/bin/python || $(PYTHON312) -m venv $(VENV019)
	@{ $(PIP019) install --quiet --no-deps --retries 1 -r requirements/torch-cpu.txt || \
	   $(PIP019) install --quiet --no-deps --retries 1 --index-url $(TORCH_CPU_INDEX) -r requirements/torch-cpu.txt || \
	   $(PIP019) install --quiet $$(sed 's/+cpu//' requirements/torch-cpu.txt); } >$(VENV019)/setup.log 2>&1 && \
	 $(PIP019) install --quiet --no-deps -r requirements/py312.lock >>$(VENV019)/setup.log 2>&1 && \
	 $(PIP019) install --quiet --no-deps --no-build-isolation --editable . >>$(VENV019)/setup.log 2>&1 || \
		{ tail -n 5 $(VENV019)/setup.log; echo "error: the packages could not be installed"; exit 2; }
	@touch $(VENV019)/.ready

# Checks the README's claims over three seeds (about half an hour).
figures: setup
	STEPKTO_FIGURES=1 $(BIN)/python -m pytest tests/end_to_end/test_figures.py -s

# On a machine with NVIDIA GPUs: makes .venv-gpu-train and .venv-gpu-sample from requirements/gpu-*.lock. Offline from a
# folder of wheels: WHEELS=DIR. With Apex: APEX=DIR, a checkout of its source. GPU_ARGS="--check" says what is missing.
gpu:
	@$(GPU_SETUP) $(if $(WHEELS),--wheels $(WHEELS)) $(if $(APEX),--apex $(APEX)) $(GPU_ARGS)

# Fills a folder of wheels for make gpu and make gpu-smoke on machines without a network.
gpu-wheels:
	@test -n "$(WHEELS)" || { echo "error: expected a folder, make gpu-wheels WHEELS=DIR"; exit 2; }
	@$(GPU_SETUP) --download $(WHEELS) $(GPU_ARGS)

# The images of containers/: with Docker stepkto-train and stepkto-sample, or build/images/*.sif with IMAGES=apptainer.
IMAGES ?= docker
images:
	@command -v $(IMAGES) >/dev/null || { echo "error: expected $(IMAGES) on PATH, found none; try make images IMAGES=apptainer"; exit 2; }
ifeq ($(IMAGES),docker)
	docker build --file containers/train.Dockerfile --tag stepkto-train .
	docker build --file containers/sample.Dockerfile --tag stepkto-sample .
else
	mkdir -p build/images
	$(IMAGES) build --force build/images/train.sif containers/train.def
	$(IMAGES) build --force build/images/sample.sif containers/sample.def
endif

# Checks the GPU path in .venv-gpu-train, in under ten minutes beside the installation. Offline from a folder of wheels:
# make gpu-smoke WHEELS=DIR. In a complete environment: GPU_SMOKE_ARGS=--here.
gpu-smoke:
	$(PYTHON_GPU) tools/gpu_smoke.py $(if $(WHEELS),--wheels $(WHEELS)) $(GPU_SMOKE_ARGS)

# Training speed beside TRL's KTOTrainer (about six minutes per repeat; BENCHMARK_ARGS="--repeats 3"). TRL is installed in its
# own folder.
benchmark-trl: setup
	@test -d $(VENV)/trl || $(PIP) install --quiet --no-deps --target $(VENV)/trl -r requirements/bench.txt
	$(BIN)/python -m benchmarks.train_vs_trl --trl $(VENV)/trl $(BENCHMARK_ARGS)

# Rebuilds the shipped M0.
m0: setup
	rm -rf runs/mini_cpu_m0
	$(BIN)/stepkto warm-up recipes/mini_cpu.yaml --set name=mini_cpu_m0
	rm -rf recipes/mini_cpu_m0
	cp -r runs/mini_cpu_m0/M0/convert/model recipes/mini_cpu_m0

# Keeps runs/: it holds results.
clean:
	rm -rf $(VENV) $(VENV019) .venv-gpu-train .venv-gpu-sample build *.egg-info

setup: $(READY)

$(READY): requirements/torch-cpu.txt requirements/cpu.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || \
		{ echo "error: expected Python 3.11 as $(PYTHON), found none; install it (with venv) or run make PYTHON=/path/to/python3.11"; exit 2; }
	@echo "setting up $(VENV) (a few minutes, about 3 GB; the log is $(VENV)/setup.log)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install --quiet --no-deps --retries 1 -r requirements/torch-cpu.txt >$(VENV)/setup.log 2>&1 || \
		{ echo "the default index has no CPU build of torch: trying $(TORCH_CPU_INDEX)"; \
		  $(PIP) install --quiet --no-deps --index-url $(TORCH_CPU_INDEX) -r requirements/torch-cpu.txt >>$(VENV)/setup.log 2>&1; } || \
		{ tail -n 5 $(VENV)/setup.log; echo "error: torch could not be installed; set TORCH_CPU_INDEX to an index that has it"; exit 2; }
	@$(PIP) install --quiet --no-deps -r requirements/cpu.lock >>$(VENV)/setup.log 2>&1 || \
		{ tail -n 5 $(VENV)/setup.log; echo "error: the packages of requirements/cpu.lock could not be installed"; exit 2; }
	@$(PIP) install --quiet --no-deps --no-build-isolation --editable . >>$(VENV)/setup.log 2>&1 || \
		{ tail -n 5 $(VENV)/setup.log; echo "error: the package itself could not be installed"; exit 2; }
	@touch $(READY)
