# Every target works from a fresh clone and first does the set-up it needs.
#
#   DATA=path             for demo and reproduce: Census-Income (an official file, .gz or not, or their folder)
#   PYTHON=python3        makes the virtual environment; a torch that it can import is kept and used
#   VENV=.venv            where the environment lies, or one that is there already (any prefix with bin/python3): its torch is
#                         kept too. On a GPU machine without network: make gpu-check PYTHON=python3
#   MTLKERNELS_CUDA=1     compiles the CUDA kernels everywhere, not only in cuda and gpu-check: they take minutes, and nothing
#                         else here runs them. A plain `pip install --no-build-isolation .` compiles them wherever nvcc is found.
#   PARTS=bench,tune      for gpu-check: some of build, promises, device, tests, slow, sanitizer, bench (promises among it)
#                         and tune (default: all of them). In ten minutes: PARTS=promises,device LIMIT=570
#   LIMIT=570             for gpu-check: seconds for all parts together; RESULTS=file: where the figures go, which may be
#                         a file with the other parts (default: bench/results/<date>-<gpu>.json)
#   RESULTS=file          for reproduce: the runs' lines (default: bench/results/reproduce.jsonl, whose runs are not done again)
#   ONLY="python cpp"     for coverage: some of python, cpp and cuda (default: all of them)
#   CASES=50000           for fuzz: how many
#   TORCHES="2.11.0 ..."  for matrix: these versions of torch alone, gigabytes each
#   HASHED=1              for env: every package but torch and triton at the version and with the hash of requirements-dev.txt
#   MAX_JOBS, CXX, ...    as setup.py says

SHELL := bash
.DEFAULT_GOAL := help
.PHONY: help env build demo test test-all coverage fuzz matrix lint format bench cuda gpu-check reproduce requirements clean

PYTHON ?= python3
VENV ?= .venv
TORCH := torch==2.13.0
# Two processes of one thread each: the suite is many small tests, and two threads in each process would fight for two cores.
WORKERS ?= 2
CASES ?= 50000
PARTS ?= device,tests,slow,sanitizer,bench,tune
export MTLKERNELS_CUDA ?= 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

PY := $(VENV)/bin/python3
PIP := $(PY) -m pip install -qq --no-warn-script-location
STAMP := $(VENV)/.mtlkernels
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(WORKERS)
CXX_FILES = $(shell find csrc tests/emulation docs bench -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' 2> /dev/null)
# What the project and its extras ask for, but torch, which is there, and triton, which has to fit it.
PACKAGES := import importlib.metadata as m, re; left = {"torch", "triton", "torch-rechub", "deepctr-torch"}; \
  print(*{r.split(";")[0] for r in m.requires("mtlkernels") if re.match(r"[\w-]+", r).group() not in left})
# With these a package that cannot be had, or has another hash, ends the set-up.
PINNED = $(if $(HASHED),--require-hashes --no-deps -r requirements-dev.txt)
# Into the pinned ones goes all that torch does not bring along: as if nothing here asked for torch.
EXTRAS := test dev bench demo train
UNPINNED := torch triton sympy mpmath networkx jinja2

# Where PYTHON has torch. In a virtual environment, which --system-site-packages would not look into, that is not the system's.
TORCH_SITE := import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])

help:
	@sed -n '/^#   /s/^#  //p' Makefile; echo; echo "  make $$(sed -n 's/^.PHONY: help //p' Makefile)"

$(STAMP): pyproject.toml
	@set -e; has() { $$1 -c "import $$2" 2> /dev/null; }; \
	if ! test -x $(PY); then \
	  echo "env: making $(VENV)"; \
	  site=$$($(PYTHON) -c '$(TORCH_SITE)' 2> /dev/null || true); \
	  $(PYTHON) -m venv $${site:+--system-site-packages} $(VENV); \
	  if test "$$site"; then echo "$$site" > $$(echo $(VENV)/lib/python3*/site-packages)/kept_torch.pth; fi; \
	fi; \
	if has $(PY) torch; then kept=yes; else echo "env: installing $(TORCH)"; $(PIP) $(TORCH); fi; \
	echo "env: building and installing mtlkernels"; \
	$(PIP) $(or $(PINNED),"setuptools>=70.1" wheel ninja pybind11) || test "$$kept$(HASHED)" = yes; \
	$(PIP) --no-build-isolation --no-deps -e .; \
	has $(PY) triton || $(PIP) "triton==3.7.1; sys_platform == 'linux' and platform_machine == 'x86_64'" || test "$$kept"; \
	$(PIP) $(or $(PINNED),$$($(PY) -c '$(PACKAGES)')) || { test "$$kept$(HASHED)" = yes && echo "env: going on without the packages that cannot be had"; }; \
	touch $@

env: build

# Python sources are used where they lie; this compiles what changed under csrc/, in under a second when nothing did.
build: $(STAMP)
	@$(PY) setup.py -q build_ext --inplace

demo: build
	$(PY) -m bench.demo $(if $(DATA),--data "$(DATA)")

test: build
	$(PYTEST) -m "not slow"

test-all: build
	$(PYTEST)

# Lines and branches that the tests of `make test` reach, in Python and in C++; what they don't is listed in build/coverage.
coverage: build
	$(PY) -m tests.coverage --workers $(WORKERS) $(if $(ONLY),--only $(ONLY))

fuzz: build
	OMP_NUM_THREADS=1 $(PY) -W ignore -m tests.fuzz --cases $(CASES)

# Every Python and torch that the operator library is for; fetches each torch.
matrix: build
	$(PY) -m tests.matrix $(if $(TORCHES),--torch $(TORCHES))

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(if $(CXX_FILES),$(VENV)/bin/clang-format --dry-run --Werror $(CXX_FILES))

format: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(if $(CXX_FILES),$(VENV)/bin/clang-format -i $(CXX_FILES))

bench: build
	$(PY) -m bench.step

cuda: export MTLKERNELS_CUDA := 1
cuda: build
	@$(PY) -c "import mtlkernels; print('CUDA kernels compiled for', *mtlkernels.build_info()['cuda_archs'])"

# No part keeps the others from running. So the set-up compiles nothing, the part "build" does: first in every call, in
# under a second where it is done already.
gpu-check: export MTLKERNELS_NATIVE := 0
gpu-check: $(STAMP)
	env -u MTLKERNELS_NATIVE $(PY) -m bench.gpu_check --parts build,$(PARTS) $(if $(LIMIT),--limit $(LIMIT)) $(if $(RESULTS),--out "$(RESULTS)")

reproduce: build
	@test -n "$(DATA)" || { echo "reproduce: where is Census-Income? make reproduce DATA=path (a file, .gz or not, or a folder)"; exit 2; }
	$(PY) -m bench.reproduce --data "$(DATA)" $(if $(RESULTS),--results "$(RESULTS)")

# Needs uv (pip install uv), which reads what every package asks for and downloads none.
requirements:
	@set -e; pinned=$$(mktemp); sed '/^#/!d' requirements-dev.txt > $$pinned; \
	uv pip compile --no-config --quiet --universal --python-version 3.10 --generate-hashes --no-annotate --no-header \
	  $(EXTRAS:%=--extra %) $(UNPINNED:%=--no-emit-package %) \
	  --override <(printf '%s; sys_platform == "never"\n' torch triton) pyproject.toml >> $$pinned; \
	cp $$pinned requirements-dev.txt; rm $$pinned

clean:
	rm -rf build dist *.egg-info mtlkernels/lib mtlkernels/_build_info*.so bench/out
	rm -rf .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
