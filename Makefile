# Every target is a thin call of python -m harvest | shards | train | evaluate.
# LAYER=17, "8 12 17", 0-25 or all, PROFILE=demo, RUN=name, HARVEST=name, NPROC=n, ARGS="--train.lr 3e-4"

# The first of these that runs and can make environments (pyenv's stand-ins do not run, Debian's lacks ensurepip without
# python3-venv). All pins exist for 3.11 to 3.14; the tests run on 3.11.
PYTHONS := python3.11 python3.14 python3.13 python3.12 python3
PYTHON ?= $(firstword $(foreach each,$(PYTHONS),$(if $(call runs,$(each)),$(each))))
VENV   ?= .venv
PEERS  ?= .venv-peers
AUDIT  ?= .venv-audit

# Only what is typed after make counts: a RUN, TEXT or PREFIX of the environment was meant for something else.
ASKED := LAYER PROFILE RUN HARVEST NPROC NODES HEAD RESTARTS ARGS TO TEXT FILE SET SCALE ABLATE WITH FORMAT PREFIX FROM REPO MINUTES PART SPREAD MODEL MEMORY WIDTH
KNOWN := $(ASKED) PYTHON PYTHONS VENV PEERS AUDIT PY PIP SHELL MAKEFLAGS MAKEOVERRIDES DEMO_STORES
typed = $(filter command override,$(firstword $(origin $(1))))
asked = $(if $(call typed,$(1)),$(value $(1)))
$(foreach name,$(filter-out $(KNOWN),$(.VARIABLES)),$(if $(filter command,$(firstword $(origin $(name)))),\
	$(error $(name)=... is not a variable of this Makefile; expected $(ASKED) VENV PYTHON)))

empty :=
space := $(empty) $(empty)
define NEWLINE


endef
export NEWLINE

# The shell passes values on as single words whatever they hold: quotes, a $, lines. A recipe is one line for make.
quote   = '$(subst $(NEWLINE),'"$$NEWLINE"',$(subst ','\'',$(1)))'
# A value that begins with - is not taken for an option.
option  = $(if $(call asked,$(1)),$(2)$(if $(filter -%,$(firstword $(call asked,$(1)))),=, )$(call quote,$(call asked,$(1))))
spliced = $(subst $(NEWLINE), ,$(call asked,$(1)))
MORE    = $(call option,RUN,--run) $(call option,HARVEST,--harvest) $(call spliced,ARGS)
SPREADS = $(call option,SPREAD,--spread)
OPTIONS = $(call option,LAYER,--layer) $(call option,PROFILE,--profile) $(MORE) $(SPREADS)

# Environments may lie in places with spaces: with \ for make (the names that end in _), in quotes for the shell.
home   = $(if $(filter ~/%,$(firstword $(1))),$(HOME)$(patsubst ~%,%,$(1)),$(1))
VENV_  := $(subst $(space),\ ,$(VENV))
PEERS_ := $(subst $(space),\ ,$(PEERS))
AUDIT_ := $(subst $(space),\ ,$(AUDIT))
PY     := $(call quote,$(call home,$(VENV))/bin/python)
PIP    := $(PY) -m pip --disable-pip-version-check -q

export TOKENIZERS_PARALLELISM ?= true
export WANDB_SILENT ?= true

