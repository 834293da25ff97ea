# `make demo` and `make test` work from a bare Python 3.11: each makes .venv, installs, runs.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt

.PHONY: demo test test-all check format clean

demo: .venv/.installed
	$(BIN)/umup demo $(ARGS)

test: .venv/.installed-dev
	$(BIN)/python -m pytest -n 2 -m "not slow" $(ARGS)

test-all: .venv/.installed-dev
	$(BIN)/python -m pytest -n 2 $(ARGS)

check: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layers.py tests/test_public.py

format: .venv/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv runs

.venv/.created:
	$(PYTHON) -m venv .venv
	touch $@

# torch goes first and by itself, so that no other package's requirement can choose another build.
.venv/.installed: .venv/.created pyproject.toml constraints.txt
	$(PIP) torch==2.13.0
	$(PIP) --editable '.[plots,sweep]'
	touch $@

.venv/.installed-dev: .venv/.installed
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps mup
	touch $@
