# Two commands set up a fresh machine: `make demo`, then `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

export HF_HUB_OFFLINE := 1
export TRANSFORMERS_OFFLINE := 1

.PHONY: demo test lint docs install

# The package alone, which is all that the demo needs; and with the tools of the tests and the docs.
$(VENV)/.package: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.tools: $(VENV)/.package
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

install: $(VENV)/.tools

demo: $(VENV)/.package
	$(BIN)/sampler generate -c configs/demo.yaml

# Bytecode is kept, also where the environment says otherwise: both workers collect all tests, and
# to rewrite their assertions takes a third of that.
test: install
	env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest -n 2 --dist worksteal

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

# Pages into site/; what mkdocs-material says of its own future is left out.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
