# Every target installs its requirements into .venv on the first call. See `make help`.
PYTHON ?= python3
CXX ?= g++
# The torch release that is installed into .venv. The extension supports torch 2.11 and later (make compat).
TORCH ?= 2.13.0
# The releases of `make compat`. 2.14.1 installs as a CUDA build of gigabytes.
COMPAT_TORCH ?= 2.11.0 2.13.0 2.14.1
GPU_TORCH ?= 2.11.0
# The Triton of the tests; each CUDA build of torch requires one release.
TRITON ?= 3.6.0
# The processes of make test.
PROCESSES ?= 2
# The cases of make test: quick (each value of each parameter of a test) or all (every combination).
CASES ?= quick
# The script of make demo.
EXAMPLE ?= text_classification
# Saved results that make report draws instead of measuring.
RESULTS ?=
ARGS ?=
# The duration of make fuzz, and of the fuzz tests in make sanitize (0: they run as in make test).
SECONDS ?= 600
FUZZ_SECONDS ?= 0
FUZZ_TESTS := $(shell grep -rl "support.fuzzing import" tests --include="test_*.py")
# The instruction sets of make sanitize and make coverage: those of this processor.
has = $(if $(shell grep -sm1 -w $(1) /proc/cpuinfo),;$(2))
OWN_SETS ?= portable$(call has,avx2,avx2)$(call has,avx_vnni,avx2_vnni)$(call has,avx512dq,avx512)$(call has,avx512_vnni,avx512_vnni)

VENV := .venv
PY := $(VENV)/bin/python
INSTALL := -m pip install --quiet --disable-pip-version-check
BASE := $(VENV)/.torch-$(TORCH)
EXTENSION := build/.extension
EMULATED := build/.emulated
HUB := build/.hub
COMPAT_VENV := .venv-compat
with = $(EXTENSION) $(addprefix $(VENV)/.with-,$(1))