# Without a target, or as `make help`: lists the targets, as docs/commands.md does.
help:
	@echo 'make demo                        install, harvest, train and evaluate on the embedded model and text'
	@echo 'make demo-circuit                the same for all 30 layers, small; then the set'\''s page and a circuit (an hour or less)'
	@echo 'make test                        install the development extras, lint, types, tests'
	@echo 'make plan|harvest LAYER=17       print what harvest and training take (MEMORY=80e9: of each GPU); write the layer'\''s activation store'
	@echo 'make verify LAYER=17             read and check every byte of the store'
	@echo 'make train LAYER=17 RUN=name     train one run; sweep: one run for every combination of [sweep]'
	@echo 'make evaluate LAYER=17 RUN=name  write metrics.json, plots, report.html; compare WITH=...: others on the same rows'
	@echo 'make probe LAYER=17 RUN=name     what a few latents of each prefix tell of tokens and documents'
	@echo 'make absorption LAYER=17 RUN=a   measure absorption and splitting of latents; WITH="b c": others too, and how stable a'\''s are'
	@echo 'make model RUN=name              write the page of a set, with all MLPs replaced at once; LAYER=all: every layer must be there'
	@echo 'make runs|stores                 tables of all runs, of all stores; LAYER=17: of one layer'
	@echo 'make read TEXT="..."             show which latents fire on your own text, ABLATE=12/345: without one; samples: a page of those collected in training'
	@echo 'make explain MODEL=name          have a language model explain latents, and score how well that predicts; FROM=...: another tool'\''s explanations'
	@echo 'make circuit TEXT="..."          trace a prompt through the latents of all layers to the next token'
	@echo 'make export|import|push|upload   other tools'\'' files (export, import), the Hugging Face hub, object stores'
	@echo 'make bench|soak|audit|licences   benchmarks, an hour of random kills, known vulnerabilities, licences of what is installed'
	@echo 'LAYER=all, 0-25 or "0-5 12": several layers, one after another, or n at a time (NPROC=n SPREAD=layers): docs/layers.md'
	@echo 'PROFILE=demo, HARVEST=name and ARGS="--section.key value" go with every stage: docs/commands.md'
	@echo 'NPROC=n: harvest, train or evaluate in n processes (docs/scale.md), with NODES=m HEAD=host:port on each of m machines (docs/nodes.md)'

# Stages wait for each other whatever MAKEFLAGS=-j of the environment says.
.NOTPARALLEL:

.PHONY: help demo demo-circuit test test-all test-peers install install-dev install-embedded install-peers harvest plan verify upload \
        train sweep runs stores samples evaluate compare probe absorption explain model read circuit export import push bench \
        bench-storage gpu soak audit licences lint format clean

DEMO = --profile demo $(call option,LAYER,--layer) $(MORE)
demo: install install-embedded
	$(if $(call asked,PROFILE),$(error make demo is PROFILE=demo; leave PROFILE out, or name the stages one by one))
	@$(RANKS) harvest $(DEMO)
	@$(RANKS) train $(DEMO) $(SPREADS)
	@$(RANKS) evaluate $(DEMO) $(SPREADS)

# All layers: four stages' commands, then the set's page and one graph.
CIRCUIT = --profile circuit --harvest circuit $(MORE)
demo-circuit: install install-embedded
	$(if $(call asked,PROFILE)$(call asked,LAYER)$(call asked,HARVEST),$(error make demo-circuit has its own LAYER, PROFILE and HARVEST; \
		leave them out, or name the stages one by one))
	@$(RANKS) harvest $(CIRCUIT)
	@$(RANKS) train $(CIRCUIT) $(SPREADS)
	@$(RANKS) evaluate --cross-entropy-tokens 256 $(CIRCUIT) $(SPREADS)
	@$(PY) -m evaluate.model $(CIRCUIT)
	@$(PY) -m evaluate.circuit --text $(call quote,$(or $(call asked,TEXT),The capital of France is)) $(CIRCUIT)

# A process for each core, up to four, one thread in each: 7 min 13 s on two cores instead of 12 min 45 s one by one.
test: install-dev install-embedded lint
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --maxprocesses 4 --dist loadfile -m "not slow and not peers" $(call spliced,ARGS)

# What is slow: 50 kills of a harvest, several processes, the browser; and the peers. `test` first.
test-all: install-dev install-embedded test-peers
	@$(PY) -m pytest -q -m slow $(call spliced,ARGS)

# Our exports loaded by the tools they are for, in an environment of their own ($(PEERS)).
test-peers: install-dev install-embedded install-peers
	@PEERS=$(call quote,$(PEERS)) $(PY) -m pytest -q -m peers $(call spliced,ARGS)

