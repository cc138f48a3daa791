# Every target is a thin call of python -m harvest | shards | train | evaluate.
# LAYER=17 or "8 12 17", PROFILE=demo, RUN=name, HARVEST=name, NPROC=n, ARGS="--train.lr 3e-4"

PYTHON ?= python3.11
VENV   ?= .venv
PEERS  ?= .venv-peers
AUDIT  ?= .venv-audit
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip --disable-pip-version-check -q

# The shell passes values on as single words whatever they hold, a $ too.
quote   = '$(subst ','\'',$(1))'
option  = $(if $(value $(1)),$(2) $(call quote,$(value $(1))))
OPTIONS = $(call option,LAYER,--layer) $(call option,PROFILE,--profile) $(call option,RUN,--run) \
          $(call option,HARVEST,--harvest) $(ARGS)

export TOKENIZERS_PARALLELISM = true
export WANDB_SILENT = true

# Without a target, or as `make help`: what there is. The lines of README's table, not the installation's.
help:
	@echo 'make demo                        install, harvest, train and evaluate on the embedded model and text'
	@echo 'make test                        install the development extras, lint, types, tests'
	@echo 'make plan|harvest LAYER=17       how much it takes; the activation store of a layer'
	@echo 'make verify LAYER=17             reads and checks every byte of the store'
	@echo 'make train LAYER=17 RUN=name     trains; sweep: every combination of [sweep]'
	@echo 'make evaluate LAYER=17 RUN=name  metrics.json, plots, report.html; compare WITH=...: others on the same rows'
	@echo 'make read TEXT="..."             which latents fire on a text of your own; samples: those of the training'
	@echo 'make export|import|push|upload   other tools, the hub, object stores'
	@echo 'make bench|soak|audit            ratios, an hour of kills, known vulnerabilities'
	@echo 'PROFILE=demo, HARVEST=name and ARGS="--section.key value" go with each stage, NPROC=n with harvest and train: README.md'

.PHONY: help demo test test-all test-peers install install-dev install-embedded install-peers harvest plan verify upload \
        train sweep samples evaluate compare read export import push bench bench-storage soak audit \
        lint format clean

demo: install install-embedded
	@$(PY) -m harvest --profile demo $(ARGS)
	@$(PY) -m train --profile demo $(ARGS)
	@$(PY) -m evaluate --profile demo $(ARGS)

# A process for each core, up to four, one thread in each: 7 min 13 s on two cores instead of 12 min 45 s one by one.
test: install-dev install-embedded lint
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --maxprocesses 4 --dist loadfile -m "not slow and not peers" $(ARGS)

# What is slow: 50 kills of a harvest, several processes, the browser; and the peers. `test` first.
test-all: install-dev install-embedded test-peers
	@$(PY) -m pytest -q -m slow $(ARGS)

# Our exports loaded by the tools they are for, in an environment of their own ($(PEERS)).
test-peers: install-dev install-embedded install-peers
	@PEERS=$(PEERS) $(PY) -m pytest -q -m peers $(ARGS)

# One process, or NPROC of them: torchrun's ranks take disjoint windows, or disjoint rows of a batch.
RANKS = $(PY) -m $(if $(NPROC),launch $(call quote,$(NPROC)))

harvest: install
	@$(RANKS) harvest $(OPTIONS)

plan: install
	@$(PY) -m harvest --plan $(OPTIONS)

verify: install
	@$(PY) -m shards verify $(OPTIONS)

upload: install
	@$(PY) -m shards upload $(call option,TO,--to) $(OPTIONS)

train: install
	@$(RANKS) train $(OPTIONS)

sweep: install
	@$(PY) -m train.sweep $(OPTIONS)

samples: install
	@$(PY) -m train.samples_page $(OPTIONS)

evaluate: install
	@$(PY) -m evaluate $(OPTIONS)

compare: install
	@$(PY) -m evaluate.compare $(if $(WITH),--with $(WITH)) $(OPTIONS)

