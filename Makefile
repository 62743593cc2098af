# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
OUT ?= demo-results
export PIP_CONSTRAINT ?= $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK = 1

BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet

.PHONY: demo test test-all test-slow lint docs results results-full wheel-check release-check clean

demo: $(VENV)/.demo-installed
	$(BIN)/kronlaplace demo --out $(OUT)

test: $(VENV)/.test-installed
	$(BIN)/python -m pytest -n auto --durations=10

test-all: $(VENV)/.test-installed
	$(BIN)/python -m pytest -n auto -m "not slow" --durations=10

test-slow: $(VENV)/.test-installed
	$(BIN)/python -m pytest -m slow --durations=10

lint: $(VENV)/.test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.test-installed
	$(PIP_INSTALL) -e '.[docs]'
	$(BIN)/mkdocs build --strict

# The documentation's tables: `results` tries their commands, small, and writes them from the committed CSV; `results-full` measures again.
results: $(VENV)/.test-installed
	$(BIN)/python -m experiments.results --run quick

results-full: $(VENV)/.test-installed
	$(BIN)/python -m experiments.results --run full

# The built wheel, installed where no checkout is in sight, runs the main job.
wheel-check: $(VENV)/.test-installed
	rm -rf build/wheel-check && mkdir -p build/wheel-check
	$(BIN)/python -m build --wheel --outdir build/wheel-check . >/dev/null
	$(PIP_INSTALL) --no-deps --target build/wheel-check/site build/wheel-check/*.whl
	cd build/wheel-check && PYTHONPATH=$(CURDIR)/build/wheel-check/site $(abspath $(BIN))/python -m kronlaplace demo --dataset diabetes --out results

# Before a release: metadata of sdist and wheel, and the demo with each in a clean environment, outside the checkout.
# RELEASE_PYTHONS and RELEASE_TORCHES are lists: the oldest and the newest that are claimed, as far as they are there.
RELEASE_PYTHONS ?= $(PYTHON)
RELEASE_TORCHES ?= 2.13.0
release-check: $(VENV)/.test-installed
	$(PIP_INSTALL) twine
	rm -rf build/release-check && mkdir -p build/release-check
	$(BIN)/python -m build --outdir build/release-check/dist . >/dev/null
	$(BIN)/python -m twine check --strict build/release-check/dist/*
	set -e; cd build/release-check; for python in $(RELEASE_PYTHONS); do for torch in $(RELEASE_TORCHES); do for dist in dist/*; do \
		echo "== $$dist with $$python, torch $$torch"; \
		rm -rf clean && "$$python" -m venv clean; \
		PIP_CONSTRAINT= clean/bin/python -m pip install --quiet "torch==$$torch" "$$dist"; \
		clean/bin/python -c "import kronlaplace as kl; print(kl.__version__, kl.__file__)" | grep clean; \
		clean/bin/kronlaplace demo --dataset diabetes --out results; \
	done; done; done

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --upgrade pip

$(VENV)/.demo-installed: pyproject.toml | $(VENV)/bin/python
	@echo "Installing kronlaplace into $(VENV): once, a few minutes (PyTorch is the large part)."
	$(PIP_INSTALL) -e '.[experiments]'
	touch $@

$(VENV)/.test-installed: pyproject.toml | $(VENV)/bin/python
	@echo "Installing kronlaplace and its test tools into $(VENV): once, a few minutes."
	$(PIP_INSTALL) -e '.[experiments,test,dev]'
	touch $@ $(VENV)/.demo-installed

clean:
	rm -rf $(VENV) build dist *.egg-info $(OUT)
