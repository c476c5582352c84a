# make search               set up once, then run a search; ARGS="--trials 24 --backbone local"
# make test | make check    the quick tests | formatting, lint, types and every test
# make help                 everything else

PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
		2> /dev/null && { command -v $$python; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
# Quiet but for errors: warnings about the contradicting requirements are expected (requirements.txt)
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
# A whole file at a time, so that what a file prepares is prepared once; slow files first
# (tests/conftest.py), so that no process waits for another's last one.
PYTEST := $(BIN)/python -m pytest --dist loadfile --no-loadscope-reorder

.PHONY: help search test check format bench report clean
.DELETE_ON_ERROR:

help:
	@echo 'make search   run a hyperparameter search     ARGS="--trials 24 --backbone local"'
	@echo 'make report   rebuild the results of a run    ARGS=runs/NAME'
	@echo 'make bench    measure search throughput'
	@echo 'make test     run the quick tests             ARGS="-m \"not slow and not swarm\""'
	@echo 'make check    formatting, lint, types and every test'
	@echo 'make format   format the code'
	@echo 'make clean    remove the environment and all caches (never runs/)'
	@echo 'All but clean first set up $(VENV), if that has not been done yet.'

search: $(VENV)/.installed
	@$(BIN)/python -m tune_app.search $(ARGS)

report: $(VENV)/.installed
	@$(BIN)/python -m tune_app.report $(ARGS)

bench: $(VENV)/.installed
	@$(BIN)/python benchmarks/search_throughput.py $(ARGS)

test: $(VENV)/.installed-dev
	@$(PYTEST) --numprocesses 2 -m "not slow" $(ARGS)

check: $(VENV)/.installed-dev
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy tune_app
	@# A third process works while slow tests wait for servers and searches to come and go.
	@$(PYTEST) --numprocesses 3 $(ARGS)

format: $(VENV)/.installed-dev
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and with its dependencies: its CUDA build needs libraries that no list for all
# machines can name. A torch of this version that is there already is kept.
$(VENV)/.installed: requirements.txt pyproject.toml
	@if [ -z '$(PYTHON)' ]; then \
		echo 'tune_app needs Python 3.11, 3.12 or 3.13 with venv, and none was found on PATH.' >&2; \
		echo 'Install one (Debian, Ubuntu: apt install python3.11-venv), or name it:' >&2; \
		echo '    make $(MAKECMDGOALS) PYTHON=/path/to/python3.11' >&2; \
		exit 1; \
	fi
	@echo 'Installing into $(VENV) (once, about 3 minutes) ...'
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@echo '  1/3 torch'
	@$(PIP) install -c requirements.txt torch
	@echo '  2/3 petals, transformers, ray, optuna, pandas and what they need'
	@$(PIP) install --no-deps -r requirements.txt
	@echo '  3/3 tune_app'
	@$(PIP) install --no-deps -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	@echo 'Installing the development tools (once) ...'
	@$(PIP) install --no-deps -r requirements-dev.txt
	@touch $@
