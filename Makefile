# `make serve` and `make test` set up in .venv what they need. On the machine: make, and Python 3.11 or later.

PYTHON = python3
VENV = .venv

# Options of `linocut serve`. ARGS are further ones, or those of pytest: make test ARGS="tests/engine -x".
MODEL =
HOST = 127.0.0.1
PORT = 8000
ARGS =

# An extra package index to take PyTorch from. On Linux its default wheel brings CUDA's libraries, several GB of them;
# a machine without a GPU does better with the CPU build, from the index that PyTorch's own instructions name.
TORCH_INDEX =

BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check
INSTALL = $(PIP) install --no-input --constraint constraints.txt

# OpenMP threads that spin while they wait make tests several times slower on a machine with other work.
export OMP_WAIT_POLICY ?= PASSIVE

# Processes that share the tests, each of one thread. 0: none but pytest's own, as a debugger needs it.
WORKERS = 2

.PHONY: help serve test lint format wheel clean distclean

help:
	@echo "make serve      install into $(VENV), then serve the embedded model on $(HOST):$(PORT)"
	@echo "                  MODEL=folder-or-hub-id  HOST=...  PORT=...  ARGS='--threads 2'"
	@echo "make test       install into $(VENV), then run all tests (ARGS='tests/kernels -x')"
	@echo "make lint       ruff and mypy;  make format: let ruff rewrite what lint asks of it"
	@echo "make wheel      build dist/linocut-*.whl, by way of the source distribution"
	@echo "make clean      remove what was built;  make distclean: $(VENV) as well"

serve: $(VENV)/.serve
	@exec $(BIN)/linocut serve $(MODEL) --host $(HOST) --port $(PORT) $(ARGS)

# A file stays in one process, with what its tests share; files start in the order of their names.
test: export OMP_NUM_THREADS ?= 1
test: $(VENV)/.test
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

# mypy does not see through the mapping from folders to packages: show it the layout that a wheel has.
lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@mkdir -p build/types/linocut
	@ln -sfn ../../../engine build/types/linocut/engine
	@ln -sfn ../../../kernels build/types/linocut/kernels
	@ln -sfn ../../../training build/types/linocut/training
	MYPYPATH=build/types $(BIN)/mypy -p linocut.engine -p linocut.kernels -p linocut.training

format: $(VENV)/.test
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

# From the source distribution, unpacked elsewhere: build/ here may hold modules that were renamed since.
wheel: $(VENV)/.test
	$(BIN)/python -m build --no-isolation

clean:
	rm -rf build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find engine kernels server tests -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)

# pip is the last thing that venv writes, so an environment that has it is whole.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Linocut needs Python 3.11 or later; \
	this is %s. Another one: make PYTHON=python3.12 ..." % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)

# PyTorch comes first and alone: of all packages only it may come from TORCH_INDEX. It brings setuptools.
$(VENV)/.serve: pyproject.toml constraints.txt | $(BIN)/pip
	$(INSTALL) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch setuptools
	$(INSTALL) --no-build-isolation --editable '.[embedded,fast-http]'
	@touch $@

$(VENV)/.test: $(VENV)/.serve
	$(INSTALL) --no-build-isolation --editable '.[embedded,fast-http,test]'
	@touch $@
