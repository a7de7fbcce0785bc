# tf_dist: see `make help`. Everything is installed into .venv; nothing outside this folder is changed,
# but for the Horovod wheel that `make horovod` keeps under ~/.cache/tf_dist.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

NP ?= 2
ARGS ?=
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
MPIRUN ?= $(VENV)/bin/mpirun
MPIFLAGS ?=
# What `make train` trains; ARGS come behind it.
TRAIN := --preset shakespeare --data data/samples/shakespeare.txt.gz
# Seconds after which a test launch counts as hanging.
TEST_TIMEOUT ?= 1500

# `make test-fast`: all that needs no TensorFlow, and of real ranks what each update, ZeRO and `fit` stand on.
FAST_PURE := $(wildcard tests/test_*.py) tests/comm tests/data tests/parallel
FAST_MPI := $(addprefix tests/mpi/test_,comm_contract.py shared_memory_mpi.py preflight_mpi.py training_mpi.py zero_mpi.py)
# What `make docs` needs besides: the extra `docs` of setup.cfg.
DOCS = $(shell sed -n '/^docs =/,/^[^ ]/s/^ \+//p' setup.cfg | sed 's/.*/"&"/')

# What a baseline of `make tasks` needs besides.
BENCH_TASKS = $(shell sed -n '/^bench-tasks =/,/^[^ ]/s/^ \+//p' setup.cfg | sed 's/.*/"&"/')

# Open MPI refuses root, and more ranks than cores, unless told otherwise. `make install` writes the same
# into .venv/bin/activate (scripts/mpi_environment.sh), so that plain mpirun lines work as well.
RUN := source scripts/mpi_environment.sh &&

.PHONY: help install train test test-fast test-pure test-jobs fuzz-fit keras-suite examples lint docs horovod torch bench tasks check-peers clean

help: ## this list
	@grep -hE '^[a-z%-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z%-]+):.*## /  make \1|/' | column -t -s '|'
	@echo
	@echo "  Variables: NP=$(NP) (ranks)  MPIRUN=$(MPIRUN)  MPIFLAGS='$(MPIFLAGS)'  ARGS='$(ARGS)' (for scripts/train.py, bench.py)"

install: $(VENV)/.installed ## build .venv with everything, MPI included

$(VENV)/.installed: setup.cfg setup.py pyproject.toml scripts/install.sh scripts/with_progress.sh scripts/mpi_environment.sh
	PYTHON="$(PYTHON)" VENV="$(VENV)" bash scripts/install.sh
	touch $@

train: install ## train a small Transformer on NP ranks, on Shakespeare; some three minutes on two cores
	$(RUN) $(MPIRUN) -np $(NP) $(MPIFLAGS) $(PY) scripts/train.py $(TRAIN) $(ARGS)

test: install lint test-pure test-mpi-1 test-mpi-2 test-mpi-3 test-mpi-4 test-jobs ## all tests

test-fast: install lint ## what to run while you work, some 3 minutes: lint, pure tests, a core of real ranks
	$(PY) -m pytest $(FAST_PURE) -n auto --maxprocesses 4
	$(RUN) TF_DIST_TESTS=all timeout -k 10 $(TEST_TIMEOUT) $(MPIRUN) -np 2 $(MPIFLAGS) $(PY) -m pytest --color=no $(FAST_MPI)

test-pure: install ## tests without MPI, on all cores
	$(PY) -m pytest tests --ignore tests/mpi --ignore tests/jobs -n auto --maxprocesses 4

test-mpi-%: install ## the tests of real ranks, on 1, 2, 3, 4 ... of them
	$(RUN) timeout -k 10 $(TEST_TIMEOUT) $(MPIRUN) -np $* $(MPIFLAGS) $(PY) -m pytest --color=no tests/mpi

test-jobs: install ## whole jobs, as a user starts them
	$(RUN) $(PY) -m pytest tests/jobs -n 2 --dist loadfile --no-loadscope-reorder --durations=10

fuzz-fit: install ## 300 random scripts of Keras users on 2 and 3 ranks (ARGS="--number 20 --seed 1 --np 2")
	$(RUN) $(PY) tests/fuzz_fit/campaign.py $(ARGS)

keras-suite: install ## all of Keras's own tests of training, with tf_dist in the way (ARGS="--quick --np 2")
	$(RUN) $(PY) tests/keras_suite/suite.py $(ARGS)

examples: install ## Keras's official examples, shrunk, on 1, 2 and 4 ranks against plain Keras
	$(RUN) TF_DIST_EXAMPLES=all $(PY) -m pytest tests/jobs/test_examples.py

lint: install ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

docs: install ## the documentation as a site, in build/site; links are checked
	$(PY) -c 'import mkdocs, mkdocstrings_handlers.python, material' 2>/dev/null || \
	    $(PY) -m pip --disable-pip-version-check install --quiet $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict
	@echo "build/site/index.html"

horovod: install ## build Horovod 0.28.1 into .venv, for --backend horovod
	$(RUN) $(PY) scripts/build_horovod.py

torch: ## PyTorch in .venv-torch, a peer of the benchmarks; nothing else needs it
	PYTHON="$(PYTHON)" bash scripts/install_torch.sh

bench: install ## all benchmarks
	$(RUN) $(PY) scripts/bench.py

bench-%: install ## one benchmark: bench-step (ARGS=gpt-0.81M), bench-comm ...; docs/benchmarks.md has them all
	$(RUN) $(PY) scripts/bench.py $* $(ARGS)

tasks: install ## every task on real data: training, metrics, baselines, bits (ARGS="sections noto-emoji=PATH")
	$(PY) -c 'import sklearn' 2>/dev/null || $(PY) -m pip --disable-pip-version-check install --quiet $(BENCH_TASKS)
	$(RUN) $(PY) scripts/bench.py tasks $(ARGS)

check-peers: install ## see for yourself what Horovod and tf.distribute do under Keras 3
	$(RUN) $(PY) scripts/check_peers.py

clean: ## remove .venv, .venv-torch and caches; runs/ and data/prepared stay
	rm -rf $(VENV) .venv-torch build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
