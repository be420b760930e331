# Keel's targets. Each sets up what it needs; `make help` lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
# threads enter the rounding of every matrix product: pinned wherever numbers are made
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

PYPROJECTS := protos/pyproject.toml $(wildcard services/*/pyproject.toml)
SETUP := $(VENV)/.setup-done
VLLM_VENV := .venv-vllm
SETUP_VLLM := $(VLLM_VENV)/.setup-done

.PHONY: help setup engine-vllm demo test test-unit test-vllm conformance test-browser faults fuzz soak lint format protos docs site site-serve bench-wire bench-engines bench-quantize bench-durability clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(SETUP) ## make the virtual environment .venv (everything below does it by itself)

$(SETUP): $(PYPROJECTS) constraints.txt requirements-dev.txt
	@command -v $(PYTHON) >/dev/null || { echo "Keel needs Python 3.11: apt-get install python3.11 python3.11-venv, or make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch -e protos -e 'services/rollout[torch]' -e services/trainer -e 'services/gateway[tensorboard,wandb]' -r requirements-dev.txt
	@touch $@

# engine vllm emulates no low precision: what it differs by from the trainer is its own bfloat16
DEMO_torch :=
DEMO_vllm := --set engine.kind=vllm --set engine.dtype=bfloat16 --set engine.quantize=none
ENGINE ?= torch

engine-vllm: $(SETUP_VLLM) ## make .venv-vllm, where engines of kind vllm run (CPU; 3 GB)

$(SETUP_VLLM): protos/pyproject.toml services/rollout/pyproject.toml requirements-vllm.txt
	$(PYTHON) -m venv --clear $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps -r requirements-vllm.txt
	$(VLLM_VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps -e protos -e services/rollout
	@touch $@

demo: $(SETUP) $(if $(filter vllm,$(ENGINE)),$(SETUP_VLLM)) ## train a small Mixture-of-Experts model through the whole stack; see runs/demo/report.html (ENGINE=vllm)
	$(BIN)/keel run examples/multiplication.toml --out runs/demo $(DEMO_$(ENGINE))

test: $(SETUP) ## run every test
	$(BIN)/pytest

test-unit: $(SETUP) ## run the tests that take seconds
	$(BIN)/pytest tests/unit tests/contract

test-vllm: $(SETUP) $(SETUP_VLLM) ## test the vLLM engine, for real (four minutes)
	$(BIN)/pytest tests/vllm

conformance: $(SETUP) ## prove that the engines keep the contract: torch, vllm (where .venv-vllm is), examples/engine_minimal
	$(BIN)/python scripts/conformance.py

test-browser: $(SETUP) ## look at the report in Chromium; screenshots in runs/screenshots
	$(BIN)/pytest tests/browser

faults: $(SETUP) ## kills, stops, cuts and clock jumps on a running job, at named moments too; prints the table (half an hour)
	$(BIN)/python tests/faults.py --save benchmarks/results/faults.json

fuzz: $(SETUP) ## 100,000 mutated messages to a running engine and trainer; prints the table (five minutes)
	$(BIN)/python tests/fuzz.py

soak: $(SETUP) ## ten minutes of the whole stack at full rate: does any process grow? (benchmarks/results/soak.json, docs/assets/soak.svg)
	$(BIN)/python benchmarks/soak.py $(if $(MINUTES),--minutes $(MINUTES))

lint: $(SETUP) ## formatting, lint, types, import contracts, generated code
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	PYTHON=$(BIN)/python scripts/generate_protos.sh --check
	$(BIN)/python scripts/run_schema.py --check
	$(BIN)/python scripts/metrics_page.py --check
	$(BIN)/python scripts/cli_page.py --check
	$(BIN)/python scripts/protos_page.py --check
	$(BIN)/python scripts/rest_page.py --check
	$(BIN)/python scripts/conformance_page.py --check
	$(BIN)/properdocs build --quiet --strict -f mkdocs.yml

format: $(SETUP) ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

protos: $(SETUP) ## generate Python from the protos
	PYTHON=$(BIN)/python scripts/generate_protos.sh

docs: $(SETUP) ## generate the reference pages in docs/
	$(BIN)/python scripts/run_schema.py
	$(BIN)/python scripts/metrics_page.py
	$(BIN)/python scripts/cli_page.py
	$(BIN)/python scripts/protos_page.py
	$(BIN)/python scripts/rest_page.py
	$(BIN)/python scripts/conformance_page.py

site: $(SETUP) ## build the docs into site/, to be opened as site/index.html; a broken link fails
	$(BIN)/properdocs build --strict -f mkdocs.yml

site-serve: $(SETUP) ## show the docs at http://127.0.0.1:8000 while you write them
	$(BIN)/properdocs serve -f mkdocs.yml

bench-wire: $(SETUP) ## nanoseconds a token to encode and decode a sequence with routes
	$(BIN)/python benchmarks/wire.py

bench-engines: $(SETUP) ## tokens/s of each engine behind gRPC against in process, and with routes against without (minutes)
	$(BIN)/python benchmarks/engines.py

bench-quantize: $(SETUP) ## what emulated fp8 and fp4 cost, and what they do to log-probs and routes (a minute)
	$(BIN)/python benchmarks/quantize.py

bench-durability: $(SETUP) ## what ledger, checkpoints and acknowledgement cost of a step's time (six minutes)
	$(BIN)/python benchmarks/durability.py

clean: ## remove the virtual environment, caches and runs
	rm -rf $(VENV) $(VLLM_VENV) runs site .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
