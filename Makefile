# Everything a person or CI runs. Tools come from .venv, which `make setup` builds from the lock.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PEERS := .peers

.PHONY: setup demo up lint test test-fast test-long peers lock clean

setup: $(STAMP)

$(STAMP): pyproject.toml requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint requirements.lock --editable '.[dev,postgres,wandb,mlflow,tensorboard]'
	touch $@

demo: setup
	$(BIN)/tunesmith demo

up: setup
	$(BIN)/tunesmith up

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Files of tests side by side, two at a time: each of the processes imports torch.
test-fast: setup
	$(BIN)/pytest -m "not ray and not long and not torchrun" --numprocesses 2 --dist loadfile

test: lint test-fast
	$(BIN)/pytest -m "(ray or torchrun) and not long"

test-long: setup
	$(BIN)/pytest -m long --timeout 1200

# What benchmarks measure against, each in an environment of its own.
peers: $(PEERS)/trl/.installed $(PEERS)/vllm/.installed

UNWANTED_vllm := torchvision torchaudio torchcodec # CUDA builds, which break the import of a CPU's vLLM

$(PEERS)/%/.installed: tests/bench/peers/requirements-%.txt
	$(PYTHON) -m venv $(PEERS)/$*
	$(PEERS)/$*/bin/pip install --quiet --requirement $<
	$(if $(UNWANTED_$*),$(PEERS)/$*/bin/pip uninstall --quiet --yes $(UNWANTED_$*))
	touch $@

lock: setup
	$(BIN)/pip freeze --exclude-editable | sed 's/+cpu$$//' > requirements.lock

clean:
	rm -rf $(VENV) $(PEERS) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
