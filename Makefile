# `make demo` and `make test` set up everything from nothing: git, make, Python 3.11 to 3.13 with venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A release that all exports here were checked with; a CPU build serves.
TORCH ?= torch==2.13.0
DEMO := build/demo
CPP_TOOLS := cmake g++ libssl-dev nlohmann-json3-dev

.PHONY: demo test cpp-tools check slow versions locks torch-tensorrt train clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

# The main job, seen whole: export the demo checkpoint, verify the bundle, segment frames, time every runtime.
demo: $(VENV)/installed
	mkdir -p build
	$(BIN)/msa2net export --checkpoint core/demo.safetensors --output $(DEMO).bundle --force
	$(BIN)/msa2net verify $(DEMO).bundle
	$(BIN)/python -m benchmarks.demo --bundle $(DEMO).bundle --output $(DEMO)
	$(BIN)/python -m benchmarks.latency --bundle $(DEMO).bundle --quick

test: $(VENV)/installed check cpp-tools
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m 'not slow and not gpu and not alone'
	$(BIN)/python -m pytest -m alone

# What the C++ library is built with. Where they are not there and cannot be installed its tests are skipped, and say so.
cpp-tools:
	dpkg --status $(CPP_TOOLS) > /dev/null 2>&1 || test "$$(id -u)" != 0 || \
	    ( apt-get update -qq && apt-get install -qq -y --no-install-recommends $(CPP_TOOLS) ) || true

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror core/kernels/csrc/*.[ch]* runtimes/cpp/*.[ch]* tests/*.cpp
	mkdir -p build/types && ln -sfn ../.. build/types/msa2net
	MYPYPATH=build/types $(BIN)/mypy -p msa2net

# Slower checks, see CONTRIBUTING.md.
slow: $(VENV)/installed
	$(BIN)/python -m pytest -m slow

# The oldest and the newest supported runtimes, each in an environment of its own; with TORCH_TOO=--torch gigabytes more.
versions: $(VENV)/installed
	mkdir -p build/versions
	$(BIN)/msa2net export --checkpoint core/demo.safetensors --precisions fp32,int8-portable --allow-slower \
	    --output build/versions/model.bundle --force
	$(BIN)/python tests/versions.py --bundle build/versions/model.bundle --folder build/versions $(TORCH_TOO)

# The versions that everything is tested with, with their hashes; needs uv. Torch-TensorRT's are in NVIDIA's own index.
locks: $(VENV)/installed
	$(BIN)/python -m pip install --quiet uv
	for extra in $$($(BIN)/python tests/versions.py --list); do \
	    echo '$(TORCH)' | $(BIN)/uv pip compile pyproject.toml --extra $$extra --generate-hashes --universal --python-version 3.11 \
	        --constraints - --no-header --no-annotate --quiet --output-file locks/$$extra.txt || exit 1; done

# What Torch-TensorRT converts, without a GPU. Its packages exclude those of the tests, so it has an environment of its own.
torch-tensorrt: $(VENV)/installed
	test -e build/torch-tensorrt/installed || ( $(PYTHON) -m venv build/torch-tensorrt && \
	    build/torch-tensorrt/bin/python -m pip install --quiet $(TORCH) && build/torch-tensorrt/bin/python -m pip install --quiet \
	    torch-tensorrt-rtx==2.13.0 tensorrt-rtx==1.5.0.114 safetensors numpy pillow && touch build/torch-tensorrt/installed )
	mkdir -p build/types && ln -sfn ../.. build/types/msa2net
	PYTHONPATH=build/types build/torch-tensorrt/bin/python tests/torch_tensorrt_report.py

# The demo's weights, from nothing: about an hour on two cores. It goes on where it was interrupted.
train: $(VENV)/installed
	$(BIN)/python -m msa2net.core.train --preset demo --output build/training

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
