# make demo   exports the two small models and writes text with them
# make serve  serves spoken-to-written, with a page at http://127.0.0.1:8000/
# make test   lints, builds the wheel, checks its types and runs the tests against it
# make docs   builds docs/ as a site in build/site
# All set everything up by themselves in .venv; they need Python 3.11+, a C++ compiler and make.

PYTHON  ?= python3
VENV    := .venv
BIN     := $(VENV)/bin
PIP     := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := $(shell find elf_rt export engines cpp_ext -type f -not -path '*/__pycache__/*' -not -name '*.so')
OUT     := out

GPU_VENV  := .venv-gpu
GPU_PIP   := $(GPU_VENV)/bin/python -m pip --disable-pip-version-check
GPU_TESTS := tests/test_gpu.py tests/test_trt_gpu.py tests/test_torch_kernels.py

.PHONY: demo serve test test-fast lint types pytest docs slow gpu dev clean

demo: $(VENV)/.demo
	mkdir -p $(OUT)
	$(BIN)/elf-rt export examples/spoken-to-written -o $(OUT)/spoken-to-written.elfrt \
	    --prompts examples/spoken-to-written/test.jsonl --presets examples/spoken-to-written/presets.json
	$(BIN)/elf-rt export examples/shakespeare -o $(OUT)/shakespeare.elfrt --no-append-eos \
	    --presets examples/shakespeare/presets.json
	@echo; echo "== A page of Shakespeare, written all at once"
	$(BIN)/elf-rt generate $(OUT)/shakespeare.elfrt --seed 4 --watch
	@echo; echo "== Spoken English, written down"
	head -n 5 examples/spoken-to-written/test.jsonl | \
	    $(BIN)/elf-rt generate $(OUT)/spoken-to-written.elfrt --input - --seed 0

serve: $(VENV)/.demo
	test -d $(OUT)/spoken-to-written.elfrt || $(MAKE) demo
	$(BIN)/elf-rt serve $(OUT)/spoken-to-written.elfrt

test: lint types pytest

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# From an empty folder, so that the installed wheel is checked and not the source tree.
types: $(VENV)/.test
	mkdir -p build/empty && cd build/empty && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p elf_rt

# Plain pytest leaves the source tree off the path: the installed wheel is tested.
pytest: $(VENV)/.test
	$(BIN)/pytest -n 2

# docs/ as a site, in build/site; a link that leads nowhere is an error, here and in `make test`.
docs: $(VENV)/.test-packages
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Full-size engines for every GPU, and 3,000 bad inputs: minutes, so not in `make test`. With a GPU: pytest -m gpu.
slow: $(VENV)/.test
	$(BIN)/pytest -m slow

# With an NVIDIA GPU: its tests, then the benchmark, in under 9 minutes once the packages are there. The PyTorch and
# TensorRT of $(PYTHON) are kept; what is not installed is skipped, with a line.
gpu: $(GPU_VENV)/.done
	-timeout 180 $(GPU_VENV)/bin/python -P -m pytest -q -m gpu --continue-on-collection-errors $(GPU_TESTS)
	$(GPU_VENV)/bin/python benchmarks/gpu.py --minutes 4.5 --output docs

# The arithmetic, the engine and the bundle alone, without the network once set up.
FAST := noise schedule solvers integrator pinned engine cost imports repository bundle
test-fast: $(VENV)/.test
	$(BIN)/pytest -q -n 2 $(FAST:%=tests/test_%.py)

# An editable install, for work on elf-rt itself.
dev: $(VENV)/.test-packages
	$(PIP) install -q --no-deps --no-build-isolation -e .
	rm -f $(VENV)/.test

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -U pip "setuptools>=77" wheel "pybind11>=2.13"

$(GPU_VENV)/.done: $(SOURCES) pyproject.toml setup.py
	$(PYTHON) -m venv --system-site-packages $(GPU_VENV)
	$(GPU_PIP) install -q "setuptools>=77" wheel "pybind11>=2.13" "pytest>=8"
	$(GPU_PIP) install -q --no-build-isolation ".[torch,export,plot]" || \
	    $(GPU_PIP) install -q --no-deps --no-build-isolation .
	touch $@

$(VENV)/.demo: $(SOURCES) pyproject.toml setup.py constraints.txt | $(BIN)/python
	$(PIP) install -q -c constraints.txt "setuptools>=77" "pybind11>=2.13"
	$(PIP) install -q -c constraints.txt --no-build-isolation ".[cpu,export,serve]"
	touch $@

# tests/test_triton.py asks the Triton server that nvidia-pytriton carries; its Python stub needs a numpy of its own.
$(VENV)/.test-packages: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install -q -c constraints.txt --no-build-isolation ".[test]"
	-$(PIP) install -q --no-deps --upgrade --target build/triton nvidia-pytriton "numpy<2"
	touch $@

$(VENV)/.test: $(VENV)/.test-packages $(SOURCES) setup.py
	rm -rf build/wheel && $(PIP) wheel -q --no-deps --no-build-isolation -w build/wheel .
	$(PIP) install -q --no-deps --force-reinstall build/wheel/*.whl
	touch $@

clean:
	rm -rf $(VENV) $(GPU_VENV) build $(OUT) *.egg-info
