# For everybody: `make demo` and `make test`. All but bench-gpu and clean make .venv first, where it is not there, and install into it; pip shows its progress.
VENV := .venv
PYTHON := $(VENV)/bin/python
PIP := $(PYTHON) -m pip install --disable-pip-version-check --constraint constraints.txt
SOURCES := setup.py pyproject.toml constraints.txt $(wildcard csrc/*.cpp csrc/*/*)

# where a GPU is: in the environment if there is one, else by the system's Python
BENCH_PYTHON := $(if $(wildcard $(PYTHON)),$(PYTHON),python3)
OUT ?= bench/results
PYTEST := $(PYTHON) -m pytest -n auto --maxprocesses 8 --dist worksteal

.PHONY: demo test test-full bench-gpu bench-serve clean

demo: $(VENV)/.installed
	$(PYTHON) tools/demo.py

test: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(PYTEST) -m "not full and not gpu"

test-full: $(VENV)/.installed-dev
	$(PYTEST) -m "not gpu"

bench-gpu:
	$(BENCH_PYTHON) -m bench.gpu --out $(OUT) $(ARGS)

bench-serve: $(VENV)/.installed
	$(PYTHON) -m bench.serve $(ARGS)

$(VENV)/.installed: $(SOURCES)
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PIP) torch setuptools ninja numpy
	$(PIP) --no-build-isolation --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --no-build-isolation --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build specedge/_C* *.egg-info
