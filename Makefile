# make venv         .venv with this package and everything it needs
# make run          trains the default federation; flags go into ARGS="--config.rounds=2"
# make federation   a SuperLink and three SuperNodes of Flower on this machine train three drawn sites for a few rounds
# make test         ruff, mypy, then every test and doctest
# make test-processes  the tests that take minutes: whole programs, some killed (Flower, the main job), and every
#                   method deployed
# make lint         ruff and mypy alone
# make docs         the site, in site/, warnings being errors
# make bench        every benchmark, as Markdown tables, on a machine with nothing else to do; TORCH=PYTHON and
#                   FEDJAX=PYTHON name the Pythons of the peers, DATA=DIR holds Fashion-MNIST, REID=DIR the real sites;
#                   without them less is timed
# make test-newest  the tests in .venv-newest, made with the newest Python here; SHORT=1 runs those marked `short`.
#                   Remove .venv-newest to have it look for newer releases again.

PYTHON ?= python3
ARGS ?=
SHORT ?=
TORCH ?=
FEDJAX ?=
DATA ?= ../shared/data/fashion_mnist
REID ?= ../shared/data

INPUTS := setup.cfg requirements.txt pyproject.toml
PYTEST := -m pytest -q -n 2 --doctest-modules fedklpr_jax tests

.PHONY: venv run federation test test-processes lint docs bench test-newest newest-python
.DELETE_ON_ERROR:

venv: .venv/installed

# Without build isolation pip looks only at what is installed already, so an update without a network still succeeds.
# $(call install,EXTRA)
define install
	@echo "installing $(1) into $(@D), which takes some minutes the first time"
	@$(@D)/bin/python -m pip install -q --disable-pip-version-check 'setuptools>=77,<90'
	@$(@D)/bin/python -m pip install -q --disable-pip-version-check --no-build-isolation -e '.[$(1)]'
	@touch $@
endef

.venv/installed: $(INPUTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "$(PYTHON) is missing or older than 3.11; give a newer one: make venv PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv $(@D)
	$(call install,test)

.venv/installed-docs: .venv/installed
	$(call install,docs)

.venv-newest/installed: $(INPUTS)
	@newest=$$($(MAKE) -s newest-python) && echo "newest Python: $$newest" && "$$newest" -m venv $(@D)
	$(call install,test)

# Each candidate is tried, for a version manager's shim may exist without the version behind it.
newest-python:
	@for minor in 14 13 12 11; do \
	  for python in python3.$$minor $$(ls -d $$HOME/.pyenv/versions/3.$$minor.*/bin/python 2>/dev/null | sort -rV); do \
	    if "$$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then command -v "$$python"; exit; fi; \
	  done; \
	done; echo "no Python from 3.11 to 3.14 runs here" >&2; exit 1

run: venv
	.venv/bin/python experiments/run.py --config=experiments/fedklpr.py $(ARGS)

federation: venv
	.venv/bin/python -m fedklpr_jax.deploy.loopback --config=experiments/fedklpr.py \
	  --config.data.clients=station,arena,harbour --config.rounds=3 --config.eval.every=3 \
	  --config.out=runs/federation $(ARGS)

lint: venv
	.venv/bin/python -m ruff check .
	.venv/bin/python -m mypy

docs: .venv/installed-docs
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict -q
	@echo "the site is in site/index.html"

bench: venv
	@for name in tiles convolution round maps server wire evaluation reranking clustering capacity hosts stream; do \
	  printf '\n## %s\n\n' $$name; .venv/bin/python -m benchmarks.$$name || exit; \
	done
	@printf '\n## step\n\n'; .venv/bin/python -m benchmarks.step $(if $(TORCH),--python $(TORCH))
	@printf '\n## many_clients\n\n'; if [ -d $(DATA) ]; then .venv/bin/python -m benchmarks.many_clients --root $(DATA) \
	  $(if $(TORCH),--python torch=$(TORCH)) $(if $(FEDJAX),--python fedjax=$(FEDJAX)); \
	else echo "$(DATA): not here; give DATA=DIR"; fi
	@printf '\n## scaling\n\n'; if [ -d $(DATA) ]; then .venv/bin/python -m benchmarks.scaling --root $(DATA); \
	else echo "$(DATA): not here; give DATA=DIR"; fi
	@printf '\n## fedreid\n\n'; if [ -d $(REID) ]; then .venv/bin/python -m benchmarks.fedreid --root $(REID) \
	  $(if $(TORCH),--python $(TORCH)); else echo "$(REID): not here; give REID=DIR"; fi

test: lint
	JAX_PLATFORMS=cpu .venv/bin/python $(PYTEST) -m 'not processes'

test-processes: venv
	JAX_PLATFORMS=cpu .venv/bin/python -m pytest -q -m processes tests

test-newest: .venv-newest/installed
	@.venv-newest/bin/python -c 'import jax, sys; print("Python", sys.version.split()[0], "with JAX", jax.__version__)'
	JAX_PLATFORMS=cpu .venv-newest/bin/python $(PYTEST) $(if $(SHORT),-m short)
