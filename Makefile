# Two commands from a fresh clone: `make quickstart` and `make test`. Each installs what it needs into
# .venv, once.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: quickstart test check unit test-slurm install clean

quickstart: $(INSTALLED)
	$(BIN)/megaconsa quickstart

test: check unit

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p megaconsa
	$(BIN)/lint-imports --no-cache

unit: $(INSTALLED)
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "not gpu and not multigpu and not slurm and not slow"

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