# One process, or NPROC of them on each of NODES machines: torchrun's ranks take disjoint windows, or disjoint rows.
LAUNCHED = $(call option,NODES,--nodes) $(call option,HEAD,--head) $(call option,RESTARTS,--max-restarts)
RANKS = $(PY) -m $(if $(call asked,NPROC)$(call asked,NODES)$(call asked,HEAD)$(call asked,RESTARTS),common.launch $(LAUNCHED) $(call quote,$(or $(call asked,NPROC),1)))
# With SPREAD=layers every process takes layers of its own: also where a stage's rows are not shared.
EACH  = $(if $(filter layers,$(call asked,SPREAD)),$(RANKS),$(PY) -m)

# NPROC is for the stages whose work is shared; it is not ignored silently by the others.
ALONE = verify upload runs stores samples model read explain circuit export import push
ALONE += $(if $(filter layers,$(call asked,SPREAD)),,sweep compare probe absorption)
$(if $(call asked,NPROC),$(foreach goal,$(filter $(ALONE),$(MAKECMDGOALS)),$(info \
	note: make $(goal) runs in one process; NPROC is for harvest, train, evaluate, and with SPREAD=layers: docs/commands.md)))

harvest: install
	@$(RANKS) harvest $(OPTIONS)

# With WIDTH the training's plan comes first: it needs no model, the harvest's does.
SPLITS = $(PY) -m train.plan $(call option,NPROC,--nproc) $(call option,NODES,--nodes) $(call option,MEMORY,--memory) $(call option,WIDTH,--width) $(OPTIONS)
plan: install
	@$(if $(call asked,WIDTH),$(SPLITS))
	@$(PY) -m harvest --plan $(OPTIONS)
	@$(if $(call asked,WIDTH),,$(SPLITS))

verify: install
	@$(PY) -m shards verify $(OPTIONS)

upload: install
	@$(PY) -m shards upload $(call option,TO,--to) $(OPTIONS)

train: install
	@$(RANKS) train $(OPTIONS)

sweep: install
	@$(EACH) train.sweep $(OPTIONS)

runs: install
	@$(PY) -m evaluate.runs $(OPTIONS)

stores: install
	@$(PY) -m evaluate.stores $(OPTIONS)

samples: install
	@$(PY) -m train.samples_page $(OPTIONS)

evaluate: install
	@$(RANKS) evaluate $(OPTIONS)

compare: install
	@$(EACH) evaluate.compare $(if $(call asked,WITH),--with $(call spliced,WITH)) $(OPTIONS)

probe: install
	@$(EACH) evaluate.probe $(OPTIONS)

# WITH="name ...": others on the same rows, a run of another seed for stability
absorption: install
	@$(EACH) evaluate.absorption $(if $(call asked,WITH),--with $(call spliced,WITH)) $(OPTIONS)

# Every layer's run of one name on one page, and all MLPs replaced at once.
model: install
	@$(PY) -m evaluate.model $(OPTIONS)

# TEXT="a sentence", or FILE=text.txt; FILE=- is standard input. SET="12/345=3.0", SCALE="12/345=2", ABLATE="12/345@5"
CHANGES = $(call option,SET,--set) $(call option,SCALE,--scale) $(call option,ABLATE,--ablate)
read: install
	@$(PY) -m evaluate.read $(call option,TEXT,--text) $(call option,FILE,--file) $(CHANGES) $(OPTIONS)

# MODEL=name of any OpenAI-compatible endpoint (OPENAI_BASE_URL, OPENAI_API_KEY), or FROM=another tool's explanations
explain: install
	@$(PY) -m evaluate.explain $(call option,MODEL,--model) $(call option,FROM,--from) $(OPTIONS)

# TEXT="a prompt", PREFIX=g; through every layer of RUN
circuit: install
	@$(PY) -m evaluate.circuit $(call option,TEXT,--text) $(call option,PREFIX,--prefix) $(OPTIONS)

# FORMAT=saelens | gemma_scope | gemma_scope_2 | circuit_tracer | delphi | neuronpedia, PREFIX=g for one prefix
export: install
	@$(PY) -m evaluate.export $(call option,FORMAT,--format) $(call option,PREFIX,--prefix) $(OPTIONS)

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

# Step, loop and harvest on this machine's GPU, each beside its floor. PART="step loop": only these.
gpu: install-dev
	@$(PY) -m bench.gpu $(call spliced,PART) $(call spliced,ARGS)

# Train, evaluate and resume, killed at random instants, for MINUTES; fails where a byte differs or memory grows.
soak: install-dev
	@$(PY) -m bench.soak --minutes $(call quote,$(or $(call asked,MINUTES),60)) $(call spliced,ARGS)

# Known vulnerabilities of the pinned versions. --strict: a package that has no record fails instead of being skipped.
audit: $(AUDIT_)/.installed
	@at=$(call quote,$(call home,$(AUDIT))); \
		"$$at/bin/python" -m pip_audit --strict -r constraints.txt --no-deps --disable-pip --progress-spinner off \
		2> "$$at/said" || { cat "$$at/said" >&2; grep -q '^Found' "$$at/said" || \
		echo "audit: NOT done: pypi.org did not give its advisories to this machine; run it where it does" >&2; exit 1; }

# For a release: LICENCES.md, from what is installed.
licences: install-dev
	@$(PY) -m docs.licences

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
# passed with. An environment that has a torch keeps it (Colab: VENV=/usr/local). The project itself is installed
# editable: its packages import from any directory. No-ops when up to date.

install: $(VENV_)/.installed
install-dev: $(VENV_)/.installed-dev
install-embedded: $(VENV_)/.installed-embedded
install-peers: $(PEERS_)/.installed

# Whether a Python is of a version that the pins exist for, and can make environments.
SUITS := import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))
runs   = $(shell $(1) -c '$(SUITS)' > /dev/null 2>&1 && echo yes)
chosen = $(call quote,$(call home,$(1)))
refuse = $(error $(if $(1),PYTHON=$(1) is )no Python of 3.11 to 3.14 that can make an environment: install Python 3.11 with \
	its venv (apt install python3.11-venv, brew install python@3.11, uv python install 3.11), or name another with PYTHON=...)
python = $(if $(call runs,$(call chosen,$(PYTHON))),$(call chosen,$(PYTHON)),$(call refuse,$(PYTHON)))

$(VENV_)/bin/python:
	$(python) -m venv $(call quote,$(call home,$(VENV)))

$(VENV_)/.installed: pyproject.toml constraints.txt | $(VENV_)/bin/python
	@echo installing into $(call quote,$(VENV)): some minutes, 3 GB
	@$(PIP) install 'pip>=25.1'
	@$(PY) -c 'import torch' 2>/dev/null || $(PIP) install "$$(grep '^torch==' constraints.txt)"
	@grep -v '^torch==' constraints.txt > $(call quote,$(call home,$(VENV)))/.constraints
	@# setuptools has 8 lines to say about every editable install
	@PYTHONWARNINGS=ignore $(PIP) install -c $(call quote,$(call home,$(VENV)))/.constraints -e .
	@touch $(call quote,$(call home,$(VENV)))/.installed

$(VENV_)/.installed-dev: $(VENV_)/.installed
	@$(PIP) install -c $(call quote,$(call home,$(VENV)))/.constraints --group dev
	@touch $(call quote,$(call home,$(VENV)))/.installed-dev

$(VENV_)/.installed-embedded: embedded.txt $(VENV_)/.installed
	@$(PIP) install --no-deps --require-hashes -r embedded.txt
	@touch $(call quote,$(call home,$(VENV)))/.installed-embedded

$(PEERS_)/.installed: peers.txt
	@echo installing the tools that the exports are for into $(call quote,$(PEERS))
	@at=$(call quote,$(call home,$(PEERS))); test -x "$$at/bin/python" || $(python) -m venv "$$at"; set -e; \
		pip() { "$$at/bin/python" -m pip --disable-pip-version-check -q install "$$@"; }; \
		pip 'pip>=25.1'; pip "$$(grep '^torch==' peers.txt)"; pip --no-deps -r peers.txt; touch "$$at/.installed"

$(AUDIT_)/.installed:
	@at=$(call quote,$(call home,$(AUDIT))); test -x "$$at/bin/python" || $(python) -m venv "$$at"; set -e; \
		"$$at/bin/python" -m pip --disable-pip-version-check -q install 'pip-audit>=2.10'; touch "$$at/.installed"
