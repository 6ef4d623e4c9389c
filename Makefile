# make demo    the whole job on a tiny model: data, packing, training, serving, scores, report
# make test    every check; what CI runs
# Both build .venv first: the versions in requirements/lock.txt and this package, compiled.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOCK := requirements/lock.txt requirements/overrides.txt

# Stamps name what they stand for, so a changed lock or source rebuilds and nothing else does.
# An install that was interrupted has left no stamp: it is made anew from nothing.
ENVIRONMENT := $(VENV)/.environment-$(shell cat $(LOCK) | cksum | cut -d' ' -f1)
PACKAGE := $(VENV)/.package
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.cpp csrc/*.hpp)

pin = $(shell sed -n 's/^\($(1)==[^ ;]*\).*/\1/p' requirements/lock.txt)

export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
# The tests start hundreds of processes: without caches each would compile torch and vLLM anew.
unexport PYTHONDONTWRITEBYTECODE

# A file of tests stays together, for what its tests share; the longest ones are collected early.
WORKERS ?= -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test check unit heavy install stubs lock clean
.DELETE_ON_ERROR:

demo: $(PACKAGE)
	$(BIN)/hermes4 demo

test: $(PACKAGE)
	@$(MAKE) --no-print-directory check
	@$(MAKE) --no-print-directory unit
	@$(MAKE) --no-print-directory heavy

check: $(PACKAGE)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror csrc/*.cpp csrc/*.hpp
	$(BIN)/lint-imports
	$(BIN)/mypy

unit: $(PACKAGE)
	$(BIN)/pytest $(WORKERS) -m "not heavy"

heavy: $(PACKAGE)
	$(BIN)/pytest $(WORKERS) -m heavy --durations=15

install: $(PACKAGE)

$(ENVIRONMENT): $(LOCK)
	@command -v $(PYTHON) > /dev/null || { echo "no $(PYTHON): install Python 3.11 or newer, or try make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is too old: Python 3.11 or newer is needed; try make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || { echo "$(PYTHON) lacks venv: install python3-venv"; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || \
	  { echo "$(PYTHON) lacks its C headers: install python3-dev"; exit 1; }
	@command -v c++ > /dev/null || { echo "no C++ compiler: install g++ or clang"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	# torch by pip first: pip takes a CPU wheel that lies on the disk; uv keeps what satisfies the pin.
	$(BIN)/pip install --disable-pip-version-check --quiet --constraint requirements/lock.txt $(call pin,torch) $(call pin,uv)
	$(BIN)/uv pip install --python $(BIN)/python --requirement requirements/lock.txt --override requirements/overrides.txt
	@touch $@

$(PACKAGE): $(ENVIRONMENT) $(SOURCES)
	$(BIN)/uv pip install --python $(BIN)/python --no-build-isolation --no-deps --editable .
	@touch $@

stubs: $(PACKAGE)
	$(BIN)/pybind11-stubgen hermes_core._C -o .
	$(BIN)/ruff check --quiet --select I --fix hermes_core/_C.pyi
	$(BIN)/ruff format --quiet hermes_core/_C.pyi

# A new lock.txt from top.txt, by a fresh install; look at the difference before you commit it.
lock:
	$(PYTHON) -m venv --clear build/lock
	build/lock/bin/pip install --disable-pip-version-check --quiet $$(grep '^torch==' requirements/top.txt) uv
	build/lock/bin/uv pip install --python build/lock/bin/python --requirement requirements/top.txt --override requirements/overrides.txt
	{ echo "# Made by 'make lock' from top.txt: the one place for versions."; \
	  build/lock/bin/uv pip freeze --python build/lock/bin/python | sed 's/+cpu$$//'; } > requirements/lock.txt
	rm -rf build/lock

clean:
	rm -rf $(VENV) build dist *.egg-info hermes_core/*.so
