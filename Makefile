# Every target does its own set-up: it needs Python 3.10 or later with pip, and nothing else.
#
#   make demo              the example in all three hosts, and one table       (HOST=airflow: one host only)
#   make test              every suite, two at a time          (JOBS=1: one after the other; make test-core: one suite)
#                          (AIRFLOW_TEST_MATRIX=whole: all that happens to Airflow tasks, on SQLite too)
#   make check             formatting, lint, types and the import rule
#   make bench             the numbers in the README
#   make bench-sessions    warm calls beside the peers: the tables in docs/benchmarks.md (some minutes)
#   make bench-airflow     1,000 tasks waiting in one triggerer; what a task costs beside Airflow's own (12 minutes)
#   make bench-ssh         300 tasks over three SSH hosts, a code tree next to rsync       (bench-slurm: 1,000 tasks)
#   make bench-faults      how long it takes until a fault is noticed: the table in docs/faults.md
#   make screenshots       the pictures in docs/airflow.md, with a browser        (installs Chromium)
#   make soak              ten minutes of calls under random kills                      (SECONDS=60: shorter)
#   make lock              resolve the pins in constraints/ anew               (NAMES=prefect: one of them)
#   make clean             remove what these targets made
#
# PYTHON=python3.12 uses another interpreter. PYTEST_ARGS='-k name -x' goes to pytest.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.ONESHELL:

PYTHON ?= python3
JOBS   ?= 2
HOSTS  := airflow prefect dagster
# The longest first, so that two at a time are soon through.
SUITES := airflow slurm ssh airflow-pg core airflow-3.1 prefect dagster airflow-celery faults demo

env  = $(PYTHON) scripts/env.py
core = .venvs/core/bin

.PHONY: help
help:
	@sed -n 's/^# \{0,1\}//p' $(firstword $(MAKEFILE_LIST)) | sed '/^---/,$$d'

# --- the example -----------------------------------------------------------------------------------------------------

.PHONY: demo
demo:
	@$(env) core demo $(filter-out plain,$(or $(HOST),$(HOSTS)))
	$(core)/python example_dags/demo.py $(if $(HOST),--host $(HOST))

.PHONY: bench
bench:
	@$(env) core demo
	$(core)/python tests/benchmarks/bench.py

.PHONY: bench-sessions
bench-sessions:
	@$(env) bench
	.venvs/bench/bin/python -m tests.benchmarks.sessions --docs docs/benchmarks.md --json .venvs/bench/sessions.json $(BENCH_ARGS)

.PHONY: bench-airflow
bench-airflow:
	@$(env) bench-airflow
	.venvs/bench-airflow/bin/python -m tests.benchmarks.bench_airflow --docs docs/benchmarks.md --json .venvs/bench-airflow/airflow.json $(BENCH_ARGS)

.PHONY: bench-ssh bench-slurm bench-faults
bench-ssh bench-slurm bench-faults: bench-%:
	@$(env) core
	$(core)/python -m tests.benchmarks.bench_$* $(BENCH_ARGS)

# --- tests -----------------------------------------------------------------------------------------------------------

# What a suite prints lies in .venvs/.test-<suite>.log, and is shown when it fails.
counts = grep -hE '[0-9]+ (passed|failed|skipped|errors?)' .venvs/.test-$1.log | tail -n 1 | tr -d '=' | xargs || true

.PHONY: test $(SUITES:%=logged-%)
test:
	@$(env) core demo $(HOSTS)
	rm -f .venvs/.test-*
	$(MAKE) --no-print-directory --keep-going --jobs=$(JOBS) $(SUITES:%=logged-%) && failed=0 || failed=1
	printf '\n'
	for suite in $(SUITES); do
	    if test -e .venvs/.test-$$suite.ok; then outcome=ok; else outcome=FAILED; fi
	    counts=$$($(call counts,$$suite))
	    printf '%-14s %-7s %s\n' "$$suite" "$$outcome" "$${counts:-no test ran}"
	done
	grep -h 'tests were left out' $(SUITES:%=.venvs/.test-%.log) || true
	exit $$failed

$(SUITES:%=logged-%): logged-%:
	@echo "=== $*: started"
	if $(MAKE) --no-print-directory test-$* > .venvs/.test-$*.log 2>&1; then
	    touch .venvs/.test-$*.ok
	    echo "=== $*: $$($(call counts,$*))"
	else
	    echo "=== $*: FAILED"
	    cat .venvs/.test-$*.log
	    exit 1
	fi

