# Everything is installed into .venv, from pyproject.toml; a second run finds it there.

PYTHON ?= python3
BIN := .venv/bin
# Pinned once, in pyproject.toml; installed first, so that no dependency brings another one.
TORCH := $(shell sed -n 's/.*"\(torch==[^"]*\)".*/\1/p' pyproject.toml)
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input

.DEFAULT_GOAL := help
.PHONY: help demo test check bench clean build/typed

help: ## say what there is to make
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 14

demo: .venv/demo.stamp ## an S3 server and three daemons on this machine, loading real weights
	$(BIN)/python -m weightcache.tools.demo $(ARGS)

# Three on two cores: of their time two in five goes by in waiting for processes. The order is of tests/conftest.py.
test: check ## check, then the whole test suite
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

check: .venv/test.stamp build/typed ## lint, format and types, over the whole tree
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=build/typed $(BIN)/mypy -p weightcache

bench: .venv/bench.stamp ## measure, beside others and the limit; the results go to bench/out
	$(BIN)/python -m bench $(ARGS)

clean: ## remove what was made, .venv too
	rm -rf .venv build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

.venv/made.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "weightcache needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo missing):" \
			"make demo PYTHON=python3.12" >&2; \
		exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

.venv/%.stamp: pyproject.toml .venv/made.stamp
	$(PIP) install '$(TORCH)'
	$(PIP) install --editable '.[$*]'
	@touch $@

# mypy does not follow an editable install's mapping of runtime/ and tools/: this is the package as it is imported.
build/typed:
	rm -rf $@
	mkdir -p $@/weightcache
	ln -s $(CURDIR)/weightcache/* $(CURDIR)/runtime $(CURDIR)/tools $@/weightcache/
