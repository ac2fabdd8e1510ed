# Every target sets up what it needs in .venv; a second call finds it there. See `make help`.
PYTHON ?= python3
CXX ?= g++
# The exact torch that is installed here. The extension itself serves torch 2.11 and later (make compat).
TORCH ?= 2.13.0
COMPAT_TORCH ?= 2.11.0
ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
INSTALL := -m pip install --quiet --disable-pip-version-check
BASE := $(VENV)/.torch-$(TORCH)
EXTENSION := build/.extension
COMPAT_VENV := .venv-compat
COMPAT_BASE := $(COMPAT_VENV)/.torch-$(COMPAT_TORCH)
with = $(EXTENSION) $(addprefix $(VENV)/.with-,$(1))

SOURCES := $(shell find csrc -type f)
CLANG_FORMAT := $(VENV)/bin/clang-format
CXX_FILES = $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo test bench lint format compat sanitize hooks clean

help:
	@echo 'make demo      train a text classifier on torch.nn.LSTM and on seqkernels.nn.LSTM, side by side'
	@echo 'make test      make lint, then pytest                 ARGS="-k lstm"'
	@echo 'make bench     time seqkernels against its peers      ARGS="-k train"'
	@echo 'make lint      ruff, mypy, clang-format: check only'
	@echo 'make format    ruff and clang-format: rewrite'
	@echo 'make compat    one wheel, built with torch $(TORCH), tested with torch $(COMPAT_TORCH)'
	@echo 'make sanitize  pytest with AddressSanitizer and UndefinedBehaviorSanitizer in the C++'
	@echo 'make hooks     lint before every commit'
	@echo 'make clean     remove what was built; the environments stay'
	@echo 'Variables: PYTHON=$(PYTHON) TORCH=$(TORCH)'

demo: $(call with,demo)
	$(PY) examples/text_classification.py $(ARGS)

test: lint $(call with,test)
	$(PY) -m pytest $(ARGS)

bench: $(call with,bench)
	$(PY) -m pytest bench -p no:cacheprovider --benchmark-only -q $(ARGS)

lint: $(call with,dev)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(CLANG_FORMAT) --dry-run -Werror $(CXX_FILES)

format: $(call with,dev)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(CLANG_FORMAT) -i $(CXX_FILES)

hooks: $(call with,dev)
	$(VENV)/bin/pre-commit install

# ---- environment ----

$(BASE):
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) $(INSTALL) torch==$(TORCH) 'setuptools>=77' cmake ninja pybind11
	@touch $@

# Built in place; the folder under build/ is kept, so only changed files are compiled again.
$(EXTENSION): $(BASE) CMakeLists.txt setup.py $(SOURCES)
	$(PY) setup.py --quiet build_ext --inplace
	@touch $@

# One extra of pyproject.toml. torch is named again so that no requirement can bring another one.
$(VENV)/.with-%: $(BASE) pyproject.toml | $(EXTENSION)
	$(PY) $(INSTALL) --no-build-isolation torch==$(TORCH) -e '.[$*]'
	@touch $@

# ---- the same wheel in two releases of torch ----
# It is unpacked into build/compat/site, ahead of everything else on the path, and the tests are copied beside it: nothing of
# the checkout can stand in for it.

compat: $(call with,test)
	rm -rf build/compat build/lib*
	$(PY) -m pip wheel --quiet --no-build-isolation --no-deps -w build/compat .
	$(PY) $(INSTALL) --no-deps --target build/compat/site build/compat/seqkernels-*.whl
	cp -r tests bench examples pyproject.toml build/compat/
	$(MAKE) $(COMPAT_BASE)
	$(call in_compat,$(PY)) -c "$$COMPAT_REPORT"
	$(call in_compat,$(COMPAT_VENV)/bin/python) -c "$$COMPAT_REPORT"
	$(call in_compat,$(COMPAT_VENV)/bin/python) -m pytest -W default $(ARGS)

in_compat = cd build/compat && PYTHONPATH='$(CURDIR)/build/compat/site' '$(CURDIR)/$(1)'

define COMPAT_REPORT
import hashlib, pathlib, sys, torch, seqkernels
from seqkernels import _C
assert pathlib.Path(_C.__file__).is_relative_to(pathlib.Path.cwd()), _C.__file__
digest = hashlib.sha256(pathlib.Path(_C.__file__).read_bytes()).hexdigest()[:16]
print(f'torch {torch.__version__}, _C sha256 {digest}: {seqkernels.build_info()}')
endef
export COMPAT_REPORT

# The wheel brings the requirements of its test extra and leaves again.
$(COMPAT_BASE): pyproject.toml
	test -x $(COMPAT_VENV)/bin/python || $(PYTHON) -m venv $(COMPAT_VENV)
	$(COMPAT_VENV)/bin/python $(INSTALL) torch==$(COMPAT_TORCH) "$$(echo build/compat/seqkernels-*.whl)[test]"
	$(COMPAT_VENV)/bin/python -m pip uninstall --quiet --yes seqkernels
	@touch $@

# ---- sanitizers ----
# Python itself is not instrumented, so the runtime is loaded ahead of it; the build has folders of its own.

SANITIZED := build/sanitize
sanitize: $(call with,test)
	rm -rf $(SANITIZED)/site && mkdir -p $(SANITIZED)/site
	cp -r seqkernels tests bench examples pyproject.toml $(SANITIZED)/site/
	rm -f $(SANITIZED)/site/seqkernels/_C.*.so
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" cmake -G Ninja -S . -B $(SANITIZED) -DPython_EXECUTABLE='$(CURDIR)/$(PY)' \
	    -DSEQKERNELS_SANITIZE='address;undefined' -DCMAKE_LIBRARY_OUTPUT_DIRECTORY='$(CURDIR)/$(SANITIZED)/site/seqkernels'
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" cmake --build $(SANITIZED)
	cd $(SANITIZED)/site && ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	    LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	    '$(CURDIR)/$(PY)' -m pytest $(ARGS)

clean:
	rm -rf build dist *.egg-info seqkernels/_C.*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find seqkernels tests bench examples -name __pycache__ -prune -exec rm -rf {} +
