# Everything runs in .venv. `make demo` and `make test` work on a fresh machine with Python 3.10-3.13 and nothing else.
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test check lint bench clean

demo: .venv/installed
	$(BIN)/rsae demo --out runs/demo

test: .venv/installed
	$(BIN)/python -m pytest

check: lint test

lint: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

bench: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.fit
	$(BIN)/python -m benchmarks.step
	$(BIN)/python -m benchmarks.gate
	$(BIN)/python -m benchmarks.harvest
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.scaling

# The pins are a set that is known to work together on a CPU. torch comes first: resolved with the rest, it brings CUDA.
.venv/installed: pyproject.toml constraints/cpu.txt constraints/peers.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints/cpu.txt torch
	$(BIN)/pip install -q -c constraints/cpu.txt -e ".[demo,dev]"
	$(BIN)/pip install -q --no-deps -r constraints/peers.txt
	touch $@

clean:
	rm -rf .venv runs
