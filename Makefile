# Two commands from a fresh clone: `make quickstart` and `make test`. Each installs what it needs into .venv, once.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
# kernels/, tools/, configs/ and slurm/ are subpackages of megaconsa by pyproject's package-dir; the checkers see them in a tree of links.
TREE := build/tree

.PHONY: quickstart test check unit test-slurm install clean

quickstart: $(INSTALLED)
	$(BIN)/megaconsa quickstart

test: check unit

check: $(INSTALLED) $(TREE)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd $(TREE) && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p megaconsa
	cd $(TREE) && PYTHONPATH=. ../../$(BIN)/lint-imports --config ../../pyproject.toml --no-cache

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

$(TREE): FORCE
	rm -rf $@ && mkdir -p $@/megaconsa
	ln -s $(CURDIR)/megaconsa/* $(CURDIR)/kernels $(CURDIR)/tools $(CURDIR)/configs $(CURDIR)/slurm $@/megaconsa/

FORCE:

clean:
	rm -rf build runs .pytest_cache .mypy_cache .ruff_cache
