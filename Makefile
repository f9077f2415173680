# Two commands do everything on a fresh machine: `make demo` and `make test`.

# Python 3.11 to 3.13 with venv; another one: make PYTHON=/path/to/python install
PYTHON ?= $(shell for python in python3 python3.11 python3.12 python3.13; do \
	$$python -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null \
	&& echo $$python && break; done)
# Without an NVIDIA GPU torch is held at a version with a CPU build; more words for pip go into PIP_ARGS, such as
# --extra-index-url https://download.pytorch.org/whl/cpu where the package index offers torch with CUDA only.
CONSTRAINTS := $(shell nvidia-smi >/dev/null 2>&1 || echo --constraint constraints-cpu.txt)
PIP := .venv/bin/python -m pip install --disable-pip-version-check $(CONSTRAINTS) $(PIP_ARGS)
INSTALLED := .venv/installed
TEST_WORKERS ?= 2
RANKS ?= 4

export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: help install demo test test-fast test-gpu gpu-wheels test-cluster validate-simulator bench-nodes resume-pairs layouts-8 soak mutants fuzz checks docs format clean
help:
	@echo "make install | demo | test | test-fast | test-gpu | gpu-wheels | test-cluster | validate-simulator | bench-nodes | resume-pairs | layouts-8 | soak | mutants | fuzz | checks | docs | format | clean"

install: $(INSTALLED)

# torch comes first, so that packages that look for it while they are built find the one we want.
$(INSTALLED): pyproject.toml constraints-cpu.txt
	@test -n "$(PYTHON)" || { echo "no Python 3.11 to 3.13 with venv here: install one (Debian: apt-get install" \
		"python3-venv), or name it: make PYTHON=/path/to/python" >&2; exit 1; }
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	$(PIP) "torch>=2.9"
	$(PIP) --editable ".[mpi,dev]"
	$(PIP) --editable ".[kernels]" || echo "no triton for this machine: tests of the GPU kernels are skipped" >&2
	touch $@

demo: install
	moe-dist launch --launcher deepspeed --ranks $(RANKS) configs/experiment/demo.yaml

test: install
	OMP_NUM_THREADS=1 python -m pytest -n $(TEST_WORKERS) --dist loadgroup --durations=40

test-fast: install
	OMP_NUM_THREADS=1 python -m pytest -n $(TEST_WORKERS) --dist loadgroup -m "not slow"

GPU_PYTHON ?= .venv/bin/python
GPU_REPORT ?= build/gpu
# What has to be seen on a GPU, in eight minutes, without a network: kernels, speed, precisions, ZeRO, offload, a
# profile. Findings go to GPU_REPORT. On a machine that has torch already: make test-gpu GPU_PYTHON=python3, after
# "make gpu-wheels" where there is a network, and a copy of build/wheels.
test-gpu: SHELL := /bin/bash
test-gpu:
	@mkdir -p $(GPU_REPORT)
	GPU_REPORT=$(GPU_REPORT) timeout 480 $(GPU_PYTHON) -m pytest tests/gpu -v -o addopts=--import-mode=importlib --tb=long \
		--timeout=200 --color=no 2>&1 | tee $(GPU_REPORT)/tests.log; exit $${PIPESTATUS[0]}

GPU_PLATFORM ?= --python-version 3.12 --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
	--platform manylinux2014_x86_64
gpu-wheels: install  # what a machine with torch for GPUs and transformers lacks: copy build/wheels there, and install
	.venv/bin/python -m pip download --disable-pip-version-check -q --no-deps --only-binary=:all: $(GPU_PLATFORM) \
		-d build/wheels -r tests/gpu/wheels.txt
	.venv/bin/python -m pip download --disable-pip-version-check -q --only-binary=:all: $(GPU_PLATFORM) -d build/wheels \
		"pydantic>=2.8"
	DS_BUILD_OPS=0 .venv/bin/python -m pip wheel --disable-pip-version-check -q --no-deps --no-build-isolation -w build/wheels \
		"deepspeed>=0.19.8,<0.20"
	du -sh build/wheels

CLUSTER_TESTS ?= tests/cluster
# Several nodes on this machine, with ssh, SLURM and MPI: needs root, and installs Debian's packages of these.
test-cluster: install
	tests/cluster/install.sh
	python -m pytest $(CLUSTER_TESTS)

VALIDATION ?= runs/validation-$(shell date +%Y%m%d-%H%M%S)
# The simulator's steps against steps on 2 and 4 nodes here, minutes: as root, on a machine that does nothing else.
validate-simulator: install
	tests/cluster/install.sh
	python -m tests.cluster.validate_simulator $(VALIDATION)

# Layers of ours and of the peers over two nodes here, minutes: as root, on a machine that does nothing else.
bench-nodes: install
	tests/cluster/install.sh
	python -m tests.cluster.bench_nodes $(BENCH_NODES)

resume-pairs: install  # checkpoints of each of four layouts in each other one: ten minutes
	OMP_NUM_THREADS=1 python -W ignore -m tests.soak.resume_pairs

layouts-8: install  # twelve layouts of eight ranks train like one rank, re-clustering in between: ten minutes
	OMP_NUM_THREADS=1 python -m pytest -p no:cacheprovider tests/distributed/layouts_of_eight.py

soak: install  # disturbs training 300 times: an hour or two; SOAK="--events 20 --seed 3 world.pipeline=2" for others
	OMP_NUM_THREADS=1 python -W ignore -m tests.soak $(SOAK)

mutants: install  # mutations of core glue that some test must notice: half an hour or so on two cores
	python -W ignore -m tests.mutants $(MUTANTS)

FUZZ_EXAMPLES ?= 10000
# Readers of everything that comes from outside, on damaged and random input.
fuzz: install
	FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) OMP_NUM_THREADS=1 python -W ignore -m pytest -n $(TEST_WORKERS) --timeout 7200 tests/fuzz

checks: install
	ruff check .
	ruff format --check .
	mypy

docs: install  # build/docs/index.html; a link without a target fails it
	$(PIP) --quiet --editable ".[docs]"
	python -m moe_dist.config.reference > docs/keys.md
	python -m moe_dist.metrics.reference docs/metrics.md
	python -m sphinx -W --keep-going -q -b html docs build/docs

format: install
	ruff check --fix .
	ruff format .

clean:  # the runs stay
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find launcher moe_dist tests -name __pycache__ -type d -prune -exec rm -rf {} +