# TEXT="a sentence"
read: install
	@$(PY) -m evaluate.read $(call option,TEXT,--text) $(OPTIONS)

# FORMAT=saelens | gemma_scope | circuit_tracer, PREFIX=g for one prefix
export: install
	@$(PY) -m transcoder.export $(call option,FORMAT,--format) $(call option,PREFIX,--prefix) $(OPTIONS)

# FROM=directory, file or hf:// address of another tool's transcoder
import: install
	@$(PY) -m transcoder.import_ $(call option,FROM,--from) $(OPTIONS)

# REPO=owner/name or owner/name/path; the token is HF_TOKEN
push: install
	@$(PY) -m evaluate.push $(call option,REPO,--repo) $(OPTIONS)

# Ratios against references, side by side in one process; JSON in bench/results/. Needs the demo's store.
DEMO_STORES = activations/smollm2-135m
bench: install install-embedded
	@$(PY) -m harvest --profile demo
	@$(PY) -m bench.loader $(DEMO_STORES)/layer_12.zarr
	@$(PY) -m bench.train_step

bench-storage: install install-embedded
	@$(PY) -m harvest --profile demo --harvest f32 --harvest.rows 32768 --harvest.storage float32
	@$(PY) -m bench.storage $(DEMO_STORES)/layer_12_f32.zarr

# Train, evaluate and resume, killed at random instants, for MINUTES; fails where a byte differs or memory grows.
soak: install-dev
	@$(PY) -m bench.soak --minutes $(or $(MINUTES),60) $(ARGS)

# Known vulnerabilities of the pinned versions. --strict: a package nothing is known of fails, and is not passed over.
audit: $(AUDIT)/.installed
	@$(AUDIT)/bin/python -m pip_audit --strict -r constraints.txt --no-deps --disable-pip --progress-spinner off \
		2> $(AUDIT)/said || { cat $(AUDIT)/said >&2; grep -q '^Found' $(AUDIT)/said || \
		echo "audit: NOT done: pypi.org did not give its advisories to this machine; run it where it does" >&2; exit 1; }

lint: install-dev
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m pyright --pythonpath $(PY)

format: install-dev
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

clean:
	rm -rf .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

# Installation: torch first (a bare torch pulls gigabytes of CUDA), then the rest at the versions the tests
# passed with. An environment that has a torch keeps it (Colab: VENV=/usr/local). No-ops when up to date.

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev
install-embedded: $(VENV)/.installed-embedded
install-peers: $(PEERS)/.installed

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing into $(VENV)"
	@$(PIP) install 'pip>=25.1'
	@$(PY) -c 'import torch' 2>/dev/null || $(PIP) install "$$(grep '^torch==' constraints.txt)"
	@grep -v '^torch==' constraints.txt > $(VENV)/.constraints
	@$(PIP) install -c $(VENV)/.constraints --group run
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@$(PIP) install -c $(VENV)/.constraints --group dev
	@touch $@

$(VENV)/.installed-embedded: embedded.txt $(VENV)/.installed
	@$(PIP) install --no-deps --require-hashes -r embedded.txt
	@touch $@

$(PEERS)/.installed: peers.txt
	@echo "installing the tools that the exports are for into $(PEERS)"
	@test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	@$(PEERS)/bin/python -m pip --disable-pip-version-check -q install 'pip>=25.1'
	@$(PEERS)/bin/python -m pip --disable-pip-version-check -q install "$$(grep '^torch==' peers.txt)"
	@$(PEERS)/bin/python -m pip --disable-pip-version-check -q install -r peers.txt
	@touch $@

$(AUDIT)/.installed:
	@test -x $(AUDIT)/bin/python || $(PYTHON) -m venv $(AUDIT)
	@$(AUDIT)/bin/python -m pip --disable-pip-version-check -q install 'pip-audit>=2.10'
	@touch $@
