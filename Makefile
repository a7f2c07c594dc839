# Lavender Pipeline. `make help` lists the targets; `make demo` and `make test` set up everything they need.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help env demo shard precompute train eval report browse verify results world bench-data \
	bench-teacher bench-browse bench-student bench-train doctor faults test test-full lint format clean

# What to work on; empty means the default of conf/config.yaml (the embedded world, offline).
DATA ?=
TEACHER ?=
MODEL ?=
ARM ?=
SEED ?=
ARGS ?=
# `make demo` and `make eval`: how many seeds, which arms, CONTROLS=1, further models or adapters (name=folder,...).
SEEDS ?=
ARMS ?=
CONTROLS ?=
STUDENTS ?=
# `make eval` and `make report`: another suite of conf/eval (lmms, paper20, vlmevalkit, pope, ...) and its tasks.
SUITE ?=
TASKS ?=

# Installed without compiled files, which takes half the time; so Python must be free to keep what it compiles.
unexport PYTHONDONTWRITEBYTECODE

VENV ?= .venv
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.ready
INSTALL = $(PYTHON) -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
# For the tests: the real vocabularies of CLIP and Llama 3, as files; what these packages would bring along is not needed.
VOCABULARIES := open_clip_torch llama-models
# The first Python that is new enough and can make environments.
FIND_PYTHON = for p in python3.11 python3.12 python3.13 python3 python; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && exit 0; done; \
	echo "error: no Python >= 3.11 with venv found: install one (Debian: python3 python3-venv)" >&2; exit 2

LMMS := .venv-lmms
CHOSEN = $(if $(SEEDS),--seeds '$(SEEDS)') $(if $(ARMS),--arms '$(ARMS)') $(if $(CONTROLS),--controls) \
	$(if $(STUDENTS),--students '$(STUDENTS)')
SUITED = $(if $(SUITE),'eval=$(SUITE)') $(if $(TASKS),'eval.harness_tasks=[$(TASKS)]')
SETTINGS = $(if $(DATA),'data=$(DATA)') $(if $(TEACHER),'teacher=$(TEACHER)') $(if $(MODEL),'model=$(MODEL)') \
	$(if $(ARM),'arm=$(ARM)') $(if $(SEED),'seed=$(SEED)') $(ARGS)
CHAIN = @$(PYTHON) -m stages.chain

help:  ## this list
	@echo "make TARGET [DATA=world] [TEACHER=tiny] [MODEL=tiny] [ARM=lavender] [SEED=1] [ARGS=\"name=value ...\"]"
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 16

env: $(READY)  ## the environment in .venv, from constraints.txt

$(READY): pyproject.toml constraints.txt
	@python=$$($(FIND_PYTHON)) && echo "environment: $$($$python --version), into $(VENV)" && \
	{ $(PYTHON) -m pip --version >/dev/null 2>&1 || $$python -m venv --clear $(VENV); } && \
	$(INSTALL) -e '.[dev]' && $(INSTALL) --no-deps $(VOCABULARIES)
	@touch $@

demo: $(READY)  ## the whole chain on the embedded world, with a result table [SEEDS=5] [ARMS=sft,lavender,shuffled,oracle]
	$(CHAIN) demo $(CHOSEN) $(SETTINGS)

shard: $(READY)  ## examples of DATA into shards/<data>/examples/
	$(CHAIN) shard $(SETTINGS)

precompute: $(READY)  ## word maps of TEACHER into shards/<data>/maps/<teacher>/
	$(CHAIN) precompute $(SETTINGS)

train: $(READY)  ## MODEL with ARM and SEED into runs/<model>/<data>/<arm>-<seed>/
	$(CHAIN) train $(SETTINGS)

# GPU=a100-80gb GPUS=8 asks about other machines than this one.
doctor: $(READY)  ## before training: what MODEL on DATA needs and what stands in its way [GPU=a100-80gb GPUS=8]
	@$(PYTHON) -m stages.doctor $(if $(GPU),'gpu=$(GPU)') $(if $(GPUS),'gpus=$(GPUS)') $(SETTINGS)

eval: $(READY) $(if $(filter lmms paper20,$(SUITE)),$(LMMS)/.ready)  ## base against every trained arm [CONTROLS=1] [STUDENTS=mine=DIR] [SUITE=lmms TASKS=ai2d,mmmu_val]
	$(CHAIN) eval $(CHOSEN) $(SUITED) $(SETTINGS)

# lmms-eval beside the packages of $(VENV), which it sees and must not change: so no dependencies but the listed ones.
$(LMMS)/.ready: requirements-lmms.txt | $(READY)
	@echo "environment of lmms-eval, into $(LMMS)" && rm -rf $(LMMS) && $(PYTHON) -m venv --without-pip $(LMMS) && \
	$(PYTHON) -c 'import sysconfig; own = sysconfig.get_path("purelib"); print("import site; site.addsitedir(%r)" % own)' \
		> "$$($(LMMS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/lavender.pth" && \
	$(LMMS)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps -r $<
	@touch $@

report: $(READY)  ## one HTML page with tables, curves and attention maps
	$(CHAIN) report $(CHOSEN) $(SUITED) $(SETTINGS)

world: $(READY)  ## train the bundled tiny teacher and student again (some 40 minutes) [ARGS="--out DIR --only teacher"]
	@$(PYTHON) -m pipeline.world $(ARGS)

verify: $(READY)  ## read every cached byte of DATA again and name what is damaged [ARGS=repair=true]
	@$(PYTHON) -m stages.verify $(SETTINGS)

browse: $(READY)  ## a local page over shards: point at a word, see its map
	@$(PYTHON) -m stages.browse $(SETTINGS)

results: $(READY)  ## README's numbers from results/demo.json [SUMMARY=runs/demo/summary.json MADE_BY="make demo SEEDS=5"]
	@$(PYTHON) -m stages.readme $(SUMMARY) $(if $(MADE_BY),--made-by '$(MADE_BY)')

bench-data: $(READY)  ## how fast the data layer is, beside simpler ways [ARGS="--examples 2000 --scale 130000"]
	@$(PYTHON) -m benchmarks.data $(ARGS)

bench-teacher: $(READY)  ## what the capture of maps costs, beside the bare forward [ARGS="--shapes sd14"]
	@$(PYTHON) -m benchmarks.teacher $(ARGS)

bench-browse: $(READY)  ## how fast `make browse` is over 130,000 examples, in Chromium [ARGS="--examples 10000"]
	@$(PYTHON) -m benchmarks.browse $(ARGS)

bench-student: $(READY)  ## what alignment costs a training step [ARGS="--families mllama --pairs 5"]
	@$(PYTHON) -m benchmarks.student $(ARGS)

bench-train: $(READY)  ## what the training loop costs beside the bare step, and on a GPU how fast it is [ARGS="--steps 60"]
	@$(PYTHON) -m benchmarks.train $(ARGS)

faults: $(READY)  ## damage to the caches on purpose, and what comes of it [ARGS="--kills 20 --flips 200"]
	@$(PYTHON) -m benchmarks.faults $(ARGS)

test: $(READY)  ## the tests (some minutes)
	@$(PYTHON) -m pytest

test-full: $(READY)  ## all tests, the long ones too
	@$(PYTHON) -m pytest -m "full or not full"

lint: $(READY)  ## ruff: rules and format
	@$(VENV)/bin/ruff check && $(VENV)/bin/ruff format --check

format: $(READY)  ## ruff: repair what it can, then format
	@$(VENV)/bin/ruff check --fix; $(VENV)/bin/ruff format

clean:  ## remove caches of the tools; shards/ and runs/ stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
