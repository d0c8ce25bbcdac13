# kubetuner: everything a person or CI runs. 'make help' lists it.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
QUANTISED := $(VENV)/quantised

# Idle OpenMP threads that spin make tiny models 30 times slower on a busy machine.
export OMP_WAIT_POLICY := PASSIVE

FAMILY ?= sana
OUT    ?= runs/demo
DEMO   := pipelines/recipes/demo
JOBS   ?= 2
PYTEST  = $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

##@ Everyday
.PHONY: help setup demo test check lint
help:  ## Show this list
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} /^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY)  ## Make .venv with the pinned packages
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,dev]'
	touch $@

demo: $(READY)  ## Run the whole pipeline on tiny models here (FAMILY=sdxl|pixart_sigma|sana, FROM_SCRATCH=1)
ifdef FROM_SCRATCH
	$(BIN)/python -m pipelines.recipes.demo.random_base --family $(FAMILY) --out $(OUT)/from-scratch
	$(BIN)/kubetuner run --config $(OUT)/from-scratch/config.json --out $(OUT)
else
	$(BIN)/kubetuner run --config $(DEMO)/$(FAMILY).json --out $(OUT)
endif

test: $(READY) $(QUANTISED)/.ready  ## Run the whole suite (JOBS=2 files at a time)
	PYTHONPATH=$(QUANTISED) $(PYTEST) -m quantised
	$(PYTEST) -m "not quantised"

# Beside the other packages: where torchao is found, every import of diffusers takes longer and prints its complaints.
$(QUANTISED)/.ready: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --upgrade --no-deps --target $(QUANTISED) \
		bitsandbytes ninja optimum-quanto torchao
	touch $@

check: lint test  ## Lint, types, layers and the suite

lint: $(READY)  ## Lint, types and layers alone
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

##@ Maintenance
.PHONY: bench bench-peers compile constraints docs
bench: $(READY)  ## Training, caching and reading beside bare loops and SimpleTuner's layout, as ratios
	$(BIN)/python -m bench.training_overhead
	$(BIN)/python -m bench.cache_reading
	$(BIN)/python -m bench.cache_encoding
	$(BIN)/python -m bench.data_memory

bench-peers: $(READY)  ## SimpleTuner and diffusers' examples themselves beside us, as ratios
	test -d $(or $(PEERS_VENV),.venv-peers)/diffusers-packages || bash bench/peers/setup.sh
	$(BIN)/python -m bench.peers.training
	$(BIN)/python -m bench.peers.caching

compile: $(READY)  ## Write pipelines/compiled/finetune.yaml
	$(BIN)/kubetuner compile --out pipelines/compiled/finetune.yaml

docs: $(READY)  ## Write docs/config.md and the recipes' table of GPU memory
	$(BIN)/python -m kubetuner.config.reference docs/config.md
	$(BIN)/python -m pipelines.recipes.table

constraints: $(QUANTISED)/.ready  ## Pin the versions that are installed now
	{ echo "# Every version that the suite was run with. 'make setup' installs exactly these; regenerate with 'make constraints'."; \
	  PYTHONPATH=$(QUANTISED) $(BIN)/pip freeze --exclude-editable | grep -viE '^(pip|setuptools|wheel)==' | sed 's/+cpu//'; } > constraints.tmp
	mv constraints.tmp constraints.txt
