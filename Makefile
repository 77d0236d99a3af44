# quickstart: the whole story on a CPU.  test: the default suite.  check: lint, types, layering.
# slow: what takes minutes.  bench: every benchmark, tables and JSON.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
# Files of tests go to some processes, each file to one of them.
PARALLEL := --dist loadfile

.PHONY: quickstart test slow check bench clean

quickstart: $(INSTALLED)
	$(BIN)/t2v quickstart --workdir quickstart

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 $(PARALLEL)

# Slow tests often wait, for one another's processes and for SLURM: three at once keep two cores busy.
slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow --timeout 1500 -n 3 $(PARALLEL) --no-loadscope-reorder

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check
	$(BIN)/python -m pytest -q tests/test_layering.py

bench: $(INSTALLED)
	for file in $$(grep -l __main__ benchmarks/*.py); do \
	    $(BIN)/python -m benchmarks.$$(basename $$file .py) || exit 1; done

clean:
	rm -rf .venv quickstart

$(INSTALLED): requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || \
	    { echo "Makefile: $(PYTHON) is not there; install Python 3.11, or make PYTHON=..."; exit 66; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "Makefile: $(PYTHON) is too old because t2v needs Python 3.11; make PYTHON=..."; exit 78; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	    { apt-get update -qq && apt-get install -y -qq python3-venv; } || \
	    { echo "Makefile: no venv module; install python3-venv."; exit 66; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps --editable .
	@touch $@
