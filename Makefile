# Every target makes its own .venv; nothing outside this folder is installed.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
export DO_NOT_TRACK := 1

.PHONY: install demo gpu-demo test test-all check audit lint gpu-test clean

install: .venv/installed

# pip, because a range such as torch>=2.11 is then met by a torch that is already at hand.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: install
	$(BIN)/rlhf run infra/runs/demo.yaml

# SmolLM2-135M on the six real sets, on a CUDA machine: from the hub, or SETTINGS="--set data.hub=DIR --set models.policy=DIR".
gpu-demo: install
	$(BIN)/rlhf run infra/runs/smollm2-135m.yaml $(SETTINGS)

# A file's tests share servers and models, so they stay in one process; the long files come first.
test: install
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder \
	    -m "not slow and not gpu" tests

test-all: test
	$(BIN)/pytest -q -m "slow and not gpu" tests

gpu-test: install
	$(BIN)/pytest -q -m gpu tests

check: install
	$(BIN)/pip check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python .ci/audit.py

# Known vulnerabilities of the pinned packages; says so where no advisories can be had.
audit: install
	$(BIN)/python .ci/audit.py

# The same, mending what can be mended.
lint: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv workspace