SOURCES := cmake/cuda.cmake $(shell find csrc -type f)
EMULATION := $(shell find tests/cuda_on_cpu -name '*.h' -o -name '*.cpp' -o -name '*.cu')
# What the tests read, beside the package: copied for a package that is not that of the checkout.
TESTED := tests bench examples docs csrc hub LICENSE README.md CHANGELOG.md CONTRIBUTING.md SECURITY.md pyproject.toml
CLANG_FORMAT := $(VENV)/bin/clang-format
CXX_FILES = $(shell find csrc tests examples -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo build test check nightly coverage bench report bench-gate docs lint format fuzz hub wheel compat sanitize check-mutants check-gpu-build check-gpu-extension gpu hooks clean

help:
	@echo 'make demo      train a text classifier with torch.nn.LSTM and with seqkernels.nn.LSTM'
	@echo '               ARGS="--model bag", or another script of examples/: EXAMPLE=translation ARGS=--help'
	@echo 'make test      make lint, then pytest                 ARGS="-k lstm" PROCESSES=2 CASES=all'
	@echo 'make nightly   every combination of the tests, and all long checks: hours'
	@echo 'make bench     benchmark against other libraries      ARGS="-k train"'
	@echo 'make report    measure each operator against torch in 20 minutes and draw build/report/index.html'
	@echo '               ARGS="-k lstm", or draw saved results without measuring: RESULTS=bench/results/FILE.json'
	@echo 'make bench-gate  compare instruction counts with bench/gate.json   ARGS="--update"'
	@echo 'make docs      build the site into build/site'
	@echo 'make lint      check with ruff, mypy and clang-format'
	@echo 'make format    format with ruff and clang-format'
	@echo 'make wheel     build one wheel for Python 3.10 and later and a source distribution in dist/, and check the wheel'
	@echo 'make hub       write a kernel repository of the Hugging Face Hub into build/hub'
	@echo 'make compat    make wheel, then test the wheel with torch $(COMPAT_TORCH)   COMPAT_TORCH=2.11.0'
	@echo 'make sanitize  pytest with AddressSanitizer and UndefinedBehaviorSanitizer'
	@echo '               FUZZ_SECONDS=600: the fuzz tests only, for this time   OWN_SETS="portable;avx2"'
	@echo 'make coverage  pytest with line counts of Python and C++: build/coverage/lines, and a list of uncovered lines of csrc'
	@echo 'make fuzz      the fuzz tests with random arguments for SECONDS=$(SECONDS)   ARGS="--fuzz-seed=7"'
	@echo 'make check-mutants  weaken each synchronising call of the CUDA kernels: a test must fail   ARGS="--only grid.cuh"'
	@echo 'make check-gpu-build  compile every GPU kernel (needs nvcc, no GPU), check registers and spills, build the CUDA extension'
	@echo 'make gpu       on a GPU: build, test, sanitize, tune and benchmark within 9 minutes   ARGS="--only build,tests"'
	@echo 'make hooks     install the pre-commit hook that runs the linters'
	@echo 'make clean     remove build outputs; keep the environments'
	@echo 'Variables: PYTHON=$(PYTHON) TORCH=$(TORCH)'

demo: $(call with,demo)
	$(PY) examples/$(EXAMPLE).py $(ARGS)

build: $(call with,test) $(EMULATED) $(HUB)

test: lint check

check: build
	$(PY) -m pytest -n $(PROCESSES) --dist loadfile --cases=$(CASES) $(ARGS)

nightly:
	.ci/nightly

# A crash leaves the call that caused it in build/fuzz.log.
fuzz: $(call with,test)
	$(PY) -m pytest $(FUZZ_TESTS) --fuzz-seconds=$(SECONDS) --fuzz-log=build/fuzz.log $(ARGS)

bench: $(call with,bench)
	$(PY) -m pytest bench -p no:cacheprovider --benchmark-only -q $(ARGS)

report: $(call with,bench)
	$(PY) bench/page.py $(if $(RESULTS),--results $(RESULTS)) $(ARGS)

bench-gate: $(EXTENSION)
	$(PY) bench/gate.py $(ARGS)

check-mutants: $(call with,test) $(EMULATED)
	$(PY) tests/cuda_on_cpu/mutants.py $(ARGS)

docs: $(call with,docs)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

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
	$(PY) $(INSTALL) torch==$(TORCH) 'setuptools>=77' cmake ninja
	@touch $@

# Built in place. The folder under build/ is kept, so only changed files are recompiled.
$(EXTENSION): $(BASE) CMakeLists.txt setup.py $(SOURCES)
	$(PY) setup.py --quiet build_ext --inplace
	@touch $@

# The emulated CUDA kernels for tests. They share the libraries in the extension's build folder.
$(EMULATED): $(EXTENSION) $(EMULATION)
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" cmake --build \
	    "build/cmake-$$($(PY) -c 'import sysconfig; print(sysconfig.get_config_var("SOABI"))')" --target cuda_on_cpu
	@touch $@

# A kernel repository of the Hugging Face Hub, hub/layout.py.
hub: $(HUB)
$(HUB): $(EXTENSION) $(wildcard hub/*) $(shell find seqkernels -name '*.py')
	$(PY) hub/layout.py build/hub
	@touch $@

# Installs one extra of pyproject.toml. torch is pinned again so that no requirement replaces it.
$(VENV)/.with-%: $(BASE) pyproject.toml | $(EXTENSION)
	$(PY) $(INSTALL) --no-build-isolation torch==$(TORCH) -e '.[$*]' \
	    $(if $(filter test,$*),'triton==$(TRITON); sys_platform == "linux"')
	@touch $@

# ---- one wheel, several releases of torch ----
# auditwheel names the oldest glibc that the wheel supports, which is that of the compiler: build in a manylinux_2_28
# container for a wheel that installs anywhere. The libraries of torch and CUDA remain outside: `import torch` loads them.

wheel: $(call with,wheel)
	rm -rf build/wheel build/lib* build/bdist* dist
	$(PY) -m build --no-isolation --sdist --wheel --outdir build/wheel .
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(VENV)/bin/auditwheel repair --strip --wheel-dir dist \
	    --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libcudart*' build/wheel/seqkernels-*.whl
	mv build/wheel/seqkernels-*.tar.gz dist
	$(PYTHON) -m venv build/wheel/venv
	build/wheel/venv/bin/python $(INSTALL) torch==$(TORCH) dist/seqkernels-*.whl
	cd build/wheel && venv/bin/python -m seqkernels

# The wheel is unpacked into build/compat/site, first on the path, and the tests are copied next to it, so that they cannot
# import the package of the checkout.
compat: $(call with,test) $(EMULATED) wheel
	rm -rf build/compat
	$(PY) $(INSTALL) --no-deps --target build/compat/site dist/seqkernels-*.whl
	cp -r $(TESTED) build/compat/
	$(call in_compat,$(PY)) -c "$$COMPAT_REPORT"
	set -e; for release in $(COMPAT_TORCH); do $(MAKE) compat-$$release; done

compat-%: $(COMPAT_VENV)-%/.installed
	$(call in_compat,$(COMPAT_VENV)-$*/bin/python) -c "$$COMPAT_REPORT"
	$(call in_compat,$(COMPAT_VENV)-$*/bin/python) -m pytest -W default $(ARGS)

in_compat = cd build/compat && PYTHONPATH='$(CURDIR)/build/compat/site' '$(CURDIR)/$(1)'

define COMPAT_REPORT
import hashlib, pathlib, sys, torch, seqkernels
from seqkernels import _C
assert pathlib.Path(_C.__file__).is_relative_to(pathlib.Path.cwd()), _C.__file__
digest = hashlib.sha256(pathlib.Path(_C.__file__).read_bytes()).hexdigest()[:16]
print(f'torch {torch.__version__}, _C sha256 {digest}: {seqkernels.build_info()}')
endef
export COMPAT_REPORT

# Installs the wheel for the requirements of its test extra and uninstalls it again.
.PRECIOUS: $(COMPAT_VENV)-%/.installed
$(COMPAT_VENV)-%/.installed: pyproject.toml
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python $(INSTALL) torch==$* "$$(echo dist/seqkernels-*.whl)[test]"
	$(@D)/bin/python -m pip uninstall --quiet --yes seqkernels
	@touch $@

# ---- GPUs ----
# Without a GPU: compiles every kernel with nvcc and Triton, then builds, links and imports the extension with a CUDA
# build of torch (gigabytes, in a separate environment).

GPU_VENV := .venv-gpu
GPU_BASE := $(GPU_VENV)/.torch-$(GPU_TORCH)
check-gpu-build: $(call with,test)
	$(PY) tests/cuda_on_cpu/check_gpu_build.py $(ARGS)
	if test -f bench/check_triton.py; then $(PY) bench/check_triton.py; fi
	$(MAKE) check-gpu-extension

check-gpu-extension: $(GPU_BASE)
	rm -rf build/gpu-check/site && mkdir -p build/gpu-check/site
	cp -r seqkernels build/gpu-check/site/
	rm -f build/gpu-check/site/seqkernels/_C.*.so
	PATH="$(CURDIR)/$(GPU_VENV)/bin:$$PATH" cmake -G Ninja -S . -B build/gpu-check -DSEQKERNELS_CUDA=ON \
	    -DPython_EXECUTABLE='$(CURDIR)/$(GPU_VENV)/bin/python' \
	    -DCMAKE_LIBRARY_OUTPUT_DIRECTORY='$(CURDIR)/build/gpu-check/site/seqkernels'
	PATH="$(CURDIR)/$(GPU_VENV)/bin:$$PATH" cmake --build build/gpu-check --target _C
	cd build/gpu-check/site && '$(CURDIR)/$(GPU_VENV)/bin/python' -c "$$GPU_REPORT"

define GPU_REPORT
import torch, seqkernels
info = seqkernels.build_info()
assert info['cuda'], info
keys = torch._C._dispatch_get_registrations_for_dispatch_key('CUDA')
ops = [key for key in keys if key.startswith('seqkernels::')]
assert ops, 'no op has a CUDA kernel'
print(f'torch {torch.__version__}: {info}, {len(ops)} ops for CUDA')
endef
export GPU_REPORT

$(GPU_BASE):
	test -x $(GPU_VENV)/bin/python || $(PYTHON) -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/python $(INSTALL) torch==$(GPU_TORCH) numpy 'setuptools>=77' cmake ninja
	@touch $@

# With a GPU, in the current Python environment; installs nothing.
gpu:
	$(PYTHON) bench/gpu.py $(ARGS)

# Builds $(1) with options of CMake $(2) and targets $(3): a copy of the package and its tests with a module of other compiler
# options, and emulated modules if they are a target. Only the instruction sets of this processor.
define instrument
	rm -rf $(1)/site && mkdir -p $(1)/site
	cp -r seqkernels $(TESTED) $(1)/site/
	rm -f $(1)/site/seqkernels/_C.*.so $(if $(3),$(1)/site/tests/cuda_on_cpu/*.so)
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" cmake -G Ninja -S . -B $(1) -DPython_EXECUTABLE='$(CURDIR)/$(PY)' $(2) \
	    -DSEQKERNELS_INSTRUCTION_SETS='$(OWN_SETS)' -DCMAKE_LIBRARY_OUTPUT_DIRECTORY='$(CURDIR)/$(1)/site/seqkernels' \
	    -DSEQKERNELS_EMULATION_OUTPUT='$(CURDIR)/$(1)/site/tests/cuda_on_cpu'
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" cmake --build $(1) $(3)
endef

# ---- sanitizers ----
# Python is not instrumented, so the sanitizer runtime is preloaded, and leaks are not detected: tests/test_robustness.py
# detects them. The build uses separate folders. -s: pytest would keep the report of a fault that ends the process.

SANITIZED := build/sanitize
sanitize: $(call with,test) $(EMULATED)
	$(call instrument,$(SANITIZED),-DSEQKERNELS_SANITIZE='address;undefined')
	cd $(SANITIZED)/site && ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
	    LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	    '$(CURDIR)/$(PY)' -m pytest -s $(if $(filter-out 0,$(FUZZ_SECONDS)),$(FUZZ_TESTS) \
	    --fuzz-seconds=$(FUZZ_SECONDS) --fuzz-log=../fuzz.log) $(ARGS)

# ---- coverage ----
# The lines of csrc that no test runs, in build/coverage/uncovered.txt and build/coverage/lines/index.html; fails above 3 % of
# them. CUDA kernels count as the emulation runs them.

COVERAGE := build/coverage
GCOVR = $(VENV)/bin/gcovr --root . --filter csrc/ --object-directory $(COVERAGE) -j $(PROCESSES) --merge-lines \
    --merge-mode-functions=separate --gcov-ignore-parse-errors=all --gcov-suspicious-hits-threshold=0  # threads: negative counts
coverage: $(call with,test) $(call with,coverage)
	$(call instrument,$(COVERAGE),-DSEQKERNELS_COVERAGE=ON,--target _C --target cuda_on_cpu)
	find $(COVERAGE) -name '*.gcda' -delete
	mkdir -p $(COVERAGE)/lines
	status=0; (cd $(COVERAGE)/site && '$(CURDIR)/$(PY)' -m pytest -n $(PROCESSES) --dist loadfile --cases=$(CASES) \
	    --cov=seqkernels --cov-report=term:skip-covered --cov-report=html:../lines/python $(ARGS)) || status=$$?; \
	$(GCOVR) --html-nested $(COVERAGE)/lines/index.html --txt $(COVERAGE)/uncovered.txt --fail-under-line 97 || status=$$?; \
	cat $(COVERAGE)/uncovered.txt; exit $$status

clean:
	rm -rf build dist *.egg-info seqkernels/_C.*.so tests/cuda_on_cpu/*.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find seqkernels tests bench examples -name __pycache__ -prune -exec rm -rf {} +
