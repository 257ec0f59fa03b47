# Each target makes .venv when it isn't there. Needs Python 3.11+ with pip, nothing else.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed

.PHONY: install demo test check bench toyworld clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/kvpack demo --output demo-output

test: $(STAMP)
	$(BIN)/python -m pytest
	$(BIN)/python -m pytest -m slow

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright

bench: $(STAMP)
	$(BIN)/python -m benchmarks

toyworld: $(STAMP)
	$(BIN)/python -m benchmarks.toyworld.train_vae
	$(BIN)/python -m benchmarks.toyworld.encode
	$(BIN)/python -m benchmarks.toyworld.train_transformer
	$(BIN)/python -m benchmarks.toyworld.export --to kvpack/data/toyworld

clean:
	rm -rf .venv build dist *.egg-info demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis
