# Two commands from a fresh clone: `make quickstart` and `make test`. Each installs what it needs into
# .venv, once.

PYTHON ?= python3
BIN := .venv/bin
PYTEST := CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/pytest -n 2
# Markers of tests that need another machine or much time.
ELSEWHERE := gpu or multigpu or slurm or nightly
INSTALLED := .venv/.installed

.PHONY: quickstart test check unit test-slow test-slurm install clean

quickstart: $(INSTALLED)
	$(BIN)/megaconsa quickstart

test: check unit

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p megaconsa
	$(BIN)/lint-imports --no-cache

unit: $(INSTALLED)
	$(PYTEST) -m "not ($(ELSEWHERE) or slow)"

test-slow: $(INSTALLED)
	$(PYTEST) -m "slow and not ($(ELSEWHERE))"

# A real Slurm on this machine, for as long as the tests last.
test-slurm: $(INSTALLED)
	tests/slurm/run.sh $(BIN)/pytest

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

clean:
	rm -rf build runs .pytest_cache .mypy_cache .ruff_cache
