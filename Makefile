# make venv   set up .venv with the `treadle` command      make test   run the tests
# make demo   run a small program on a real model
# make check  ruff, mypy --strict, import directions        make bench  print every published figure

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
ROOMS  := dsl grammar kernels runtime scheduler

.PHONY: venv demo test check bench clean

venv: $(READY)

# The rooms appear to Python as one namespace package, `treadle`, through a folder of links.
$(READY): pyproject.toml constraints.txt Makefile
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Treadle needs Python 3.11 or newer; set PYTHON=..."'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "pip>=25.1" "setuptools>=77"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --constraint constraints.txt --editable ".[dev]"
	mkdir -p $(VENV)/tree/treadle
	for room in $(ROOMS); do ln -sfn "$(CURDIR)/$$room" $(VENV)/tree/treadle/$$room; done
	echo "$(CURDIR)/$(VENV)/tree" > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/treadle-tree.pth"
	touch $@

demo: venv
	$(BIN)/treadle demo

test: venv
	$(BIN)/pytest

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest tests/test_imports.py

bench: venv
	for script in benchmarks/[a-z]*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
