# make demo     set everything up and run the main job: ultramem-demo/report.html
# make test     set everything up and run the tests
# make lint     formatting, lint and types
# make ready    set up what the others need, and no more
# make bench    every bench on the GPU; without one, CPU operators against torch eager: ultramem-bench.json
# make wheel    the sdist, and one wheel for every Python, in dist/
# make sanitize the CPU kernels under AddressSanitizer and UBSan
#
# VENV names the virtual environment (default .venv, created where missing). `make test VENV=`
# uses the current python3 as it is and installs nothing: for machines without a network.

VENV ?= .venv
PYTHON ?= python3
JOBS ?= $(shell nproc)

export MAX_JOBS ?= $(JOBS)

# pytest with a process a core (eight at most), where there is pytest-xdist; a file to a process, so that
# what its tests share (wheels, processes of torch.distributed) is made once (tests/file_schedule.py).
PARALLEL = $(shell $(PY) -c "import xdist" 2>/dev/null && echo "-n $(JOBS) --maxprocesses 8 --dist loadfile")
# Those processes and torch's tests have a core each; BLAS behind NumPy would take all of them.
test sanitize: export OPENBLAS_NUM_THREADS ?= 1

ifeq ($(strip $(VENV)),)
  PY := $(PYTHON)
  READY :=
  BUILD := $(PYTHON) setup.py -q build_ext --inplace
else
  PY := $(VENV)/bin/python
  READY := $(VENV)/.ready
  BUILD := PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) -m pip install -q --no-build-isolation --no-deps -e .
endif

# A CUDA build takes minutes: the demo makes one only where a GPU can use it.
HAS_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo 1)
DEMO_CPU_ONLY := $(or $(ULTRAMEM_CPU_ONLY),$(if $(HAS_GPU),0,1))

# pip hides what CMake says, so the library that was built is asked. $(1): the reason.
NO_GPU_HERE = $(if $(ULTRAMEM_CPU_ONLY),ULTRAMEM_CPU_ONLY=1,nvidia-smi finds no GPU; ULTRAMEM_CPU_ONLY=0 forces a CUDA build)
NO_NVCC := no working nvcc was found; set CUDACXX or CUDA_HOME where there is one
define SAY_IF_CPU_ONLY
@$(PY) -c "from ultramem_cuda import _library; _library.has_cuda_kernels() or \
print('ultramem_cuda: this build is CPU-only ($(1)).')"
endef

.PHONY: demo ready test lint bench sanitize build wheel clean

ready: $(READY)

demo: $(READY)
	ULTRAMEM_CPU_ONLY=$(DEMO_CPU_ONLY) $(BUILD)
	$(call SAY_IF_CPU_ONLY,$(if $(filter 1,$(DEMO_CPU_ONLY)),$(NO_GPU_HERE),$(NO_NVCC)))
	$(PY) -m ultramem_cuda demo

build: $(READY)
	$(BUILD)
	$(call SAY_IF_CPU_ONLY,$(if $(filter 1,$(ULTRAMEM_CPU_ONLY)),ULTRAMEM_CPU_ONLY=1,$(NO_NVCC)))

# The processes would share a GPU's memory, which tests measure and fill.
test: build
	$(PY) -m pytest -q $(if $(HAS_GPU),,$(PARALLEL))

# PYTHONS: interpreters, for whose versions the wheel has a module _C beside that of VENV's Python.
space := $(subst x,,x x)
wheel: build
	rm -rf build/lib.* build/bdist.*    # else modules that are gone since would be in it
	$(PY) setup.py -q sdist
	PATH="$(if $(READY),$(abspath $(VENV))/bin:)$$PATH" ULTRAMEM_PYTHONS="$(subst $(space),:,$(strip $(PYTHONS)))" \
	  $(PY) -m pip wheel -q --no-build-isolation --no-deps --no-cache-dir --wheel-dir dist .
	ls -l dist

lint: $(READY)
	PATH="$(if $(READY),$(abspath $(VENV))/bin:)$$PATH" $(PY) -m pre_commit run --all-files

bench: build
	$(PY) -m bench

sanitize: $(READY)
	PATH="$(if $(READY),$(abspath $(VENV))/bin:)$$PATH" PY="$(PY)" tests/sanitize.sh $(PARALLEL)

# pip would compile on one core, and models of transformers that nothing here imports. What is no
# Python, as some templates are, stays as it is.
$(VENV)/.ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check --no-compile -r requirements.txt
	$(VENV)/bin/python -m compileall -qq -j $(JOBS) -x '/transformers/models/' $(VENV)/lib || true
	touch $@

clean:
	rm -rf build dist *.egg-info ultramem_cuda/*.so