.PHONY: test-core
test-core:
	@$(env) core
	$(core)/python -m pytest tests/core tests/providers tests/repo tests/sessions $(PYTEST_ARGS)

.PHONY: test-faults
test-faults:
	@$(env) core
	$(core)/python -m pytest tests/faults $(PYTEST_ARGS)

# They install Slurm and sshd where those are missing, which takes root; without it their tests are left out.
.PHONY: test-ssh test-slurm
test-ssh test-slurm: test-%:
	@$(env) core demo $(HOSTS)
	$(core)/python -m pytest tests/$* $(PYTEST_ARGS)

.PHONY: screenshots
screenshots:
	@$(env) airflow screens
	.venvs/airflow/bin/python -m tests.airflow.screens --python .venvs/screens/bin/python --folder docs/images

.PHONY: soak
soak:
	@$(env) core
	$(core)/python -m tests.faults.soak --seconds $(or $(SECONDS),600) $(SOAK_ARGS)

.PHONY: test-demo
test-demo:
	@$(env) core demo
	$(core)/python -m pytest tests/demo $(PYTEST_ARGS)

# The race between triggers and the scheduler is run where Airflow loses it most: on PostgreSQL.
elsewhere = --ignore tests/airflow/test_celery.py --ignore tests/airflow/test_race.py

.PHONY: $(HOSTS:%=test-%)
$(HOSTS:%=test-%): test-%:
	@$(env) $* demo
	.venvs/$*/bin/python -m pytest tests/$* tests/repo/test_readme.py $(elsewhere) $(PYTEST_ARGS)

# They install PostgreSQL, and Redis for Celery, where those are missing, which takes root; without it these tests are
# left out.
.PHONY: test-airflow-pg test-airflow-celery
test-airflow-pg:
	@$(env) airflow demo
	AIRFLOW_TEST_DATABASE=postgresql .venvs/airflow/bin/python -m pytest tests/airflow/test_matrix.py tests/airflow/test_race.py $(PYTEST_ARGS)

test-airflow-celery:
	@$(env) airflow demo
	.venvs/airflow/bin/python -m pytest tests/airflow/test_celery.py $(PYTEST_ARGS)

# The older Airflows that are supported, of which `make test` runs the oldest: what depends on Airflow's version.
.PHONY: test-airflow-3.1 test-airflow-3.2
test-airflow-3.1 test-airflow-3.2: test-%:
	@$(env) $* demo
	.venvs/$*/bin/python -m pytest tests/airflow -m every_airflow --ignore tests/airflow/test_celery.py $(PYTEST_ARGS)

# --- checks ----------------------------------------------------------------------------------------------------------
# mypy sees the types of what is installed beside it, so each host's adapter is checked in that host's environment.

# Examples and tests: a path that names a host belongs to that host's environment, every other one to core.
files = $(wildcard example_dags/*.py example_dags/*/*.py tests/*.py tests/*/*.py tests/*/*/*.py)
ours  = $(foreach file,$(files),$(if $(filter $1,$(or $(firstword $(foreach host,$(HOSTS),$(findstring $(host),$(file)))),core)),$(file)))

.PHONY: check
check: check-style check-core $(HOSTS:%=check-%)

.PHONY: check-style
check-style:
	@$(env) core
	$(core)/ruff format --check .
	$(core)/ruff check .
	$(core)/lint-imports --no-logo

.PHONY: check-core
check-core:
	@$(env) core
	$(core)/mypy --python-version 3.10 --cache-dir .mypy_cache/core flow_core scripts $(call ours,core)

.PHONY: $(HOSTS:%=check-%)
$(HOSTS:%=check-%): check-%:
	@$(env) $*
	.venvs/$*/bin/mypy --cache-dir .mypy_cache/$* integrations/flow_$* $(call ours,$*)

.PHONY: format
format:
	@$(env) core
	$(core)/ruff check --fix-only .
	$(core)/ruff format .

# --- the rest --------------------------------------------------------------------------------------------------------

.PHONY: lock
lock:
	$(env) --lock $(NAMES)

.PHONY: clean
clean:
	rm -rf .venvs .demo example_dags/out build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
