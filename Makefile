# One virtual environment, .venv, serves every target; a target that needs it makes it.
# The build reads the disk with io_uring where it finds liburing (Debian: liburing-dev).

PYTHON ?= $(firstword $(foreach p,python3.11 python3,$(shell command -v $(p))) python3)
BIN := .venv/bin
INPUTS := pyproject.toml constraints.txt CMakeLists.txt $(wildcard cmake/* src/dipnet/csrc/*)
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check \
    --constraint constraints.txt --build-constraint constraints.txt

.PHONY: help demo test results lint format clean
.DELETE_ON_ERROR:

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 16

demo: .venv/.installed ## install, then run the demo: a report and figures in out/demo
	$(BIN)/dipnet demo --out out/demo

test: lint ## lint, check the types and run the tests
	$(BIN)/pytest --numprocesses logical --maxprocesses 4 --dist loadfile

results: .venv/.installed ## measure the tables of docs/results.md: make results DATA=folder
	@test -n '$(DATA)' || { echo "error: name the texts' folder: make results DATA=folder" >&2; exit 1; }
	$(BIN)/python benchmarks/results.py --data '$(DATA)' $(ARGS)

lint: .venv/.installed-dev ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.installed-dev ## rewrite the code in the one style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove what was built or installed here
	rm -rf .venv build dist out .pytest_cache .mypy_cache .ruff_cache .hypothesis

# --- the environment: the stamps say what is installed, the larger one counts for both ---

.venv/.installed: $(INPUTS) | $(BIN)/pip
	@echo "Installing dipnet and what it needs into .venv (PyTorch is large: minutes)"
	$(INSTALL) --editable .
	@touch $@

.venv/.installed-dev: $(INPUTS) | $(BIN)/pip
	@echo "Installing dipnet and its development tools into .venv (PyTorch is large: minutes)"
	$(INSTALL) --editable '.[dev]'
	@touch .venv/.installed $@

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: '$(PYTHON)' is no Python 3.11 or newer; name one: make PYTHON=/path/to/python"; \
	  exit 1; } >&2
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade --constraint constraints.txt pip
