# make setup   a virtual environment in .venv with everything; again only after a change
# make run     the main job
# make test    the test suite without its slow part; make slow runs the slow part
# make check   style and types
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup run test slow check clean

setup: .venv/ready

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

run: setup
	$(BIN)/python -m fedsec.run attack=inverting defense=dpsgd

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

slow: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf .venv build dist
